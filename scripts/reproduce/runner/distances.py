"""The kernel distance of samples that are made of a fixed list of captions."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkit.evaluation.kernel_distance import polynomial_kernel

__all__ = ["caption_distance"]


def caption_distance(x: Tensor, y: Tensor) -> float:
    """Squared maximum mean discrepancy of features x (P, n, d) and y (Q, m, d), without bias.

        mean k(x, x') + mean k(y, y') - 2 mean k(x, y)

    with x' another sample: of P captions in equal shares, n samples each, and likewise Q, m. Pairs
    of one caption count as often as they meet in independent draws, 1 / P of all. The plain
    statistic of all n P rows has too few of them, as no sample is paired with itself, and is too
    low by about (k of one caption - k of two) / (n P). Pictures that are no samples of captions are
    y (1, m, d). n, m >= 2. float64; below 0 by chance.
    """
    across = polynomial_kernel(x.flatten(0, 1), y.flatten(0, 1)).mean()
    return float(_within(x) + _within(y) - 2 * across)


def _within(x: Tensor) -> Tensor:
    """Mean of k over two samples of captions (P, n, d) that are drawn apart."""
    captions, each = x.shape[:2]
    sums = polynomial_kernel(x.flatten(0, 1), x.flatten(0, 1))
    blocks = sums.unflatten(1, (captions, each)).unflatten(0, (captions, each)).sum((1, 3))
    own = blocks.diagonal()
    alone = sums.diagonal().unflatten(0, (captions, each)).sum(1)
    same = ((own - alone) / (each * (each - 1))).sum()
    other = (blocks.sum() - own.sum()) / each**2
    return torch.as_tensor((same + other) / captions**2)
