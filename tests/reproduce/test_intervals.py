"""The t-interval of paired differences against hand arithmetic and scipy's paired test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from runner.intervals import paired_difference
from scipy.stats import ttest_rel


def test_a_hand_worked_case() -> None:
    """d = 1, 2, 3: mean 2, deviation 1, t(2, 97.5 %) = 4.302653, half width 4.302653 / sqrt(3)."""
    found = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    half = 4.302652729749464 / math.sqrt(3)
    assert found.values == (1.0, 2.0, 3.0)
    assert found.mean == 2.0
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), rel=1e-12)
    assert not found.clear


def test_it_is_scipys_paired_interval() -> None:
    rng = np.random.default_rng(0)
    arm, baseline = rng.normal(1, 0.1, 5), rng.normal(0, 0.1, 5)
    expected = ttest_rel(arm, baseline).confidence_interval(0.95)
    found = paired_difference(arm.tolist(), baseline.tolist())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found.clear


def test_one_pair_says_nothing_about_the_spread() -> None:
    found = paired_difference([2.0], [1.0])
    assert (found.mean, found.low, found.high) == (1.0, -math.inf, math.inf)
    assert not found.clear
