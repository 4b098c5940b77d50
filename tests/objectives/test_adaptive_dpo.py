"""Adaptive-DPO's weights against hand arithmetic, and what they must not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from diffkit.errors import UserError
from diffkit.objectives.adaptive_dpo import (
    AdaptiveConfig,
    adaptive_dpo_loss,
    adaptive_margin,
    annotator_logits,
    batch_statistics,
    judge,
    minority,
    rms_norm,
    stability,
    weights,
)
from diffkit.objectives.preference_losses import dpo_loss
from diffkit.objectives.preference_state import RunningMean

NOTHING = torch.zeros(())
KAPPA = 1000.0


def some(m=3, b=16, seed=0, scale=1e-3):
    draw = torch.Generator().manual_seed(seed)
    return scale * torch.randn(m, b, generator=draw, dtype=torch.float64)


def norm_of(s, form):
    """The batch's own norm, or that which its own mean square gives."""
    return batch_statistics(s)[0] if form == "batch" else rms_norm(s.square().mean(1))


def judged(s, form="rms", **values):
    return judge(AdaptiveConfig(**values), s, norm_of(s, form), KAPPA * s[0].mean())


def test_by_hand():
    """Three models, one pair: logits 0, 1 and -1, so C = (1/2 + 0.26894 + 0.73106) / 3, V = 1."""
    logits = torch.tensor([[0.0], [1.0], [-1.0]], dtype=torch.float64)
    assert minority(logits, "none").item() == pytest.approx(0.5)
    assert minority(logits, "std").item() == pytest.approx(0.5)
    half = logits / 2
    assert stability(half).item() == pytest.approx(0.5)
    assert minority(half, "std").item() == pytest.approx(0.25)
    u = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    found = {kind: weights(u, kind, 10.0, 1.0).tolist() for kind in ("linear", "quadratic")}
    assert found["linear"] == pytest.approx([1, 1 / 3.5, 1 / 11])
    assert found["quadratic"] == pytest.approx([1, 1 / 1.625, 1 / 11])
    last = [0.5, 1 / (math.exp(2.5) + 1), 4.5398e-5]
    assert weights(u, "sigmoid", 10.0, 1.0).tolist() == pytest.approx(last, rel=1e-4)
    assert weights(u, "sqrt", 10.0, 1.0)[1].item() == pytest.approx(1 / (math.exp(5) + 1))
    mean = torch.tensor(0.3)
    margins = {kind: adaptive_margin(u, kind, 2.0, mean) for kind in ("off", "linear", "quadratic")}
    assert margins["off"].tolist() == [0, 0, 0]
    assert margins["linear"].tolist() == pytest.approx([0.3, -0.2, -1.7])
    assert margins["quadratic"].tolist() == pytest.approx([0.3, 0.175, -1.7])


def test_logits_by_hand():
    """s = (3, 4) has the norm 5 and the mean square 12.5: rho / 5, and 15 / (4 sqrt(12.5))."""
    s = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    found = annotator_logits(s, batch_statistics(s)[0], 15.0)
    assert found.tolist() == [[9.0, 12.0]]
    found = annotator_logits(s, rms_norm(torch.tensor([12.5])), 15.0)
    assert found[0].tolist() == pytest.approx([3 * 3.75 / 12.5**0.5, 4 * 3.75 / 12.5**0.5])


def test_sixteen_pairs_are_where_the_two_norms_meet():
    s = some(b=16)
    torch.testing.assert_close(norm_of(s, "rms"), norm_of(s, "batch"))


@pytest.mark.parametrize("weighting", ["linear", "quadratic"])
def test_no_slope_is_dpo(weighting):
    s = some()
    found = judged(s, weighting=weighting, slope=0.0)
    loss = adaptive_dpo_loss(s[0], KAPPA, found.weight, found.margin)
    torch.testing.assert_close(loss, dpo_loss(s[0], KAPPA))


@pytest.mark.parametrize("form", ["rms", "batch"])
@pytest.mark.parametrize("kind", ["std", "none"])
def test_ranges_scale_and_order(form, kind):
    """u in [0, 1), W in (1 / 11, 1]; a common factor changes nothing; pairs keep their places."""
    s = some()
    found = judged(s, form, stability=kind)
    assert (found.u >= 0).all() and (found.u < 1).all()
    assert (found.weight > 1 / 11).all() and (found.weight <= 1).all()
    torch.testing.assert_close(judged(7 * s, form, stability=kind).u, found.u)
    order = torch.randperm(s.shape[1], generator=torch.Generator().manual_seed(3))
    again = judged(s[:, order], form, stability=kind)
    torch.testing.assert_close(again.u, found.u[order])
    torch.testing.assert_close(again.weight, found.weight[order])


