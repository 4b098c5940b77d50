"""Moments and gradients of masked, spatially normalised distances between feature maps.

All maps are (B, C, H, W); a row is one channel of one sample. The arithmetic is float32 (float64
for float64 maps) whatever the dtype of the maps, and goes through them in pieces, so that no wider
copy of a whole map is made. Masks are factors: an infinite entry is not hidden by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffkit.kernels.choice import fused

__all__ = [
    "Combination",
    "Moments",
    "Which",
    "arithmetic",
    "combine",
    "mask_of",
    "moments",
    "piece_size",
]

Which = Literal["prediction", "target", "each", "joint"]
Place = tuple[slice, slice]


class Moments(NamedTuple):
    """Numbers of the kept entries of each row, (B, C); variances are biased.

    With d = predicted - target:

    Attributes:
        kept: number of kept entries; 1 where there are none, and then all else is 0.
        square: mean of d^2.
        mean_p, var_p: of the prediction. 0 if only the target was asked for.
        mean_t, var_t: of the target. 0 if only the prediction was asked for.
        var_d, cov_dt: of d, and of d and the target. 0 unless they were asked for ("joint").
    """

    kept: Tensor
    square: Tensor
    mean_p: Tensor
    var_p: Tensor
    mean_t: Tensor
    var_t: Tensor
    var_d: Tensor
    cov_dt: Tensor


class Combination(NamedTuple):
    """Numbers (B, C) of m (of_d (p - t - mean_d) + of_p (p - mean_p) + of_t (t - mean_t)).

    Without `of_t` it is m (of_d (p - t) + of_p (p - mean_p)).
    """

    of_d: Tensor
    of_p: Tensor
    of_t: Tensor | None
    mean_d: Tensor
    mean_p: Tensor
    mean_t: Tensor


def arithmetic(maps: Tensor) -> torch.dtype:
    """The dtype in which numbers of these maps are computed: float32 at least."""
    return torch.promote_types(maps.dtype, torch.float32)


def piece_size(device: torch.device) -> int:
    """Entries to work on at once: what stays in a CPU's cache, or what fills a GPU."""
    return 1 << 18 if device.type == "cpu" else 1 << 22


def moments(predicted: Tensor, target: Tensor, keep: Tensor | None, which: Which) -> Moments:
    """`Moments` of two maps (B, C, H, W) under a mask of the same shape, or of everything."""
    if fused(predicted):
        from diffkit.kernels import masked_triton

        return masked_triton.moments(predicted, target, keep, which)
    dtype, shape = arithmetic(predicted), predicted.shape[:2]
    found = torch.zeros(8, *shape, dtype=dtype, device=predicted.device)
    for place, p, t, m in _pieces(predicted, target, keep):
        numbers = found[:, place[0], place[1]]
        count = p.shape[-1] if m is None else m.sum(-1).clamp_min_(1)
        d = _masked(p - t, m)
        numbers[0], numbers[1] = count, _squares(d) / count
        if which != "target":
            numbers[2], p = _centred(p, m, count)
            numbers[3] = _squares(p) / count
        if which != "prediction":
            numbers[4], t = _centred(t, m, count)
            numbers[5] = _squares(t) / count
        if which == "joint":
            _, d = _centred(d, m, count)
            numbers[6] = _squares(d) / count
            numbers[7] = d.mul_(t).sum(-1) / count
    return Moments(*found)


def combine(
    predicted: Tensor, target: Tensor, keep: Tensor | None, coefficients: Combination
) -> Tensor:
    """The `Combination` of two maps, (B, C, H, W) in the prediction's dtype."""
    if fused(predicted):
        from diffkit.kernels import masked_triton

        return masked_triton.combine(predicted, target, keep, coefficients)
    result = torch.empty_like(predicted)
    c = coefficients
    for (rows, channels), p, t, m in _pieces(predicted, target, keep):

        def of(numbers: Tensor, rows: slice = rows, channels: slice = channels) -> Tensor:
            return numbers[rows, channels, None]

        total = p - t
        if c.of_t is not None:
            total.sub_(of(c.mean_d))
        total.mul_(of(c.of_d)).addcmul_(p - of(c.mean_p), of(c.of_p))
        if c.of_t is not None:
            total.addcmul_(t - of(c.mean_t), of(c.of_t))
        result[rows, channels] = _masked(total, m).view_as(result[rows, channels])
    return result


def _pieces(
    predicted: Tensor, target: Tensor, keep: Tensor | None
) -> Iterator[tuple[Place, Tensor, Tensor, Tensor | None]]:
    """Parts (b, c, N) of the maps and the mask in the dtype of the arithmetic.

    They may be views of the maps: not to be written to.
    """
    dtype, size = arithmetic(predicted), piece_size(predicted.device)
    samples, channels, height, width = predicted.shape
    per_sample = max(1, size // (channels * height * width))
    per_row = min(channels, max(1, size // (height * width)))
    for b in range(0, samples, per_sample):
        for c in range(0, channels, per_row):
            place = (slice(b, b + per_sample), slice(c, c + per_row))
            p, t = (maps[place].flatten(2).to(dtype) for maps in (predicted, target))
            m = None if keep is None else mask_of(keep[place].flatten(2), dtype)
            yield place, p, t, m


def mask_of(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """0 and 1; on a CPU bytes become floats six times as fast as booleans do."""
    return keep.view(torch.uint8).to(dtype)


def _masked(x: Tensor, m: Tensor | None) -> Tensor:
    """m x in the place of x, a temporary."""
    return x if m is None else x.mul_(m)


def _squares(x: Tensor) -> Tensor:
    # The sum of squares without a temporary as large as x.
    return torch.linalg.vector_norm(x, dim=-1).square_()


def _centred(x: Tensor, m: Tensor | None, count: Tensor | int) -> tuple[Tensor, Tensor]:
    """The mean over what is kept, and x minus it, 0 elsewhere."""
    mean = (x if m is None else x * m).sum(-1) / count
    return mean, _masked(x - mean[..., None], m)
