"""Distances between feature maps whose pixels are normalised over the channels, as LPIPS does.

Maps are (B, C, H, W); the arithmetic is as in `masked_distance`, strip by strip.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from diffkit.kernels.masked_distance import arithmetic, piece_size

__all__ = ["normed", "normed_slope"]


def normed(
    predicted: Tensor, target: Tensor, keep: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked means of ((p - t) w)^2 with w = 1 / (|t|_channels + eps), in >= float32.

    Returns:
        The means (B, C), w (B, 1, H, W), and the kept entries (B, C), 1 where there are none.
    """
    b, c, h, w = predicted.shape
    weight = torch.empty(b, 1, h, w, dtype=arithmetic(target), device=target.device)
    total = weight.new_zeros(b, c)
    for rows in _strips(predicted):
        p, t = (maps[:, :, rows].to(weight.dtype) for maps in (predicted, target))
        part = (t.square().sum(1, keepdim=True).sqrt_() + eps).reciprocal_()
        weight[:, :, rows] = part
        change = (p - t).mul_(part)
        if keep is not None:
            change.masked_fill_(~keep[:, :, rows], 0)
        total += change.square_().sum((2, 3))
    if keep is None:
        count = torch.full_like(total, h * w)
    else:
        count = keep.sum((2, 3), dtype=total.dtype).clamp_min_(1)
    return total / count, weight, count


def normed_slope(
    predicted: Tensor, target: Tensor, keep: Tensor | None, weight: Tensor, scale: Tensor
) -> Tensor:
    """m (p - t) w^2 scale in the prediction's dtype; `weight` w as from `normed`, scale (B, C)."""
    result = torch.empty_like(predicted)
    for rows in _strips(predicted):
        p, t = (maps[:, :, rows].to(weight.dtype) for maps in (predicted, target))
        change = (p - t).mul_(weight[:, :, rows].square()).mul_(scale[:, :, None, None])
        if keep is not None:
            change.masked_fill_(~keep[:, :, rows], 0)
        result[:, :, rows] = change
    return result


def _strips(maps: Tensor) -> Iterator[slice]:
    b, c, h, w = maps.shape
    step = max(1, piece_size(maps.device) // (b * c * w))
    yield from (slice(start, start + step) for start in range(0, h, step))
