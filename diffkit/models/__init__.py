"""One view of every latent diffusion model: codec, conditioner, denoiser and schedule."""
