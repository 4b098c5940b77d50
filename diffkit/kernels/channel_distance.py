"""Distances between feature maps whose pixels are normalised over the channels, as LPIPS does.

Maps are (B, C, H, W); the arithmetic is as in `masked_distance`, strip by strip.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffkit.kernels.choice import fused
from diffkit.kernels.masked_distance import arithmetic, mask_of, piece_size

__all__ = ["Normed", "normed", "normed_slope"]


class Normed(NamedTuple):
    """Masked means of (p / n_p - t / n_t)^2, and what its gradient needs.

    Attributes:
        rows: the means (B, C), 0 where nothing is kept.
        kept: the kept entries (B, C); 1 where there are none.
        norm_p: |p| over the channels (B, 1, H, W), n_p = |p| + eps; None where n_p = n_t.
        norm_t: |t| likewise, n_t = |t| + eps.
    """

    rows: Tensor
    kept: Tensor
    norm_p: Tensor | None
    norm_t: Tensor


def normed(predicted: Tensor, target: Tensor, keep: Tensor | None, eps: float, own: bool) -> Normed:
    """`Normed`: each map by its own norms (LPIPS's form), or both by the target's."""
    if fused(predicted):
        from diffkit.kernels import channel_triton

        return channel_triton.normed(predicted, target, keep, eps, own)
    b, c, h, w = predicted.shape
    norm_t = torch.empty(b, 1, h, w, dtype=arithmetic(target), device=target.device)
    norm_p = torch.empty_like(norm_t) if own else None
    total = norm_t.new_zeros(b, c)
    for rows in _strips(predicted):
        p, t = (maps[:, :, rows].to(norm_t.dtype) for maps in (predicted, target))
        norm_t[:, :, rows] = _norm(t)
        if norm_p is None:
            change = (p - t).div_(norm_t[:, :, rows] + eps)
        else:
            norm_p[:, :, rows] = _norm(p)
            change = (p / (norm_p[:, :, rows] + eps)).sub_(t / (norm_t[:, :, rows] + eps))
        total += _masked(change, keep, rows).square_().sum((2, 3))
    if keep is None:
        kept = torch.full_like(total, h * w)
    else:
        kept = keep.view(torch.uint8).sum((2, 3)).to(total.dtype).clamp_min_(1)
    return Normed(total / kept, kept, norm_p, norm_t)


def normed_slope(
    predicted: Tensor,
    target: Tensor,
    keep: Tensor | None,
    norms: tuple[Tensor | None, Tensor],
    scale: Tensor,
    eps: float,
) -> Tensor:
    """Gradient of sum(scale rows) for the prediction, in its dtype; 0 for pixels that are all zero.

    With g = 2 m scale / kept (p / n_p - t / n_t) it is g / n_p, and where n_p is the prediction's
    own norm also minus p (g . p) / (|p| n_p^2), the sum over the channels.

    Arguments:
        norms: `norm_p` and `norm_t` as from `normed`.
        scale: 2 scale / kept, (B, C).
    """
    if fused(predicted):
        from diffkit.kernels import channel_triton

        return channel_triton.normed_slope(predicted, target, keep, norms, scale, eps)
    norm_p, norm_t = norms
    result = torch.empty_like(predicted)
    for rows in _strips(predicted):
        p, t = (maps[:, :, rows].to(norm_t.dtype) for maps in (predicted, target))
        n_t = norm_t[:, :, rows] + eps
        if norm_p is None:
            slope = (p - t).mul_(scale[:, :, None, None]).div_(n_t.square())
        else:
            length = norm_p[:, :, rows]
            n_p = length + eps
            slope = (p / n_p).sub_(t / n_t).mul_(scale[:, :, None, None])
            slope = _masked(slope, keep, rows)
            along = (slope * p).sum(1, keepdim=True)
            slope.div_(n_p).addcmul_(p, -along / (length * n_p.square()))
            slope.masked_fill_(length == 0, 0)
        result[:, :, rows] = _masked(slope, keep, rows) if norm_p is None else slope
    return result


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(1, keepdim=True).sqrt_()


def _masked(x: Tensor, keep: Tensor | None, rows: slice) -> Tensor:
    """m x in the place of x, a temporary."""
    return x if keep is None else x.mul_(mask_of(keep[:, :, rows], x.dtype))


def _strips(maps: Tensor) -> Iterator[slice]:
    b, c, h, w = maps.shape
    step = max(1, piece_size(maps.device) // (b * c * w))
    yield from (slice(start, start + step) for start in range(0, h, step))
