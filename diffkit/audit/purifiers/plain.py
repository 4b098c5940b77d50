"""Purifiers that need no model: compression, scaling, cropping, blur and noise."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffkit import randomness
from diffkit.audit.purifiers.base import Amount, Kind, Models, Work

__all__ = ["PLAIN", "from_pillow", "to_pillow"]


def to_pillow(pixels: Tensor) -> Image.Image:
    """An RGB picture of uint8 (3, H, W)."""
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def from_pillow(picture: Image.Image) -> Tensor:
    """uint8 (3, H, W) of an RGB picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _identity(amount: float, models: Models, source: str | None) -> Work:
    return lambda pixels, seed: pixels


def _jpeg(quality: float, models: Models, source: str | None) -> Work:
    """Pillow's encoder: quality as in libjpeg, 4:2:0 chroma."""

    def work(pixels: Tensor, seed: int) -> Tensor:
        file = io.BytesIO()
        to_pillow(pixels).save(file, "JPEG", quality=int(quality), subsampling="4:2:0")
        file.seek(0)
        return from_pillow(Image.open(file))

    return work


def _resize(factor: float, models: Models, source: str | None) -> Work:
    """Bicubic in Pillow, whose filter widens when it shrinks, so nothing is aliased."""

    def work(pixels: Tensor, seed: int) -> Tensor:
        picture = to_pillow(pixels)
        small = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        shrunk = picture.resize(small, Image.Resampling.BICUBIC)
        return from_pillow(shrunk.resize(picture.size, Image.Resampling.BICUBIC))

    return work


def _crop(share: float, models: Models, source: str | None) -> Work:
    """Cut round(share * side) pixels from each of the four borders, then scale back."""

    def work(pixels: Tensor, seed: int) -> Tensor:
        picture = to_pillow(pixels)
        left, top = (min(round(side * share), (side - 1) // 2) for side in picture.size)
        kept = picture.crop((left, top, picture.width - left, picture.height - top))
        return from_pillow(kept.resize(picture.size, Image.Resampling.BICUBIC))

    return work


def _blur(sigma: float, models: Models, source: str | None) -> Work:
    """Gaussian of `sigma` pixels, cut at 3 sigma, edges repeated, then rounded."""

    def work(pixels: Tensor, seed: int) -> Tensor:
        reach = max(1, round(3 * sigma))
        taps = torch.exp(-torch.arange(-reach, reach + 1).double().square() / (2 * sigma**2))
        taps /= taps.sum()
        x = pixels.double()[:, None]
        for kernel, pad in (
            (taps.view(1, 1, 1, -1), (reach, reach, 0, 0)),
            (taps.view(1, 1, -1, 1), (0, 0, reach, reach)),
        ):
            padded = torch.nn.functional.pad(x, pad, mode="replicate")
            x = torch.nn.functional.conv2d(padded, kernel)
        return x[:, 0].round().clamp(0, 255).to(torch.uint8)

    return work


def _noise(sigma: float, models: Models, source: str | None) -> Work:
    """pixels + 255 sigma n, n ~ N(0, 1) addressed by the seed, rounded and limited."""

    def work(pixels: Tensor, seed: int) -> Tensor:
        draw = randomness.normal(pixels.shape, seed, "purify", "noise")
        return (pixels + 255 * sigma * draw).round().clamp(0, 255).to(torch.uint8)

    return work


PLAIN = (
    Kind("identity", "nothing, the picture as published", _identity),
    Kind(
        "jpeg",
        "JPEG of quality {amount}, 4:2:0",
        _jpeg,
        Amount("quality", 75, 1, 100, whole=True),
        more={"subsampling": "4:2:0"},
    ),
    Kind(
        "resize",
        "scaled by {amount} and back, bicubic",
        _resize,
        Amount("factor", 0.5, 0.05, 0.95),
    ),
    Kind(
        "crop",
        "{amount} of each side cut from each border, scaled back",
        _crop,
        Amount("share", 0.125, 0.01, 0.45),
    ),
    Kind("blur", "Gaussian blur of {amount} pixels", _blur, Amount("sigma", 1, 0.1, 20)),
    Kind(
        "noise",
        "Gaussian noise of standard deviation {amount} on [0, 1]",
        _noise,
        Amount("sigma", 0.1, 0.001, 1),
        random=True,
    ),
)
