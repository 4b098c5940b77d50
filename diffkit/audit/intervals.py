"""Intervals over pictures and seeds, both drawn anew, so that neither counts as more than it is.

A resample draws as many seeds and as many pictures as there are, with repeats (Owen 2007, "The
pigeonhole bootstrap"), by address, so that all numbers of one set of values share their resamples:
an effect and its control are compared on the same draws. Every statistic here is a function of
means, and the mean of a resample is w_s^T X w_p.

What differs between pictures is seen in the pictures alone, however many seeds there are, so tails
are widened (see `diffkit.evaluation.bootstrap`) as for f + 1 groups, f being the degrees of freedom
of the two variances together (Welch 1947, Satterthwaite 1946):

    f = (v_s + v_p)^2 / (v_s^2 / (seeds - 1) + v_p^2 / (pictures - 1))

with v_s and v_p the variances of the statistic when one axis alone is drawn. No resample lies
beyond the most extreme picture, so with fewer than 8 such groups the interval is Student's with the
resamples' variance instead of percentiles. Two pictures say too little of others, so they get no
interval. With one picture this is the interval over its seeds, and says nothing about other
pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffkit import randomness
from diffkit.evaluation.bootstrap import student_quantile, widened_tails

__all__ = [
    "CLEAR_RATIO",
    "FEWEST_PICTURES",
    "LEVEL",
    "RESAMPLES",
    "Interval",
    "difference",
    "is_clear",
    "mean",
    "of_means",
    "ratio",
]

LEVEL = 0.95
RESAMPLES = 2000
FEWEST_PICTURES = 3
"""Of two or more pictures, so many are needed for an interval."""

CLEAR_RATIO = 1.5
"""An effect is clear of its control only from so many times its size."""

_PERCENTILES_FROM = 8
"""Groups from which percentiles of resamples reach far enough."""

Statistic = Callable[[Tensor], Tensor]
"""Means (R, k) of k sets of values in R resamples -> the statistic (R,)."""


@dataclass(frozen=True)
class Interval:
    """A value and its percentile interval; all NaN where it is undefined."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside; False where the value is undefined."""
        return self.low > 0 or self.high < 0

    def text(self, form: str) -> str:
        """`1.2 [0.9, 1.5]`."""
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def to_json(self) -> dict[str, float | None]:
        """As reports hold it; None for what is undefined or infinite."""
        found = {"value": self.value, "low": self.low, "high": self.high}
        return {k: v if -float("inf") < v < float("inf") else None for k, v in found.items()}


def of_means(statistic: Statistic, *values: Any, resamples: int = RESAMPLES) -> Interval:
    """A function of the means of k sets of values that share their seeds and pictures.

    Arguments:
        statistic: see `Statistic`.
        values: k arrays (seeds, pictures) of one shape.
        resamples: R. With one value only there is nothing to draw, and two pictures are too few:
            the interval is NaN.
    """
    stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])
    _, seeds, pictures = stacked.shape
    value = float(statistic(torch.stack([one.mean() for one in stacked])[None]))
    if seeds * pictures < 2 or 1 < pictures < FEWEST_PICTURES:
        return Interval(value, float("nan"), float("nan"))
    rows, columns = (_shares(n, resamples, axis) for axis, n in enumerate((seeds, pictures)))
    even = [torch.full((1, n), 1 / n, dtype=torch.float64) for n in (seeds, pictures)]

    def drawn(rows: Tensor, columns: Tensor) -> Tensor:
        # one set at a time, so that equal values have equal means to the last bit
        return statistic(torch.stack([((rows @ one) * columns).sum(1) for one in stacked], 1))

    alone = [_variance(drawn(rows, even[1])), _variance(drawn(even[0], columns))]
    both = drawn(rows, columns)
    freedom = _freedom(alone, (seeds, pictures))
    if freedom + 1 < _PERCENTILES_FROM:
        corrected = [v * n / (n - 1) for v, n in zip(alone, (seeds, pictures)) if n > 1]
        half = student_quantile(LEVEL, freedom) * sum(corrected) ** 0.5
        return Interval(value, value - half, value + half)
    tail = widened_tails(freedom + 1, LEVEL)
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.nanquantile(both, ends).tolist()
    return Interval(value, low, high)


def _variance(found: Tensor) -> float:
    """Of the resamples in which the statistic is defined."""
    defined = found[found.isfinite()]
    return float(defined.var()) if len(defined) > 1 and not _constant(defined) else 0.0


def _constant(found: Tensor) -> bool:
    return bool((found == found[0]).all())


def _freedom(alone: Sequence[float], counts: Sequence[int]) -> int:
    """Welch's degrees of freedom, rounded down; of the smaller axis where nothing varies."""
    known = [(v, n - 1) for v, n in zip(alone, counts, strict=True) if n > 1]
    below = sum(v * v / n for v, n in known)
    if below == 0:
        return min(n for _, n in known)
    return max(1, int(sum(v for v, _ in known) ** 2 / below))


def mean(values: Any, resamples: int = RESAMPLES) -> Interval:
    """Of the mean over seeds and pictures, values (seeds, pictures); not below 0 where none is."""
    return _at_least_zero(of_means(lambda m: m[:, 0], values, resamples=resamples), values)


def difference(a: Any, b: Any, resamples: int = RESAMPLES) -> Interval:
    """Of mean(a) - mean(b), resampled together; a set minus itself is exactly [0, 0]."""
    return of_means(
        lambda m: m[:, 0],
        torch.as_tensor(a, dtype=torch.float64) - torch.as_tensor(b, dtype=torch.float64),
        resamples=resamples,
    )


def ratio(top: Any, bottom: Any, resamples: int = RESAMPLES) -> Interval:
    """Of mean(top) / mean(bottom), resampled together; NaN where mean(bottom) is 0.

    Not below 0 where no value is.
    """

    def statistic(m: Tensor) -> Tensor:
        return torch.where(m[:, 1] == 0, torch.nan, m[:, 0] / m[:, 1])

    found = of_means(statistic, top, bottom, resamples=resamples)
    return _at_least_zero(found, top, bottom)


def _at_least_zero(found: Interval, *values: Any) -> Interval:
    """Student's interval of distances may reach below 0, where they cannot lie."""
    if found.low < 0 and all(bool((torch.as_tensor(v) >= 0).all()) for v in values):
        return Interval(found.value, 0.0, found.high)
    return found


def is_clear(effect: Any, control: Any, resamples: int = RESAMPLES) -> bool:
    """Whether an effect is clear of that of random noise, both (seeds, pictures).

    The intervals of the effect and of their difference exclude zero, and |mean effect| is at
    least 1.5 times |mean control|. Effects that are differences of scores have signs, and may be
    unlike the control's without being unlike nothing; distances are never negative.
    """
    a, b = (float(torch.as_tensor(v, dtype=torch.float64).mean()) for v in (effect, control))
    far = abs(a) > 0 and abs(a) >= CLEAR_RATIO * abs(b)
    intervals = mean(effect, resamples), difference(effect, control, resamples)
    return far and all(interval.excludes_zero for interval in intervals)


def _shares(count: int, resamples: int, axis: int) -> Tensor:
    """Weights (R, count) of each resample, summing to 1; all equal for a single row."""
    drawn = randomness.integers(0, count, (resamples, count), "audit", "bootstrap", axis)
    counts = torch.zeros(resamples, count, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return counts / count
