"""What `diffusion_to_gan.py` is made of."""
