"""The arithmetic of ratios and intervals, on numbers that can be checked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffkit.audit.intervals import Interval, difference, is_clear, mean, ratio
from diffkit.evaluation.bootstrap import widened_tails
from diffkit.randomness import normal


def test_a_constant_has_no_width() -> None:
    found = ratio(np.full((3, 4), 6.0), np.full((3, 4), 2.0))
    assert (found.value, found.low, found.high) == (3, 3, 3)


def test_one_ratio_of_means_and_not_a_mean_of_ratios() -> None:
    """(1 + 9) / (1 + 3) = 2.5, while the mean of 1 / 1 and 9 / 3 is 2."""
    assert ratio([[1.0, 9.0]], [[1.0, 3.0]]).value == 2.5


def test_what_is_left_of_everything_is_exactly_everything() -> None:
    values = normal((7, 5), "values").abs()
    found = ratio(values, values.clone())
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    same = difference(values, values)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0) and not same.excludes_zero


def test_seeds_are_resampled_too() -> None:
    """Pictures agree and seeds do not: the interval must be as wide as the seeds lie apart."""
    values = np.repeat(np.array([[0.0], [1.0], [2.0]]), 50, 1)
    found = mean(values)
    assert found.value == 1 and found.low < 0.4 and found.high > 1.6


def test_one_picture_gives_the_interval_over_its_seeds() -> None:
    """Eight seeds, one picture: Student's interval of a mean of eight, within a tenth."""
    values = normal((8, 1), "eight").double()
    found = mean(values)
    half = 2.365 * float(values.std()) / math.sqrt(8)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.15)


def test_a_single_value_has_no_interval() -> None:
    found = mean([[3.0]])
    assert found.value == 3 and math.isnan(found.low) and not found.excludes_zero
    assert found.to_json() == {"value": 3.0, "low": None, "high": None}


def test_nothing_is_left_of_nothing() -> None:
    assert math.isnan(ratio(np.zeros((2, 2)), np.zeros((2, 2))).value)


def test_an_effect_and_its_control_share_their_resamples() -> None:
    """What makes a picture easy cancels: each is spread out, their difference is constant."""
    spread = 100 * normal((8, 6), "pictures").double()
    found = difference(spread + 1, spread)
    assert found.low == pytest.approx(1) and found.high == pytest.approx(1)


def test_clear_of_the_control_needs_half_as_much_again_and_no_zero() -> None:
    control = np.full((3, 4), 1.0)
    assert is_clear(control * 1.6, control)
    assert not is_clear(control * 1.4, control)
    assert not is_clear(control, control)
    assert not is_clear(np.zeros((3, 4)), np.zeros((3, 4)))
    assert is_clear(-1.6 * control, control)  # a score that falls where noise lets it rise
    assert not is_clear([[5.0, -1.0]], [[0.5, 0.5]])  # two pictures that disagree


def test_tails_are_widened_most_for_few_groups() -> None:
    tails = [widened_tails(count) for count in (2, 4, 16, 1000)]
    assert tails == sorted(tails) and tails[-1] == pytest.approx(0.025, rel=0.01)


def test_text_of_an_interval() -> None:
    assert Interval(1.234, 0.9, 1.5).text(".1f") == "1.2 [0.9, 1.5]"
    assert torch.isclose(torch.tensor(mean([[1.0, 3.0]]).value), torch.tensor(2.0))


def test_two_pictures_have_no_interval_and_one_has_that_of_its_seeds() -> None:
    two = mean(normal((8, 2), "two"))
    assert math.isnan(two.low) and math.isnan(two.high) and not two.excludes_zero
    assert not is_clear(np.full((8, 2), 2.0), np.full((8, 2), 1.0))
    assert mean(normal((8, 1), "one")).low < mean(normal((8, 1), "one")).high
    assert mean(normal((8, 3), "three")).low < mean(normal((8, 3), "three")).high


def test_a_distance_lies_nowhere_below_zero() -> None:
    """Three pictures that differ much: Student's interval of a distance began below 0."""
    distances = np.array([[0.01, 0.02, 0.9]] * 4)
    found = mean(distances)
    assert found.low == 0 and not found.excludes_zero and found.high > 1
    assert ratio(distances, np.ones((4, 3))).low == 0
    assert mean(distances - 0.3).low < 0


def covered(seeds: int, pictures: int) -> float:
    """How often the interval of the mean holds the true one, 0; pictures differ most."""
    hits = 0
    for run in range(200):
        effect = normal((1, pictures), "covered", run, "pictures")
        effect = effect + 0.3 * normal((seeds, pictures), "covered", run, "rest")
        found = mean(effect, resamples=400)
        hits += found.low <= 0 <= found.high
    return hits / 200


@pytest.mark.slow
def test_intervals_cover_what_differs_between_pictures() -> None:
    """Tails were those of 8 seeds: 95 % intervals over 3 pictures held the truth in 85 of 100."""
    assert covered(8, 3) > 0.9
    assert covered(8, 5) > 0.9
    assert covered(4, 16) > 0.93
