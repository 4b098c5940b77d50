"""Intervals over pictures and seeds: both are drawn anew, so neither counts as more than it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "mean_interval", "ratio_interval"]

DRAWS = 2000

Values = NDArray[np.float64]
"""(seeds, pictures)."""


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % percentile interval."""

    value: float
    low: float
    high: float

    def text(self, form: str) -> str:
        """`1.2 [0.9, 1.5]`."""
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


def _interval(statistic: Callable[[Values], float], stacked: Values) -> Interval:
    """Of arrays (k, seeds, pictures) that share seeds and pictures."""
    rng = np.random.default_rng(0)
    _, seeds, pictures = stacked.shape
    found = []
    for _ in range(DRAWS):
        rows = rng.integers(0, seeds, seeds)
        columns = rng.integers(0, pictures, pictures)
        found.append(statistic(stacked[:, rows][:, :, columns]))
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(statistic(stacked), float(low), float(high))


def mean_interval(values: Values) -> Interval:
    """Of the mean over seeds and pictures."""
    return _interval(lambda x: float(x[0].mean()), values[None])


def ratio_interval(top: Values, bottom: Values) -> Interval:
    """Of mean(top) / mean(bottom), resampled together."""
    return _interval(lambda x: float(x[0].mean() / x[1].mean()), np.stack([top, bottom]))
