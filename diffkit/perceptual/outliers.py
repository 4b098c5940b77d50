"""Which entries of a feature map are outliers of its channel, as the latent perceptual loss masks.

From the middle of the up path on, decoders of latent diffusion models have a few very large
activations (artefact patches), which would rule every statistic of their channel (Berrada et al.,
"Boosting Latent Diffusion with Perceptual Objectives", 2025, arXiv 2411.04873).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from diffkit.kernels.masked_distance import piece_size

__all__ = ["outlier_mask", "outlier_quantiles"]

SAMPLED = 4096
"""Entries of a map that the quantiles are read from; larger maps are sampled."""


@torch.no_grad()
def outlier_mask(target: Tensor, ratio: int) -> Tensor | None:
    """What to keep of feature maps (B, C, H, W): bool of the same shape, or None for everything.

        keep = (q_lo - 2 std <= f) and (f <= q_hi + 2 std)

    for every channel map by itself, with its quantiles (`outlier_quantiles`) and its unbiased
    standard deviation. The kept set is then dilated by c pixels, which brings specks back, and
    eroded by o, which leaves a rim around what stays out; nothing happens at the border of the map
    itself. (c, o) = (0, 1) at a ratio of 3 to 7, (1, 2) from 8 on. A constant map is kept whole; a
    set of outliers larger than 2 % of the map moves the quantile into itself and is kept.

    Arguments:
        target: the features of the clean latents. Read in >= float32; no gradient.
        ratio: their sides over those of the decoder's first features. No mask is made at ratios of
            1 and 2 nor for maps of fewer than 4 entries.

    Raises:
        ValueError: not four dimensions.
    """
    if target.ndim != 4:
        raise ValueError(f"feature maps are (B, C, H, W), not {tuple(target.shape)}")
    samples, channels = target.shape[:2]
    count = target.shape[-2] * target.shape[-1]
    if ratio <= 2 or count < 4:
        return None
    closing, opening = (0, 1) if ratio < 8 else (1, 2)
    keep = torch.empty(target.shape, dtype=torch.bool, device=target.device)
    spread = _spread if target.device.type == "cpu" else _pooled
    # A GPU is given large pieces: there the number of operations decides.
    size = 4 * piece_size(target.device)
    per_sample = max(1, size // (channels * count))
    per_row = min(channels, max(1, size // count))
    for b in range(0, samples, per_sample):
        for c in range(0, channels, per_row):
            place = (slice(b, b + per_sample), slice(c, c + per_row))
            maps = target[place].flatten(0, 1)
            inside = _within(maps.to(torch.promote_types(maps.dtype, torch.float32)))
            kept = ~spread(~spread(inside, closing), opening)
            keep[place] = kept.view_as(keep[place])
    return keep


def outlier_quantiles(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The k-th smallest entries of each map (M, H, W) at k = max(1, 0.02 N) and max(1, 0.98 N).

    N is H W, ranks are rounded down. Above 4096 entries both are read from 4096 of them on a
    Fibonacci lattice, the same for every map of a size: it covers rows and columns evenly, so no
    texture of the rows falls together with it. Returns two (M, 1, 1).
    """
    flat = maps.flatten(1)
    if flat.shape[1] > SAMPLED:
        flat = flat[:, _lattice(maps.shape[1], maps.shape[2], maps.device)]
    count = flat.shape[1]
    low, high = max(1, 2 * count // 100), max(1, 98 * count // 100)
    # The ends of the two tails: on a CPU a third faster than two calls of `kthvalue`.
    smallest = flat.topk(low, dim=1, largest=False, sorted=False).values
    largest = flat.topk(count - high + 1, dim=1, sorted=False).values
    return smallest.amax(1)[:, None, None], largest.amin(1)[:, None, None]


def _within(maps: Tensor) -> Tensor:
    low, high = outlier_quantiles(maps)
    margin = 2 * _std(maps)
    return (maps >= low - margin).logical_and_(maps <= high + margin)


def _std(maps: Tensor) -> Tensor:
    # Two plain passes: torch.std is several times slower on a CPU.
    centred = maps - maps.mean((1, 2), keepdim=True)
    count = maps.shape[1] * maps.shape[2]
    return (centred.square_().sum((1, 2), keepdim=True) / (count - 1)).sqrt_()


def _lattice(height: int, width: int, device: torch.device) -> Tensor:
    """Flat indices of `SAMPLED` places of a map, rows rising, columns by the golden ratio."""
    place = torch.arange(SAMPLED, dtype=torch.float64)
    rows = ((place + 0.5) * height / SAMPLED).long()
    columns = (width * (place * (math.sqrt(5) - 1) / 2).frac()).long()
    return (rows * width + columns).to(device)


def _spread(marks: Tensor, reach: int) -> Tensor:
    """Every place within `reach` of a mark along both axes, a square dilation."""
    for axis in (-1, -2):
        source, length = marks, marks.shape[axis]
        marks = source.clone() if reach else source
        for step in range(1, min(reach, length - 1) + 1):
            marks.narrow(axis, step, length - step).bitwise_or_(
                source.narrow(axis, 0, length - step)
            )
            marks.narrow(axis, 0, length - step).bitwise_or_(
                source.narrow(axis, step, length - step)
            )
    return marks


def _pooled(marks: Tensor, reach: int) -> Tensor:
    """The same in three operations, as suits a GPU: a dilation is a maximum over windows."""
    if not reach:
        return marks
    return functional.max_pool2d(marks.half(), 2 * reach + 1, 1, reach).bool()
