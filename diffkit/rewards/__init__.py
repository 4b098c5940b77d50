"""Networks that score an image, alone or against a text."""
