"""Parts of `train_latent_lpips.py`."""
