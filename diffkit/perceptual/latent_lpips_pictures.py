"""LatentLPIPS as a distance of pictures: of what an autoencoder encodes them to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffkit.assets import path as asset
from diffkit.models.codec import Codec
from diffkit.perceptual.latent_lpips import LatentLpips
from diffkit.perceptual.latent_lpips_io import load_latent_lpips

__all__ = ["PictureLatentLpips", "load_embedded"]


class PictureLatentLpips(nn.Module):
    """d(E(x), E(y)), (B,), of pictures (B, 3, H, W) in [-1, 1], E the likeliest latents.

    Sides that the autoencoder does not divide are continued by their last rows and columns.

    Arguments:
        codec: E.
        network: d, for this codec's latents.
    """

    def __init__(self, codec: Codec, network: LatentLpips) -> None:
        super().__init__()
        self.codec = codec
        self.autoencoder = codec.vae
        self.network = network

    @torch.no_grad()
    def forward(self, images: Tensor, other: Tensor) -> Tensor:
        """The distances, float32."""
        return self.network.distance(*(self.codec.encode(self._whole(x)) for x in (images, other)))

    def _whole(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        factor = self.codec.factor
        missing = (0, -width % factor, 0, -height % factor)
        return F.pad(images, missing, mode="replicate") if any(missing) else images


def load_embedded(device: torch.device | str = "cpu") -> PictureLatentLpips:
    """On the embedded model's latents, of pictures such as it makes; frozen."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(asset("model"), subfolder="vae", torch_dtype=torch.float32)
    metric = PictureLatentLpips(Codec(vae), load_latent_lpips())
    return metric.requires_grad_(False).eval().to(device)
