"""Set metrics: each number, and what its interval is made from, belong together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffkit.evaluation.extractors import Extractor
from diffkit.evaluation.metrics.base import SetData
from diffkit.evaluation.metrics.registry import METRICS
from diffkit.evaluation.reference import Reference

D = 6
EXTRACTOR = Extractor("none", "no network", D, "", "", lambda images: images, torch.device("cpu"))


def features(n: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    draws = np.random.default_rng(seed).normal(shift, scale, (n, D))
    return draws.astype(np.float32)


def data(of: np.ndarray, real: np.ndarray, groups=None) -> SetData:
    reference = Reference.of(real, EXTRACTOR, "", "here")
    groups = torch.arange(len(of)) if groups is None else groups
    return SetData(of, EXTRACTOR, groups, reference)


SET_METRICS = [metric for metric in METRICS.values() if metric.kind == "set"]


@pytest.mark.parametrize("metric", SET_METRICS, ids=lambda metric: metric.name)
def test_weights_of_one_give_the_number(metric):
    """The resamples' statistic at the set itself is the reported value."""
    here = data(features(80, 0), features(90, 1), torch.arange(80) // 4)
    found = metric.run(here)
    assert (found.parts is None) != (found.of_weights is None)
    if found.of_weights is not None:
        weights = torch.ones(2, 80, dtype=torch.int64)
        weights[1, :8] = torch.tensor([2, 0] * 4)
        values = found.of_weights(weights)
        assert values.shape == (2,) and values.dtype == torch.float64
        assert values[0].item() == pytest.approx(found.value, rel=1e-9, abs=1e-9)
        assert values[1] != values[0]
    else:
        sizes = {"pictures": 80, "reference": 90, "groups": 20}
        assert found.parts.shape == (sizes[found.unit],)
        assert found.parts.double().mean().item() == pytest.approx(found.value)


def test_resampling_is_repeating():
    """Weights (2, 0, 1, ...) are the set with its first picture twice and without its second."""
    mine, real = features(60, 0, 0.5), features(70, 1)
    weights = torch.ones(1, 60, dtype=torch.int64)
    weights[0, :2] = torch.tensor([2, 0])
    repeated = np.repeat(mine, weights[0].numpy(), axis=0)
    for name in ("frechet", "vendi"):
        weighted = METRICS[name].run(data(mine, real)).of_weights(weights)
        direct = METRICS[name].run(data(repeated, real)).value
        assert weighted.item() == pytest.approx(direct, rel=1e-8)


def test_distances_tell_near_from_far():
    real = features(200, 0)
    near, far = data(features(200, 1), real), data(features(200, 2, shift=2.0), real)
    for name in ("frechet", "kernel"):
        assert METRICS[name].run(near).value < 0.5 < METRICS[name].run(far).value
    for name in ("precision", "recall", "density", "coverage"):
        assert METRICS[name].run(near).value > 0.7 > METRICS[name].run(far).value


def test_a_shift_is_the_frechet_distance():
    """Equal covariances: only |mu_a - mu_b|^2 is left, here 6 * 3^2."""
    real = features(100, 0)
    assert METRICS["frechet"].run(data(real + 3, real)).value == pytest.approx(54, rel=1e-4)
    assert METRICS["frechet"].run(data(real, real)).value == pytest.approx(0, abs=1e-9)


def test_a_narrow_set_keeps_precision_and_loses_recall():
    real = features(200, 0)
    narrow = data(features(200, 1, scale=0.3), real)
    assert METRICS["precision"].run(narrow).value > 0.95
    assert METRICS["recall"].run(narrow).value < 0.2
    assert METRICS["vendi"].run(narrow).value < 8


def test_the_kernel_subsets_are_named():
    found = METRICS["kernel"].run(data(features(60, 0), features(70, 1)))
    assert found.note == "mean of 100 subsets of 60"


def test_diversity_of_known_groups():
    """Two pictures a prompt at distance 5 and at 0, and a prompt of one picture: mean 2.5."""
    rows = np.zeros((5, D), np.float32)
    rows[1, :2] = 3, 4
    here = data(rows, features(20, 0), torch.tensor([0, 0, 1, 1, 2]))
    found = METRICS["diversity"].run(here)
    assert found.value == pytest.approx(2.5) and found.parts.tolist() == [5.0, 0.0]
