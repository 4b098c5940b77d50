"""Image sizes for training: rectangles of one area, so that pictures keep most of themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from diffkit.data.records import Size
from diffkit.errors import UserError

__all__ = ["assign_buckets", "plan_buckets"]


def plan_buckets(resolution: int, multiple: int, max_aspect: float = 2.0) -> list[Size]:
    """The (height, width) of all buckets, from the widest to the tallest.

    Both sides are multiples of `multiple` (pixels), the area is the nearest possible to
    resolution^2, and the aspect, long side to short, is at most `max_aspect`. The square of
    `resolution` is always among them; `max_aspect=1` leaves it alone. Raises `UserError` for a
    resolution that is not a multiple of `multiple`, or an aspect below 1.
    """
    if multiple < 1 or resolution < 1 or resolution % multiple:
        lower = max(multiple, resolution // multiple * multiple)
        raise UserError(
            f"The resolution {resolution} is not a multiple of {multiple}, which this model needs; "
            f"near ones are {lower} and {lower + multiple}."
        )
    if max_aspect < 1:
        raise UserError(f"The largest aspect is {max_aspect}; it must be at least 1.")
    area = resolution * resolution
    wide: list[Size] = []
    for height in range(resolution, multiple - 1, -multiple):
        width = max(multiple, round(area / height / multiple) * multiple)
        if width <= max_aspect * height and (height == resolution or width > height):
            wide.append((height, width))
    tall = [(width, height) for height, width in wide[1:]]
    return wide[::-1] + tall


def assign_buckets(sizes: Sequence[Size], buckets: Sequence[Size]) -> list[int]:
    """For every picture of (height, width) the bucket that cuts the smallest share of it away.

    The kept share of a picture of aspect a in a bucket of aspect b is exp(-|log a - log b|).
    """
    edges = torch.tensor([math.log(width / height) for height, width in buckets])
    aspects = torch.tensor([math.log(width / height) for height, width in sizes])
    nearest: list[int] = []
    for block in aspects.split(65536):
        nearest += (block[:, None] - edges).abs().argmin(dim=1).tolist()
    return nearest
