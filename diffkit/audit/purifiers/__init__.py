"""What is done to a published picture before it is edited or trained on: pixels in, pixels out."""
