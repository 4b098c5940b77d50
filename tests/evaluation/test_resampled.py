"""Cheap resamples of dear statistics against those computed in full."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffkit.evaluation import resampled
from diffkit.evaluation.bootstrap import group_weights, pivotal_interval
from diffkit.evaluation.diversity import vendi_score
from diffkit.evaluation.frechet import frechet_distance
from diffkit.evaluation.moments import Moments
from diffkit.evaluation.resampled import FULL, per_row, resampled_frechet, resampled_vendi

D = 12


def features(n: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    """Correlated rows, with a spectrum that falls as that of real features does."""
    draws = np.random.default_rng(seed).normal(shift, 1, (n, D))
    mix = np.random.default_rng(9).normal(0, 1, (D, D)) / np.arange(1, D + 1)
    return torch.from_numpy((draws @ mix + 1).astype(np.float32))


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampled, "WIDE", 4)


@pytest.mark.parametrize("n", [8, D])
def test_few_rows_through_their_gram_matrix_are_exact(n: int) -> None:
    rows, real = features(n, 0, 0.3), Moments.of(features(60, 1))
    weights = group_weights(torch.arange(n), 30, 0)
    own = Moments.of(rows)
    cheap, _ = resampled_frechet(rows, own, real)
    whole = per_row(lambda w: frechet_distance(Moments.of(rows, w), real))
    assert torch.allclose(cheap(weights), whole(weights), rtol=1e-6, atol=1e-6)
    value, of_weights, _ = resampled_vendi(rows)
    assert of_weights(torch.ones(1, n)).item() == pytest.approx(value)
    whole = per_row(lambda w: vendi_score(rows, w))
    assert torch.allclose(of_weights(weights), whole(weights), rtol=1e-8)


@pytest.mark.parametrize("statistic", ["frechet", "vendi"])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_derivative_and_a_few_full_resamples_give_the_interval(
    statistic: str, shift: float
) -> None:
    rows, real = features(600, 0, shift), Moments.of(features(500, 1))
    weights = group_weights(torch.arange(300).repeat_interleave(2), 400, 0)
    if statistic == "frechet":
        value = frechet_distance(Moments.of(rows), real)
        cheap, note = resampled_frechet(rows, Moments.of(rows), real)
        whole = per_row(lambda w: frechet_distance(Moments.of(rows, w), real))(weights)
    else:
        value, cheap, note = resampled_vendi(rows)
        whole = per_row(lambda w: vendi_score(rows, w))(weights)
    found = cheap(weights)
    assert torch.allclose(found[:FULL], whole[:FULL], rtol=1e-6, atol=1e-8)
    assert str(FULL) in note
    ours, theirs = (pivotal_interval(value, r, 300) for r in (found, whole))
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.15 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.15 * width)
    if shift:
        assert np.corrcoef(found, whole)[0, 1] > 0.95


def test_the_same_set_gets_the_same_resamples() -> None:
    """So that the difference of a model and itself is exactly zero."""
    rows, real = features(40, 0), Moments.of(features(50, 1))
    weights = group_weights(torch.arange(40), 50, 3)
    once, again = (resampled_frechet(rows, Moments.of(rows), real)[0](weights) for _ in range(2))
    assert torch.equal(once, again)
