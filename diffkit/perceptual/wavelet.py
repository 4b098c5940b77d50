"""Doubling and halving maps with the orthogonal sym6 wavelet, written as matrices.

With h the 12 low-pass taps scaled to sum 1, of even shifts orthogonal (sum_k h_k h_(k+2q) = 1/2 for
q = 0, else 0), one axis of a map x of length n is doubled by zero insertion and convolution and
halved by correlation:

    up_i = sum_j 2 h_(i + 5 - 2j) x_j              i = 0 .. 2n - 1
    down_i = sum_j h_(j - 2i - 1) y_j              i = 0 .. n - 1,  y of length 2 (n + MARGIN)

A matrix a side serves both axes: (up_h x up_w^T). What lies between may warp the doubled map
without aliasing; where it leaves out entries at the ends alone, halving gives x back exactly. sym6
is not symmetric, so mirrored maps come back slightly changed. The taps are the least asymmetric
ones of Daubechies ("Ten Lectures on Wavelets", 1992, table 6.3).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MARGIN", "SYM6", "double", "halve", "resamplers"]

SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
"""Decomposition low-pass taps, of sum sqrt(2)."""

MARGIN = 6
"""Entries of the undoubled map that `halve` needs beyond its result, both sides together."""


def double(n: int) -> Tensor:
    """The matrix (2n, n), float64, that doubles an axis; zeros lie beyond its ends."""
    tap = torch.arange(2 * n)[:, None] + 5 - 2 * torch.arange(n)
    return 2 * _taps(tap)


def halve(n: int) -> Tensor:
    """The matrix (n, 2 (n + MARGIN)), float64, that halves an axis with its margin to n."""
    tap = torch.arange(2 * (n + MARGIN)) - 2 * torch.arange(n)[:, None] - 1
    return _taps(tap)


@lru_cache(maxsize=64)
def resamplers(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What doubles a mirrored axis, (2 (3n - 2), n), and halves one to n, (n, 2 (n + MARGIN)).

    The first pads the axis with its mirror image by n - 1 on both sides and then doubles it. Both
    are kept for later calls: do not write to them.
    """
    with torch.inference_mode(False):  # kept ones may later be part of a graph
        index = torch.arange(n, dtype=torch.float64)[None]
        padded = F.pad(index, (n - 1, n - 1), mode="reflect")[0].round().long()
        doubled = double(3 * n - 2) @ F.one_hot(padded, n).to(torch.float64)
        return doubled.to(device, dtype), halve(n).to(device, dtype)


def _taps(index: Tensor) -> Tensor:
    """h at integer indices, 0 outside of 0..11; of sum 1."""
    taps = torch.tensor(SYM6, dtype=torch.float64)
    inside = (index >= 0) & (index < len(taps))
    return torch.where(inside, (taps / taps.sum())[index.clamp(0, len(taps) - 1)], 0.0)
