"""Input transforms that an attack is to survive: expectation over transformation.

Between the view and the encoder the picture goes through what it may meet after publication
(Athalye et al. 2018): JPEG, a smaller copy, blur, noise. Each picture has its own strength, drawn
at the address (seed, step, draw, purpose), so it depends on nothing else in the batch. All of them
work on float32 (B, 3, h, w) in [-1, 1], keep shape and device, and let the gradient through.
Nothing is clipped to [-1, 1], since a clipped pixel has no gradient.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffkit.errors import UserError
from diffkit.randomness import integers, normal, uniform

__all__ = ["TRANSFORMS", "Transform", "parse_transforms"]

JPEG_QUALITY = (60, 95)
"""Lowest and highest libjpeg quality, both included; 4:2:0 chroma."""

RESIZE_FACTOR = (0.5, 0.9)
"""Smallest and largest factor of the sides of the smaller copy."""

BLUR_SIGMA = (0.3, 1.5)
"""Smallest and largest standard deviation of the Gaussian, in pixels of the view."""

NOISE_SIGMA = (0.0, 0.1)
"""Smallest and largest standard deviation of the noise on [-1, 1]: up to 12.75 levels."""

Address: TypeAlias = tuple[int | str, ...]
One: TypeAlias = Callable[[Tensor, Address], Tensor]
"""A transform of one picture (1, 3, h, w) with the address of its draws."""


@dataclass(frozen=True)
class Transform:
    """One row of the table: a name, what it does in words, and the transform of one picture."""

    name: str
    words: str
    one: One

    def __call__(self, x: Tensor, seeds: Sequence[int], step: int, draw: int = 0) -> Tensor:
        """x (B, 3, h, w) in [-1, 1] -> the same shape; row i depends on `seeds[i]` alone.

        Raises `ValueError` unless there is one seed a picture.
        """
        if len(seeds) != len(x):
            raise ValueError(f"{len(seeds)} seeds for {len(x)} pictures")
        rows = [
            self.one(x[i : i + 1], (seed, step, draw, self.name)) for i, seed in enumerate(seeds)
        ]
        return torch.cat(rows)


def _drawn(limits: tuple[float, float], where: Address) -> float:
    low, high = limits
    return low + (high - low) * float(uniform((), *where))


def _identity(x: Tensor, where: Address) -> Tensor:
    return x


def _jpeg(x: Tensor, where: Address) -> Tensor:
    """Straight through: the value of the decoded file, the gradient of the identity."""
    quality = int(integers(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1, (), *where))
    levels = ((x.detach()[0].cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    file = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).numpy()))
    picture.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(io.BytesIO(file.getvalue())) as decoded:
        read = torch.from_numpy(np.array(decoded)).permute(2, 0, 1)[None]
    y = read.to(x) / 127.5 - 1
    return x + (y - x).detach()


def _resize(x: Tensor, where: Address) -> Tensor:
    """Down and up again, bilinear, antialiased."""
    factor = _drawn(RESIZE_FACTOR, where)
    height, width = x.shape[-2:]
    small = (max(1, round(height * factor)), max(1, round(width * factor)))
    for size in (small, (height, width)):
        x = F.interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)
    return x


def _blur(x: Tensor, where: Address) -> Tensor:
    """Separable Gaussian cut at 3 sigma, edges repeated."""
    sigma = _drawn(BLUR_SIGMA, where)
    reach = math.ceil(3 * sigma)
    taps = torch.exp(-torch.arange(-reach, reach + 1.0).square() / (2 * sigma**2)).to(x)
    taps = (taps / taps.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), "replicate"), taps, groups=x.shape[1])
    x = F.pad(x, (0, 0, reach, reach), "replicate")
    return F.conv2d(x, taps.transpose(2, 3), groups=x.shape[1])


def _noise(x: Tensor, where: Address) -> Tensor:
    sigma = _drawn(NOISE_SIGMA, (*where, "sigma"))
    return x + sigma * normal(x.shape, *where).to(x)


TRANSFORMS: dict[str, Transform] = {
    row.name: row
    for row in (
        Transform("identity", "the picture as it is", _identity),
        Transform("jpeg", "JPEG of quality 60 to 95, gradient of the identity", _jpeg),
        Transform("resize", "down to 0.5 to 0.9 of its sides and up again", _resize),
        Transform("blur", "Gaussian blur of 0.3 to 1.5 pixels", _blur),
        Transform("noise", "Gaussian noise of up to 12.75 levels", _noise),
    )
}
"""The transforms by name. `TRANSFORMS[name](x, seeds, step, draw)`."""


def parse_transforms(text: str) -> tuple[str, ...]:
    """Names of transforms, separated by commas: "jpeg,resize" -> ("jpeg", "resize"); "" -> ().

    Raises `UserError` for an unknown name and for one that is given twice.
    """
    names = tuple(name.strip() for name in text.split(",")) if text.strip() else ()
    for name in names:
        if name not in TRANSFORMS:
            raise UserError(f"transform {name!r} is unknown; there are {', '.join(TRANSFORMS)}.")
        if names.count(name) > 1:
            raise UserError(f"transform {name} is given twice; every one is used in turn.")
    return names
