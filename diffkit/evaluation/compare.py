"""From values of one or two sets to numbers with intervals, and the interval of their difference.

Two sets made for the same requests are compared pair by pair: every resample draws the same
prompts of both, so that what is hard about a prompt cancels. Otherwise each set is resampled by
itself. Pictures of one prompt are drawn together; where all share one prompt, or there is none,
each picture stands for itself, and the interval says nothing about other prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffkit.evaluation.bootstrap import (
    Interval,
    group_weights,
    mean_interval,
    paired_interval,
    pivotal_interval,
)
from diffkit.evaluation.metrics.base import Statistic

__all__ = ["SET_RESAMPLES", "Comparison", "Estimate", "Pairing", "Resampling", "resampled_groups"]

SET_RESAMPLES = 200
"""Resamples of a number of a whole set, each as dear as the number itself, unless told."""

Pairing = Literal["noises", "names", "prompts", "none"]
"""What picture i of both sets shares: prompt and noise, its name, the prompt only, or nothing."""

# The second set's resamples where they must not be those of the first.
_APART = 1 << 32


@dataclass(frozen=True)
class Estimate:
    """A number and its interval."""

    value: float
    interval: Interval

    @property
    def outside(self) -> bool:
        """Whether the interval does not hold the number, as a pivotal one may."""
        return not self.interval.low <= self.value <= self.interval.high

    def to_json(self) -> dict[str, float]:
        """As reports hold it."""
        return {"value": self.value, "low": self.interval.low, "high": self.interval.high}


@dataclass(frozen=True)
class Comparison:
    """A metric's estimate of each set, by the set's name, and of their difference."""

    values: Mapping[str, Estimate]
    difference: Estimate | None
    resamples: int


def resampled_groups(groups: Tensor) -> Tensor:
    """What is drawn together: the given groups (n,), or single pictures where there is only one."""
    return groups if len(torch.unique(groups)) > 1 else torch.arange(len(groups))


@dataclass(frozen=True)
class Resampling:
    """How intervals are made.

    Attributes:
        groups: by set name, (n,) integers of the pictures that are drawn together.
        pairing: of the two sets; not read for one.
        seed, level: of the resamples and of the intervals.
        resamples: as asked for; None is 1000 for means and `SET_RESAMPLES` for other statistics.
    """

    groups: Mapping[str, Tensor]
    pairing: Pairing
    seed: int
    level: float
    resamples: int | None

    def of_values(self, values: Mapping[str, Tensor]) -> Comparison:
        """Means of one value a picture, (n,) by set name."""
        return self._of_means(values, self.groups, paired=self.pairing != "none")

    def of_statistics(self, statistics: Mapping[str, Statistic]) -> Comparison:
        """Numbers of whole sets, by set name."""
        first = next(iter(statistics.values()))
        if first.of_weights is not None:
            return self._of_weights(statistics)
        parts = {name: found.parts for name, found in statistics.items() if found.parts is not None}
        if first.unit == "pictures":
            return self.of_values(parts)
        # The pictures of the reference are the same for both sets whatever these are.
        paired = self.pairing != "none" or first.unit == "reference"
        units = {name: torch.arange(len(part)) for name, part in parts.items()}
        return self._of_means(parts, units, paired)

    def _of_means(
        self, values: Mapping[str, Tensor], groups: Mapping[str, Tensor], paired: bool
    ) -> Comparison:
        count = self.resamples or 1000
        estimates = {}
        for name, given in values.items():
            interval = mean_interval(
                given, groups[name], resamples=count, seed=self.seed, level=self.level
            )
            estimates[name] = Estimate(float(given.double().mean()), interval)
        if len(values) == 1:
            return Comparison(estimates, None, count)
        value = _difference(estimates)
        (first, a), (second, b) = values.items()
        if paired:
            interval = paired_interval(
                a, b, groups[first], resamples=count, seed=self.seed, level=self.level
            )
            return Comparison(estimates, Estimate(value, interval), count)
        means = [
            _resampled_means(values[name].double(), group_weights(groups[name], count, seed))
            for name, seed in self._seeds()
        ]
        apart = self._pivotal(value, means[0] - means[1], groups)
        return Comparison(estimates, apart, count)

    def _of_weights(self, statistics: Mapping[str, Statistic]) -> Comparison:
        count = self.resamples or SET_RESAMPLES
        estimates, replicates = {}, {}
        for name, seed in self._seeds():
            if name not in statistics:
                continue
            found, groups = statistics[name], self.groups[name]
            replicates[name] = _replicates(found.of_weights, groups, count, seed)
            number = len(torch.unique(groups))
            interval = pivotal_interval(found.value, replicates[name], number, self.level)
            estimates[name] = Estimate(found.value, interval)
        if len(estimates) == 1:
            return Comparison(estimates, None, count)
        a, b = replicates.values()
        difference = self._pivotal(_difference(estimates), a - b, self.groups)
        return Comparison(estimates, difference, count)

    def _seeds(self) -> list[tuple[str, int]]:
        """Equal seeds give both sets the same resamples, which is what pairs them."""
        apart = 0 if self.pairing != "none" else _APART
        return [(name, self.seed + i * apart) for i, name in enumerate(self.groups)]

    def _pivotal(self, value: float, replicates: Tensor, groups: Mapping[str, Tensor]) -> Estimate:
        fewest = min(len(torch.unique(given)) for given in groups.values())
        return Estimate(value, pivotal_interval(value, replicates, fewest, self.level))


def _difference(estimates: Mapping[str, Estimate]) -> float:
    a, b = estimates.values()
    return a.value - b.value


def _resampled_means(values: Tensor, weights: Tensor) -> Tensor:
    """(n,), (R, n) whole numbers -> (R,); row by row, as float64 weights would fill the memory."""
    return torch.stack([row.double() @ values / row.sum() for row in weights])


def _replicates(
    statistic: Callable[[Tensor], Tensor] | None, groups: Tensor, count: int, seed: int
) -> Tensor:
    assert statistic is not None
    return statistic(group_weights(groups, count, seed))
