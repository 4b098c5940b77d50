"""Metrics of whole sets, from the features of all pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkit.evaluation.diversity import within_group_distance
from diffkit.evaluation.frechet import frechet_distance
from diffkit.evaluation.kernel_distance import (
    kernel_distance,
    kernel_distance_weighted,
    subset_draws,
)
from diffkit.evaluation.metrics.base import SetData, SetMetric, Situation, Statistic
from diffkit.evaluation.reference import as_tensor
from diffkit.evaluation.resampled import resampled_frechet, resampled_vendi

__all__ = [
    "COVERAGE",
    "DENSITY",
    "DIVERSITY",
    "FRECHET",
    "KERNEL",
    "PRECISION",
    "RECALL",
    "VENDI",
]

SUBSETS, SUBSET_SIZE = 100, 1000
"""Of the kernel distance, those of torch-fidelity; smaller sets give smaller subsets."""
NEIGHBOURS = 5

_REAL = frozenset({"features", "reference"})


def frechet(data: SetData) -> Statistic:
    """Frechet distance of the set and the reference."""
    real = data.real.moments
    resampled, note = resampled_frechet(data.rows, data.moments, real)
    return Statistic(frechet_distance(data.moments, real), of_weights=resampled, note=note)


def kernel(data: SetData) -> Statistic:
    """Kernel distance of the set and the reference: mean over subsets, as torch-fidelity's KID.

    The subsets' draws are noise that resampling would not show, so the interval is that of the
    statistic on all pictures, moved to the value.
    """
    real = as_tensor(data.real.features)
    size = min(SUBSET_SIZE, len(data.rows), len(real))
    draws = subset_draws(len(data.rows), len(real), SUBSETS, size, data.seed)
    value = kernel_distance(data.rows, real, draws).mean

    def resampled(weights: Tensor) -> Tensor:
        once = torch.ones(1, len(data.rows), dtype=weights.dtype)
        values = kernel_distance_weighted(data.rows, real, torch.cat([once, weights]))
        return value + values[1:] - values[0]

    return Statistic(value, of_weights=resampled, note=f"mean of {SUBSETS} subsets of {size}")


def precision(data: SetData) -> Statistic:
    """Share of pictures inside the neighbourhoods of the real ones."""
    return Statistic.mean(data.neighbours.precision, "pictures", _NEAREST)


def density(data: SetData) -> Statistic:
    """Mean number of real neighbourhoods that hold a picture, by k."""
    return Statistic.mean(data.neighbours.density, "pictures", _NEAREST)


def recall(data: SetData) -> Statistic:
    """Share of real pictures inside the neighbourhoods of the set's."""
    return Statistic.mean(data.neighbours.recall, "reference", _OVER_REAL)


def coverage(data: SetData) -> Statistic:
    """Share of real pictures whose neighbourhood holds a picture of the set."""
    return Statistic.mean(data.neighbours.coverage, "reference", _OVER_REAL)


def diversity(data: SetData) -> Statistic:
    """Mean distance between the pictures of one prompt."""
    parts = within_group_distance(data.rows, data.groups)
    return Statistic.mean(parts, "groups", "mean over prompts with two pictures or more")


def vendi(data: SetData) -> Statistic:
    """Effective number of different pictures."""
    value, resampled, note = resampled_vendi(data.rows)
    return Statistic(value, of_weights=resampled, note=note)


_NEAREST = f"{NEIGHBOURS} nearest neighbours"
_OVER_REAL = f"{_NEAREST}; interval over the real pictures, the drawn ones held fixed"


def _too_few(situation: Situation) -> str | None:
    least = min(len(situation.groups), situation.n_reference)
    if least <= NEIGHBOURS:
        return f"{NEIGHBOURS} neighbours need more than {NEIGHBOURS} pictures in each set"
    return None


def _too_few_real(situation: Situation) -> str | None:
    if situation.n_reference < 2:
        return "the reference has one picture; two or more are needed"
    return None


def _no_repeats(situation: Situation) -> str | None:
    repeated = int((torch.unique(situation.groups, return_counts=True)[1] > 1).sum())
    if repeated == 0:
        return "every prompt has one picture; two of a prompt are needed"
    if repeated == 1:
        return "one prompt only has two pictures or more; an interval needs two such prompts"
    return None


FRECHET = SetMetric(
    "frechet",
    "Fréchet distance",
    "lower",
    _REAL,
    "How far the set as a whole is from the real pictures; it falls with the number of pictures, "
    "so only equal numbers compare.",
    inception_label="FID",
    refuse=_too_few_real,
    run=frechet,
)
KERNEL = SetMetric(
    "kernel",
    "kernel distance",
    "lower",
    _REAL,
    "How far the set as a whole is from the real pictures, without a bias for small sets.",
    inception_label="KID",
    refuse=_too_few_real,
    run=kernel,
)
PRECISION = SetMetric(
    "precision",
    "precision",
    "higher",
    _REAL,
    "Share of pictures that lie among the real ones: quality.",
    refuse=_too_few,
    run=precision,
)
RECALL = SetMetric(
    "recall",
    "recall",
    "higher",
    _REAL,
    "Share of real pictures that lie among the set's: variety.",
    refuse=_too_few,
    run=recall,
)
DENSITY = SetMetric(
    "density",
    "density",
    "higher",
    _REAL,
    "How deep the pictures lie among the real ones; precision that outliers cannot raise.",
    refuse=_too_few,
    run=density,
)
COVERAGE = SetMetric(
    "coverage",
    "coverage",
    "higher",
    _REAL,
    "Share of real pictures that have one of the set nearby; recall that outliers cannot raise.",
    refuse=_too_few,
    run=coverage,
)
DIVERSITY = SetMetric(
    "diversity",
    "distance within a prompt",
    None,
    frozenset({"features", "prompts"}),
    "How different the pictures of one prompt are from each other. More is better only where the "
    "pictures are as good: noise and faults raise it too.",
    refuse=_no_repeats,
    run=diversity,
)
VENDI = SetMetric(
    "vendi",
    "Vendi score",
    None,
    frozenset({"features"}),
    "The effective number of different pictures in the set, between 1 and their number. More is "
    "better only where the pictures are as good.",
    run=vendi,
)
