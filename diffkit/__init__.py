"""A toolbox for latent diffusion models: load, look, generate, fine-tune."""

__version__ = "0.1.0"
