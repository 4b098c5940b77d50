"""From a stored picture to the pixels of a training sample.

A picture is flipped (or not), resized so that it just covers the target size, and cropped to it.
Where the crop lies and whether the picture is flipped are drawn at the address (seed, epoch,
sample, purpose), so a sample looks the same whatever batch, process or thread prepares it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffkit.data.images import decode
from diffkit.data.records import Encoded, Size
from diffkit.randomness import integers, uniform

__all__ = ["Crop", "Transform", "View", "render", "to_float"]

Crop: TypeAlias = Literal["center", "random"]

RESAMPLING = "lanczos"
"""The resize filter, antialiased; a part of every latent cache key."""


@dataclass(frozen=True)
class View:
    """How one picture becomes one training sample; all in pixels, rows before columns.

    The picture of `original` size is flipped left to right if `flip`, resized to `resized`, and cut
    to `target` with its upper left corner at `corner`.
    """

    original: Size
    resized: Size
    corner: tuple[int, int]
    target: Size
    flip: bool


@dataclass(frozen=True)
class Transform:
    """The choices that are the same for every sample: crop "center" or "random", flips or none."""

    crop: Crop = "center"
    flip: bool = False

    def view(self, original: Size, target: Size, seed: int, epoch: int, index: int) -> View:
        """The view of sample `index` of size `original` in one epoch."""
        flip = self.flip and float(uniform((), seed, epoch, index, "flip")) < 0.5
        return self._cut(original, target, (seed, epoch, index), flip)

    def views(self, original: Size, target: Size) -> list[View]:
        """Every view that a sample can have; only for the crop "center"."""
        flips = (False, True) if self.flip else (False,)
        return [self._cut(original, target, None, flip) for flip in flips]

    def _cut(
        self, original: Size, target: Size, place: tuple[int, int, int] | None, flip: bool
    ) -> View:
        scale = max(target[0] / original[0], target[1] / original[1])
        resized = (
            max(target[0], round(original[0] * scale)),
            max(target[1], round(original[1] * scale)),
        )
        spare = (resized[0] - target[0], resized[1] - target[1])
        if self.crop == "center" or place is None:
            corner = (spare[0] // 2, spare[1] // 2)
        else:
            corner = (
                int(integers(0, spare[0] + 1, (), *place, "crop top")),
                int(integers(0, spare[1] + 1, (), *place, "crop left")),
            )
        return View(original, resized, corner, target, flip)


def render(encoded: Encoded, view: View) -> NDArray[np.uint8]:
    """The pixels of a view, (H, W, 3) uint8. Raises `BadImage`."""
    image, _ = decode(encoded, at_least=view.resized)
    height, width = view.resized
    top, left = view.corner
    if view.flip:
        left = width - view.target[1] - left
    # Pillow samples around the box from the whole picture: this equals resizing, then cutting.
    down, across = image.height / height, image.width / width
    box = (
        left * across,
        top * down,
        min(image.width, (left + view.target[1]) * across),
        min(image.height, (top + view.target[0]) * down),
    )
    cut = image.resize(view.target[::-1], Image.Resampling.LANCZOS, box=box)
    pixels = np.asarray(cut)
    return np.ascontiguousarray(pixels[:, ::-1]) if view.flip else pixels


def to_float(pixels: Sequence[NDArray[np.uint8]]) -> Tensor:
    """(B, 3, H, W) float32 in [-1, 1] from B pictures (H, W, 3) uint8; 0 -> -1, 255 -> 1."""
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return stacked.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)
