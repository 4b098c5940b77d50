"""Bootstrap intervals that resample whole groups of pictures.

Pictures of one prompt resemble each other, so they are one group and are drawn together. Each
resample draws as many groups as there are, with repeats, by address (seed, resample): the first
resamples are the same however many are asked for, and two models measured with one seed get the
same resamples, which is what makes a comparison paired.

A percentile interval is too narrow for few groups, by a factor sqrt((G - 1) / G) and by the normal
where Student's t is due; its tails are widened so that the interval of a mean of normals is right
(Hesterberg 2015, "What teachers should know about the bootstrap", section 3.2):
tail = Phi(sqrt(G / (G - 1)) t_{alpha / 2, G - 1}).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from diffkit import randomness
from diffkit.errors import UserError

__all__ = [
    "Interval",
    "group_weights",
    "mean_interval",
    "paired_interval",
    "pivotal_interval",
    "student_quantile",
    "widened_tails",
]

# Resamples drawn from one address: fewer generators to seed, still a few megabytes.
BLOCK = 64


@dataclass(frozen=True)
class Interval:
    """An interval that holds the true value with probability `level`, in (0, 1)."""

    low: float
    high: float
    level: float


def group_weights(groups: Tensor, resamples: int, seed: int) -> Tensor:
    """How often each picture counts in each resample: (R, n) int32, on the device of `groups`.

    For statistics of whole sets: compute the statistic under each row, then `pivotal_interval`.

    Args:
        groups: (n,) integers; pictures of equal number are drawn together.

    Raises:
        UserError: there is one group only.
    """
    inverse, count = _numbered(groups)
    counts = [block.int() for block in _group_counts(count, resamples, seed)]
    return torch.cat(counts).to(groups.device)[:, inverse]


def mean_interval(
    values: Tensor, groups: Tensor, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile interval of the mean over pictures of values (n,), groups (n,) resampled.

    Raises:
        UserError: there is one group only.
    """
    inverse, count = _numbered(groups)
    sums = values.new_zeros(count, dtype=torch.float64).index_add_(0, inverse, values.double())
    sizes = torch.bincount(inverse, minlength=count).double()
    means = []
    for counts in _group_counts(count, resamples, seed):
        weights = counts.to(values.device, torch.float64)
        means.append(weights @ sums / (weights @ sizes))
    low, high = _quantiles(torch.cat(means), count, level)
    return Interval(low, high, level)


def paired_interval(
    a: Tensor,
    b: Tensor,
    groups: Tensor,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Interval of mean(a) - mean(b), (n,) each: values of two models for the same n requests.

    What a request makes easy or hard for both models cancels in the difference. A model against
    itself gives exactly [0, 0].
    """
    difference = a.double() - b.double()
    return mean_interval(difference, groups, resamples=resamples, seed=seed, level=level)


def pivotal_interval(
    value: float, replicates: Tensor, group_count: int, level: float = 0.95
) -> Interval:
    """[2 theta - q_high, 2 theta - q_low]: the basic bootstrap interval (Davison & Hinkley 1997).

    For a number of a whole set. The repeats in a resample bias statistics such as the Frechet
    distance once more by about what finite n biases the value itself. The resamples' distance from
    the value, not their place, is used, so both biases are taken out; the interval may then lie
    beside the biased value. For the difference of two sets made for the same requests, take theta
    and the replicates as differences under the same resamples; a set against itself gives exactly
    [0, 0].

    Args:
        value: theta, the statistic of the pictures as they are.
        replicates: (R,) the statistic of each resample; NaN where it is undefined, as a kernel
            distance is of one picture drawn again and again. These are left out.
        group_count: how many groups were resampled.
    """
    low, high = _quantiles(replicates.double(), group_count, level)
    return Interval(2 * value - high, 2 * value - low, level)


def widened_tails(group_count: int, level: float = 0.95) -> float:
    """The share of resamples below (and above) a percentile interval of G >= 2 groups.

    Phi(sqrt(G / (G - 1)) t_{alpha / 2, G - 1}), which tends to alpha / 2 from below.
    """
    t = student_quantile(level, group_count - 1)
    return 0.5 * math.erfc(math.sqrt(group_count / (group_count - 1)) * t / math.sqrt(2))


def _numbered(groups: Tensor) -> tuple[Tensor, int]:
    """Groups numbered from 0, and how many there are."""
    found, inverse = torch.unique(groups, return_inverse=True)
    if len(found) < 2:
        raise UserError(
            "an interval needs pictures of at least two groups (prompts); there is one: "
            "how much groups differ cannot be seen in it"
        )
    return inverse, len(found)


def _group_counts(count: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each group is drawn: blocks of rows (up to BLOCK, G) int64, R rows in all."""
    for start in range(0, resamples, BLOCK):
        drawn = randomness.integers(0, count, (BLOCK, count), seed, "bootstrap", start)
        counts = torch.zeros(BLOCK, count, dtype=torch.int64)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn))
        yield counts[: resamples - start]


def _quantiles(replicates: Tensor, group_count: int, level: float) -> tuple[float, float]:
    """Lower and upper quantile of (R,) at the widened tails of `level`."""
    tail = widened_tails(group_count, level)
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64, device=replicates.device)
    low, high = torch.nanquantile(replicates, ends).tolist()
    return low, high


@cache
def student_quantile(level: float, freedom: int) -> float:
    """t with P(|T| <= t) = level for Student's T.

    With T = sqrt(freedom) tan(phi), the density of phi is cos(phi)^(freedom - 1).
    """
    phi = torch.linspace(0, math.pi / 2, 2**16 + 1, dtype=torch.float64)
    density = torch.cos(phi) ** (freedom - 1)
    below = torch.cumulative_trapezoid(density)
    target = level * below[-1]
    i = int(torch.searchsorted(below, target))
    share = (target - below[i - 1]) / (below[i] - below[i - 1])
    return math.sqrt(freedom) * math.tan(float(phi[i] + share * (phi[i + 1] - phi[i])))
