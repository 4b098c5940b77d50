"""Ways to spoil a picture or its latents, by strength: what a distance is calibrated on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms.functional import gaussian_blur

__all__ = ["LATENT_KINDS", "PICTURE_KINDS"]

Corruption = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(pictures in [-1, 1] or latents (B, ...), strengths (B,) in [0, 1], generator) -> the same."""


def _wide(strength: Tensor) -> Tensor:
    return strength[:, None, None, None]


def blur(x: Tensor, strength: Tensor, g: torch.Generator) -> Tensor:
    """Gaussian of up to a twentieth of the side."""
    side = x.shape[-1]
    width = 2 * (side // 8) + 1
    sigmas = (0.01 + 0.05 * side * strength).tolist()
    return torch.cat(
        [gaussian_blur(one, width, s) for one, s in zip(x.split(1), sigmas, strict=True)]
    )


def noise(x: Tensor, strength: Tensor, g: torch.Generator) -> Tensor:
    return x + 0.5 * _wide(strength) * torch.randn(x.shape, generator=g)


def jpeg(x: Tensor, strength: Tensor, g: torch.Generator) -> Tensor:
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    qualities = (95 - 92 * strength).round().int().tolist()
    coded = [
        decode_jpeg(encode_jpeg(one, quality))
        for one, quality in zip(pixels, qualities, strict=True)
    ]
    return torch.stack(coded).float() / 127.5 - 1


def warp(x: Tensor, strength: Tensor, g: torch.Generator) -> Tensor:
    """Smooth displacements of up to some tenths of the side."""
    coarse = torch.randn((len(x), 2, 4, 4), generator=g)
    moves = F.interpolate(coarse, x.shape[-2:], mode="bicubic").permute(0, 2, 3, 1)
    still = F.affine_grid(torch.eye(2, 3).repeat(len(x), 1, 1), list(x.shape), align_corners=False)
    grid = still + 0.15 * strength[:, None, None, None] * moves
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def shift(x: Tensor, strength: Tensor, g: torch.Generator) -> Tensor:
    """All by the same, up to a quarter of the side, the border repeated."""
    angle = 2 * torch.pi * torch.rand(len(x), generator=g)
    theta = torch.eye(2, 3).repeat(len(x), 1, 1)
    theta[:, :, 2] = 0.5 * strength[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def colour(x: Tensor, strength: Tensor, g: torch.Generator) -> Tensor:
    s = _wide(strength)
    gain = 1 + 0.5 * s * torch.randn((len(x), 3, 1, 1), generator=g)
    return gain * x + 0.4 * s * torch.randn((len(x), 3, 1, 1), generator=g)


def fade(x: Tensor, strength: Tensor, g: torch.Generator) -> Tensor:
    """Towards the next one of the batch."""
    return x.lerp(x.roll(1, 0), _wide(strength))


def latent_noise(z: Tensor, strength: Tensor, g: torch.Generator) -> Tensor:
    return z + _wide(strength) * torch.randn(z.shape, generator=g)


def latent_blur(z: Tensor, strength: Tensor, g: torch.Generator) -> Tensor:
    return z.lerp(F.avg_pool2d(F.pad(z, (2, 2, 2, 2), mode="reflect"), 5, 1), _wide(strength))


PICTURE_KINDS: dict[str, Corruption] = {
    f.__name__: f for f in (blur, noise, jpeg, warp, shift, colour, fade)
}
LATENT_KINDS: dict[str, Corruption] = {f.__name__: f for f in (latent_noise, latent_blur, fade)}
