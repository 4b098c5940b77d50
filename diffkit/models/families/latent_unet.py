"""U-Nets of latents without text, unconditional or class-conditional (Rombach et al. 2022)."""

from __future__ import annotations

from dataclasses import replace

from diffkit.models.families.pixel_unet import FAMILY as PIXELS

# The autoencoder is a `VQModel` or an `AutoencoderKL`.
FAMILY = replace(
    PIXELS,
    name="latent U-Net",
    pipelines={"unconditional": "LDMPipeline"},
    codec="vqvae",
    siblings=(),
)