def test_annotators_that_agree_have_no_spread():
    s = some(m=1).expand(3, -1)
    assert not judged(s, stability="std").u.any()
    assert judged(s, stability="none").u.gt(0.5).any()


@pytest.mark.parametrize("form", ["rms", "batch"])
def test_a_model_that_is_its_reference(form):
    """The published norm has no floor: 0 / 0 makes the loss NaN for good."""
    s = torch.zeros(3, 4)
    assert judged(s, form, stability="std").u.tolist() == [0] * 4
    assert judged(s, form, stability="none").u.tolist() == [0.5] * 4


def test_repeating_the_batch():
    """Nothing changes with the mean square; the published norm moves every u towards 1 / 2."""
    s = some()
    twice = torch.cat([s, s], 1)
    once = judged(s, "rms", stability="none").u
    torch.testing.assert_close(judged(twice, "rms", stability="none").u, torch.cat([once, once]))
    gap = judged(twice, "batch", stability="none").u[:16] - judged(s, "batch", stability="none").u
    assert gap.abs().max() > 0.02


def test_a_batch_of_one():
    """The published norm leaves +-1 of any pair, so its std is 0 and the method is DPO; the running
    mean square still knows a doubtful pair from another."""
    s = torch.tensor([[-2e-3], [-1e-3], [-3e-3]], dtype=torch.float64)
    assert judged(s, "batch", stability="std").weight.tolist() == [1.0]
    norm = rms_norm(torch.full((3,), 1e-6, dtype=torch.float64))
    for kind in ("std", "none"):
        config = AdaptiveConfig(stability=kind)
        assert judge(config, s, norm, NOTHING).u > 0.9
        assert judge(config, -s, norm, NOTHING).u < 0.1


def test_no_gradient_through_what_is_judged():
    s = some().requires_grad_()
    found = judged(s, margin="quadratic")
    assert not any(x.requires_grad for x in (found.u, found.weight, found.margin))
    loss = adaptive_dpo_loss(s[0], KAPPA, found.weight, found.margin)
    (grad,) = torch.autograd.grad(loss.sum(), s)
    x = KAPPA * s[0].detach() - found.margin
    torch.testing.assert_close(grad[0], -found.weight * KAPPA * torch.sigmoid(-x))
    assert not grad[1:].any()


def test_warm_up_weighs_all_alike():
    found = judge(AdaptiveConfig(margin="linear"), some(), torch.ones(3), torch.tensor(0.7), True)
    assert found.weight.eq(1).all() and found.u.eq(0).all()
    assert found.margin.tolist() == pytest.approx([0.7] * 16)
    assert [AdaptiveConfig().warmup(n) for n in (3, 20, 2000)] == [2, 2, 200]
    assert AdaptiveConfig(warmup_steps=7).warmup(2000) == 7


def test_running_mean_without_the_bias_of_its_start():
    values = [2.0, 4.0, 7.0]
    for decay in (0.0, 0.5, 1.0):
        mean = RunningMean(decay, torch.device("cpu"))
        assert mean.value(without=0.5) == 0.5
        for value in values:
            mean.update(torch.tensor(value))
        shares = [decay ** (2 - k) for k in range(3)]
        expected = sum(w * v for w, v in zip(shares, values, strict=True)) / sum(shares)
        assert mean.value().item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rho": 0.0}, "adaptive.rho: 0.0 must be above 0"),
        ({"slope": -1.0}, "adaptive.slope: -1.0 must not be negative"),
        ({"slow": 1.0}, r"adaptive.slow: 1.0 is not in \[0, 1\)"),
        ({"margin_scale": 2.0}, "adaptive.margin_scale: add --adaptive.margin"),
        ({"warmup_steps": 1}, "adaptive.warmup_steps: 1 is too small; it must be at least 2"),
    ],
)
def test_values_that_cannot_be(values, message):
    with pytest.raises(UserError, match=message):
        AdaptiveConfig(**values).check()
