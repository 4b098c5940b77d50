"""Paired differences over seeds and their t-interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

__all__ = ["Difference", "paired_difference"]


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and its two-sided interval.

    `low` and `high` are infinite for a single pair, which says nothing about the spread.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def paired_difference(
    arm: Sequence[float], baseline: Sequence[float], level: float = 0.95
) -> Difference:
    """mean(d) -+ t(n - 1) sd(d) / sqrt(n) of d_i = arm_i - baseline_i, i over the n seeds.

    It takes the differences as independent and normal; with three seeds t is 4.30, so the interval
    is wide on purpose.
    """
    values = np.asarray(arm, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    n, mean = len(values), float(values.mean())
    half = math.inf
    if n > 1:
        half = float(student.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return Difference(mean, mean - half, mean + half, tuple(values.tolist()))
