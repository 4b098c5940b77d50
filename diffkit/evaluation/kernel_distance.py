"""The kernel distance (squared maximum mean discrepancy) of two sets of features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffkit.errors import UserError

__all__ = [
    "KernelDistance",
    "SubsetDraw",
    "kernel_distance",
    "kernel_distance_weighted",
    "polynomial_kernel",
    "subset_draws",
]


class SubsetDraw(NamedTuple):
    """One subset: row indices (size,) int64 into the first and into the second set."""

    x: Tensor
    y: Tensor


class KernelDistance(NamedTuple):
    """Mean and standard deviation (of the population, not of the mean) over subsets."""

    mean: float
    std: float


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """k(x, y) = (x.y / d + 1)^3 for all pairs of rows: (n, d), (m, d) -> (n, m), float64."""
    inner = x.double() @ y.double().T / x.shape[1] + 1
    return inner * inner * inner


def subset_draws(n_x: int, n_y: int, subsets: int, size: int, seed: int) -> list[SubsetDraw]:
    """Which rows each subset holds, without repeats inside a subset: a function of the arguments.

    These are torch-fidelity's draws for `rng_seed=seed`, `kid_subsets=subsets` and
    `kid_subset_size=size`, so that a published KID can be compared digit by digit.

    Raises:
        UserError: a set has fewer than `size` rows.
    """
    if min(n_x, n_y) < size:
        raise UserError(
            f"a subset of {size} pictures cannot be drawn from sets of {n_x} and {n_y}; "
            f"take subsets of at most {min(n_x, n_y)}"
        )
    draw = np.random.RandomState(seed).choice
    return [
        SubsetDraw(
            torch.from_numpy(draw(n_x, size, replace=False)),
            torch.from_numpy(draw(n_y, size, replace=False)),
        )
        for _ in range(subsets)
    ]


def kernel_distance(x: Tensor, y: Tensor, draws: Sequence[SubsetDraw]) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy of x (n, d) and y (m, d) over subsets.

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    with `polynomial_kernel`, once a subset, then mean and standard deviation over the subsets. On
    Inception features the mean is the KID (Binkowski et al. 2018, "Demystifying MMD GANs"). Being
    unbiased it may be slightly negative for equal distributions.
    """
    values = []
    for draw in draws:
        rows_x, rows_y = x[draw.x.to(x.device)], y[draw.y.to(y.device)]
        ones = torch.ones(1, len(rows_x), dtype=torch.float64, device=x.device)
        values.append(kernel_distance_weighted(rows_x, rows_y, ones))
    stacked = torch.cat(values)
    return KernelDistance(float(stacked.mean()), float(stacked.std(correction=0)))


def kernel_distance_weighted(x: Tensor, y: Tensor, w_x: Tensor, block: int = 1024) -> Tensor:
    """The same U-statistic when row i of x (n, d) counts w_i times, as in a bootstrap resample.

        sum_{i != j} w_i w_j k(x_i, x_j) / (W^2 - sum_i w_i^2)
            + mean_{i != j} k(y_i, y_j) - 2 sum_{i, j} w_i k(x_i, y_j) / (W m),   W = sum_i w_i

    Pairs of one original with its own copy are left out: k(x_i, x_i) is far above the mean, and
    they would push every resample's distance up. y (m, d) is taken as it is.

    Args:
        w_x: (n,) or (R, n); many rows of weights share one pass over the kernel.
        block: rows and columns of the kernel that are held at a time; never (n, n).

    Returns:
        float64, () or (R,).
    """
    w = torch.atleast_2d(w_x.to(x.device, torch.float64))
    total = w.sum(1)
    within_x = _pair_sums(x, w, block) / (total * total - (w * w).sum(1))
    ones = torch.ones(1, len(y), dtype=torch.float64, device=y.device)
    within_y = _pair_sums(y, ones, block) / (len(y) * (len(y) - 1))
    across = torch.zeros_like(total)
    for start, end in _blocks(len(x), block):
        for other in y.split(block):
            across += w[:, start:end] @ polynomial_kernel(x[start:end], other).sum(1)
    distance = within_x + within_y - 2 * across / (total * len(y))
    return distance.reshape(w_x.shape[:-1])


def _pair_sums(x: Tensor, w: Tensor, block: int) -> Tensor:
    """sum_{i != j} w_i w_j k(x_i, x_j) for every row of w (R, n): (R,)."""
    sums = torch.zeros(len(w), dtype=torch.float64, device=x.device)
    for start, end in _blocks(len(x), block):
        diagonal = polynomial_kernel(x[start:end], x[start:end]).fill_diagonal_(0)
        sums += (w[:, start:end] @ diagonal * w[:, start:end]).sum(1)
        for left, right in _blocks(start, block):
            kernel = polynomial_kernel(x[start:end], x[left:right])
            sums += 2 * (w[:, start:end] @ kernel * w[:, left:right]).sum(1)
    return sums


def _blocks(n: int, block: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + block, n)) for start in range(0, n, block))
