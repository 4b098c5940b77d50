"""Intervals on simulated data: how often they hold the truth, and what must be exact.

With S simulations an observed coverage has the standard error sqrt(p (1 - p) / S): 0.011 at 0.95
and S = 400. The bounds below leave three of them.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from diffkit import randomness
from diffkit.errors import UserError
from diffkit.evaluation.bootstrap import (
    Interval,
    group_weights,
    mean_interval,
    paired_interval,
    pivotal_interval,
    student_quantile,
)
from diffkit.evaluation.frechet import frechet_distance
from diffkit.evaluation.moments import Moments

PER_GROUP = 4


def grouped(simulation: int, groups: int, correlation: float) -> tuple[Tensor, Tensor]:
    """Values of mean 2 and variance 1 whose correlation inside a group is given."""
    shared = randomness.normal((groups, 1), "bootstrap test", simulation, "shared")
    own = randomness.normal((groups, PER_GROUP), "bootstrap test", simulation, "own")
    values = 2 + math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
    return values.flatten(), torch.arange(groups).repeat_interleave(PER_GROUP)


def holds(interval: Interval, truth: float) -> bool:
    return interval.low <= truth <= interval.high


def width(interval: Interval) -> float:
    return interval.high - interval.low


@pytest.mark.parametrize(("groups", "level"), [(6, 0.95), (40, 0.95), (40, 0.8)])
def test_grouped_intervals_hold_the_truth_as_often_as_they_say(groups: int, level: float) -> None:
    count = 400
    found = [
        mean_interval(*grouped(i, groups, 0.6), resamples=300, seed=i, level=level)
        for i in range(count)
    ]
    coverage = sum(holds(interval, 2) for interval in found) / count
    assert coverage == pytest.approx(level, abs=3 * math.sqrt(level * (1 - level) / count))


def test_single_pictures_as_groups_fail_where_groups_correlate() -> None:
    """With correlation 0.6 in groups of 4 the true error is sqrt(1 + 3 * 0.6) = 1.67 times."""
    ratios, held = [], 0
    for i in range(100):
        values, groups = grouped(i, 40, 0.6)
        naive = mean_interval(values, torch.arange(len(values)), resamples=300, seed=i)
        ratios.append(width(mean_interval(values, groups, resamples=300, seed=i)) / width(naive))
        held += holds(naive, 2)
    assert sum(ratios) / 100 == pytest.approx(math.sqrt(2.8), rel=0.05)
    assert held < 85


def test_a_model_against_itself_is_exactly_zero() -> None:
    values, groups = grouped(0, 12, 0.5)
    assert paired_interval(values, values.clone(), groups) == Interval(0, 0, 0.95)
    replicates = group_weights(groups, 50, seed=1).double() @ values.double()
    assert pivotal_interval(0.0, replicates - replicates, 12) == Interval(0, 0, 0.95)


def test_pairing_takes_out_what_a_request_makes_hard() -> None:
    values, groups = grouped(0, 40, 0.9)
    better = values + 0.2 + 0.05 * randomness.normal((len(values),), "change")
    difference = paired_interval(better, values, groups)
    assert 0 < difference.low < 0.2 < difference.high
    assert width(difference) < 0.1 * width(mean_interval(values, groups))
    flipped = paired_interval(values, better, groups)
    assert (flipped.low, flipped.high) == pytest.approx((-difference.high, -difference.low))


def test_known_width_of_many_normals() -> None:
    """2 * 1.96 / sqrt(n), around the mean."""
    values = randomness.normal((4000,), "normals")
    interval = mean_interval(values, torch.arange(4000), resamples=2000)
    assert width(interval) == pytest.approx(2 * 1.96 / math.sqrt(4000), rel=0.08)
    assert (interval.low + interval.high) / 2 == pytest.approx(float(values.mean()), abs=2e-3)


def test_uneven_groups_weigh_by_their_pictures() -> None:
    """The mean is over pictures; two groups of 3 and 1 give the resampled means 0, 3/4... and 1.

    The numbers of the groups are names, not places.
    """
    values, groups = torch.tensor([0.0, 0, 0, 1]), torch.tensor([70, 70, 70, -5])
    interval = mean_interval(values, groups)
    assert (interval.low, interval.high) == (0, 1)
    weights = group_weights(groups, 200, seed=0)
    assert {tuple(row) for row in weights.tolist()} == {(2, 2, 2, 0), (1, 1, 1, 1), (0, 0, 0, 2)}


def test_weights_draw_whole_groups_and_as_many_as_there_are() -> None:
    groups = torch.tensor([1, 0, 1, 2, 0, 1])
    weights = group_weights(groups, 100, seed=3)
    assert weights.shape == (100, 6) and weights.dtype == torch.int32
    assert torch.equal(weights[:, 0], weights[:, 2]) and torch.equal(weights[:, 1], weights[:, 4])
    assert bool((weights[:, 0] + weights[:, 1] + weights[:, 3] == 3).all())
    assert float(weights.double().mean()) == pytest.approx(1, abs=0.15)


def test_draws_are_addressed() -> None:
    """A function of the seed; the first resamples do not depend on how many follow."""
    groups = torch.arange(9)
    many = group_weights(groups, 150, seed=5)
    assert torch.equal(many[:70], group_weights(groups, 70, seed=5))
    assert not torch.equal(many, group_weights(groups, 150, seed=6))
    assert len({tuple(row) for row in many.tolist()}) == 150


def test_mean_interval_uses_those_weights() -> None:
    values, groups = grouped(1, 8, 0.3)
    weights = group_weights(groups, 90, seed=2).double()
    means = weights @ values.double() / weights.sum(1)
    interval = mean_interval(values, groups, resamples=90, seed=2)
    pivot = pivotal_interval(float(values.double().mean()), means, 8)
    mirrored = 2 * float(values.double().mean())
    assert (interval.low, interval.high) == pytest.approx(
        (mirrored - pivot.high, mirrored - pivot.low)
    )


@pytest.mark.parametrize("freedom", [1, 2, 5, 30, 1000, 20000])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def teststudent_quantile(freedom: int, level: float) -> None:
    assert student_quantile(level, freedom) == pytest.approx(
        stats.t.ppf((1 + level) / 2, freedom), rel=1e-5
    )


def test_one_group_has_no_interval() -> None:
    with pytest.raises(UserError, match="at least two groups"):
        mean_interval(torch.ones(4), torch.zeros(4, dtype=torch.int64))


def test_pivotal_interval_of_the_frechet_distance_holds_the_truth() -> None:
    """N(0, I) and N(1/2, 9/4 I) in 16 dimensions: distance 16 (1/4 + 1/4) = 8.

    60 samples stand for the second one. Their distance is 2.6 too high on average, their resamples'
    once more, so the percentiles of the resamples lie beside the truth (measured: they hold it in
    none of 60 simulations, the pivotal interval in 58).
    """
    width, count, simulations = 16, 60, 60
    eye = torch.eye(width).double()
    truth = Moments(10**9, torch.zeros(width).double(), eye)
    other = Moments(10**9, torch.full((width,), 0.5).double(), 2.25 * eye)
    exact = frechet_distance(other, truth)
    assert exact == pytest.approx(8, rel=1e-12)
    pivotal = percentile = 0
    for i in range(simulations):
        x = 0.5 + 1.5 * randomness.normal((count, width), "frechet", i)
        weights = group_weights(torch.arange(count), 80, seed=i)
        replicates = torch.tensor([frechet_distance(Moments.of(x, w), truth) for w in weights])
        value = frechet_distance(Moments.of(x), truth)
        interval = pivotal_interval(value, replicates, count)
        pivotal += holds(interval, exact)
        mirrored = Interval(2 * value - interval.high, 2 * value - interval.low, 0.95)
        percentile += holds(mirrored, exact)
    print(f"of {simulations}: pivotal {pivotal}, percentile {percentile}")
    assert pivotal >= 0.9 * simulations
    assert percentile <= 0.1 * simulations


def test_resamples_in_which_a_statistic_is_undefined_are_left_out() -> None:
    """A kernel distance of one picture drawn n times is 0 / 0; NaN is no JSON."""
    replicates = torch.linspace(0, 2, 101)
    holes = torch.cat([replicates, torch.tensor([torch.nan] * 7)])
    assert pivotal_interval(1.0, holes, 3) == pivotal_interval(1.0, replicates, 3)
