"""Heads by least squares and by order; the pixel distance they may be fitted to."""

from __future__ import annotations

import pytest
import scipy.optimize
import torch

from diffkit.models.feature_network import ImageTrunk
from diffkit.perceptual.calibration import (
    channel_distances,
    fit_heads,
    fit_ranking,
    set_heads,
    trunk_distance,
    two_afc_score,
)
from tests.perceptual.test_latent_lpips import network, pair


def rows(n: int = 60, k: int = 8) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.rand((n, k), generator=g, dtype=torch.float64)


def test_the_distance_is_linear_in_the_heads() -> None:
    net, (a, b) = network("pre_pool", "gn"), pair()
    m = channel_distances(net, a, b)
    assert m.shape == (3, sum(net.config.widths))
    weights = torch.rand(m.shape[1], generator=torch.Generator().manual_seed(0))
    set_heads(net, weights)
    torch.testing.assert_close(net.distance(a, b), m @ weights)


def test_least_squares_finds_what_is_there() -> None:
    m = rows()
    truth = torch.tensor([0.0, 1, 0, 2, 0, 0, 3, 0.5], dtype=torch.float64)
    torch.testing.assert_close(fit_heads(m, m @ truth), truth, atol=1e-6, rtol=0)


def test_least_squares_is_scipys() -> None:
    m = rows()
    t = m @ torch.tensor([0.0, 1, -1, 2, 0, -0.5, 3, 0.5], dtype=torch.float64)
    theirs = torch.from_numpy(scipy.optimize.nnls(m.numpy(), t.numpy())[0])
    assert (theirs == 0).any()
    torch.testing.assert_close(fit_heads(m, t), theirs, atol=1e-6, rtol=0)


def test_the_prior_draws_to_a_common_weight() -> None:
    m = rows()
    t = m @ torch.tensor([0.0, 1, 0, 2, 0, 0, 3, 0.5], dtype=torch.float64)
    common = (m.sum(1) @ t / m.sum(1).square().sum()).expand(8)
    torch.testing.assert_close(fit_heads(m, t, prior=1e9), common, rtol=1e-6, atol=0)
    some = fit_heads(m, t, prior=0.3)
    assert (some > 0).all() and (some - common).abs().sum() > 0.1


def test_the_order_finds_the_channel_that_tells() -> None:
    """Channel 0 says who is nearer, the others nothing."""
    g = torch.Generator().manual_seed(0)
    m0, m1 = torch.rand((2, 200, 6), generator=g)
    judge = (m1[:, 0] < m0[:, 0]).float()
    start = torch.full((6,), 0.5)
    before = two_afc_score(m0 @ start, m1 @ start, judge).mean()
    w = fit_ranking(m0, m1, judge, start=start, epochs=10, rate=5e-2)
    assert (w >= 0).all() and w[0] > 3 * w[1:].max()
    assert two_afc_score(m0 @ w, m1 @ w, judge).mean() > max(0.9, before + 0.1)
    assert torch.equal(w, fit_ranking(m0, m1, judge, start=start, epochs=10, rate=5e-2))


def test_scores_of_people() -> None:
    d0, d1 = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([2.0, 1.0, 1.0])
    found = two_afc_score(d0, d1, torch.tensor([0.2, 0.7, 0.9]))
    assert found.tolist() == pytest.approx([0.8, 0.7, 0.5])


def test_the_pixel_distance() -> None:
    torch.manual_seed(0)
    trunk = ImageTrunk((4, 8), (1,)).eval()
    x, y = torch.rand((2, 2, 3, 64, 64)) * 2 - 1
    value = trunk_distance(trunk, x, y)
    assert value.shape == (2,) and (value > 0).all()
    assert torch.equal(trunk_distance(trunk, x, x), torch.zeros(2))
    means = [maps.mean((2, 3)) for maps in trunk.maps(x)]
    assert all(torch.equal(p, q) for p, q in zip(trunk.pooled(x), means, strict=True))
