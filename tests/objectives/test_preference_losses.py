"""Losses of preference pairs against hand arithmetic, and the identities between them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from diffkit.objectives.preference_losses import (
    alpha_dpo_loss,
    cdpo_loss,
    dpo_loss,
    hinge_loss,
    implicit_accuracy,
    ipo_loss,
    loser_scale,
    preference_logit,
    rdpo_loss,
    scale_gradient,
)

KAPPA, Q, BETA = 2500.0, 0.2, 100.0
S = torch.linspace(-3, 3, 13, dtype=torch.float64) / KAPPA
LOSSES = {
    "dpo": (lambda s: dpo_loss(s, KAPPA), math.log(2), -0.5 * KAPPA),
    "cdpo": (lambda s: cdpo_loss(s, KAPPA, Q), math.log(2), -(1 - 2 * Q) / 2 * KAPPA),
    "rdpo": (lambda s: rdpo_loss(s, KAPPA, Q), math.log(2), -KAPPA / (2 * (1 - 2 * Q))),
    "hinge": (lambda s: hinge_loss(s, KAPPA), 1.0, -KAPPA),
    "ipo": (lambda s: ipo_loss(s, BETA), 1 / (4 * BETA**2), -1 / BETA),
    "alpha": (lambda s: alpha_dpo_loss(s, KAPPA, 0.5), 0.171572875, -0.207106781 * KAPPA),
}


def value_and_slope(loss, s):
    s = s.clone().requires_grad_()
    value = loss(s)
    (slope,) = torch.autograd.grad(value.sum(), s)
    return value.detach(), slope


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_slope_where_the_model_is_its_reference(name):
    loss, value, slope = LOSSES[name]
    found = value_and_slope(loss, torch.zeros(3))
    torch.testing.assert_close(found[0], torch.full((3,), value), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], torch.full((3,), slope), rtol=1e-6, atol=0)
    assert loss(torch.zeros(2, dtype=torch.float64)).dtype == torch.float64


def test_by_hand():
    """s = 0.001 at kappa 1000 is x = 1: softplus(-1) = 0.3132617, softplus(1) = 1.3132617."""
    s = torch.tensor([0.001], dtype=torch.float64)
    found = [
        dpo_loss(s, 1000.0),
        cdpo_loss(s, 1000.0, 0.2),
        rdpo_loss(s, 1000.0, 0.2),
        hinge_loss(s, 250.0),
        ipo_loss(s, 100.0),
        alpha_dpo_loss(s, 1000.0, 0.5),
    ]
    p = 1 / (1 + math.exp(-1))
    expected = [
        0.3132616875,
        0.8 * 0.3132616875 + 0.2 * 1.3132616875,
        (0.8 * 0.3132616875 - 0.2 * 1.3132616875) / 0.6,
        0.75,
        1.6e-5,
        (p**0.5 - 0.5 - 0.5 * p) / -0.25,
    ]
    torch.testing.assert_close(torch.cat(found), torch.tensor(expected, dtype=torch.float64))


def test_s_is_the_four_errors():
    errors = torch.tensor([[0.3, 0.2], [0.5, 0.6], [0.4, 0.1], [0.45, 0.55]], dtype=torch.float64)
    winner, loser, ref_winner, ref_loser = errors
    s = preference_logit(winner, loser, (ref_winner, ref_loser))
    torch.testing.assert_close(s, (ref_winner - ref_loser) - (winner - loser))
    torch.testing.assert_close(s, torch.tensor([0.15, -0.05], dtype=torch.float64))
    torch.testing.assert_close(preference_logit(winner, loser), loser - winner)
    swapped = preference_logit(loser, winner, (ref_loser, ref_winner))
    torch.testing.assert_close(swapped, -s)


def test_equal_kappa_is_an_equal_loss_whatever_beta_was_called():
    """Salesforce: -logsigmoid(-0.5 beta (d_th - d_ref)) with beta 5000; diffusers: beta 2500."""
    draw = torch.Generator().manual_seed(0)
    model, reference = (torch.rand(2, 8, generator=draw) * 1e-3 for _ in range(2))
    d_th, d_ref = model[0] - model[1], reference[0] - reference[1]
    salesforce = -logsigmoid(-0.5 * 5000 * (d_th - d_ref))
    diffusers = -logsigmoid(-2500 * (d_th - d_ref))
    ours = dpo_loss(preference_logit(*model, (reference[0], reference[1])), 2500.0)
    torch.testing.assert_close(ours, salesforce, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, diffusers, rtol=1e-5, atol=1e-6)


def test_swapping_the_pair():
    torch.testing.assert_close(dpo_loss(S, KAPPA) - dpo_loss(-S, KAPPA), -KAPPA * S)


def test_no_wrong_labels_is_dpo():
    for loss in (cdpo_loss, rdpo_loss):
        torch.testing.assert_close(loss(S, KAPPA, 0.0), dpo_loss(S, KAPPA))


def test_rdpo_is_unbiased():
    mean = (1 - Q) * rdpo_loss(S, KAPPA, Q) + Q * rdpo_loss(-S, KAPPA, Q)
    torch.testing.assert_close(mean, dpo_loss(S, KAPPA))


def test_rdpo_keeps_pushing_and_cdpo_does_not():
    far = torch.tensor([50 / KAPPA])
    assert value_and_slope(LOSSES["rdpo"][0], far)[1] == pytest.approx(-Q / (1 - 2 * Q) * KAPPA)
    best = torch.tensor([math.log((1 - Q) / Q) / KAPPA], dtype=torch.float64)
    assert value_and_slope(LOSSES["cdpo"][0], best)[1].abs() < 1e-9 * KAPPA


def test_no_kappa_no_gradient():
    for loss in (dpo_loss, hinge_loss):
        assert not value_and_slope(lambda s, f=loss: f(s, 0.0), S)[1].any()


def test_alpha_dpo_between_its_limits():
    """Never negative, and near the two limits -ln p + p - 1 and p ln p - p + 1."""
    p = torch.sigmoid(KAPPA * S)
    for alpha, limit in ((0.0, -p.log() + p - 1), (1.0, p * p.log() - p + 1)):
        found = alpha_dpo_loss(S, KAPPA, alpha)
        assert (found >= 0).all()
        torch.testing.assert_close(found, limit, rtol=3e-3, atol=1e-3)
    slope = value_and_slope(LOSSES["alpha"][0], S)[1]
    torch.testing.assert_close(slope, -KAPPA * (1 - p) * (p**0.5 - p) / 0.5)


def test_alpha_dpo_far_out():
    """The power of p itself has a NaN gradient from x = -120 on in float32."""
    far = torch.tensor([-2000.0, -120.0, 120.0, 2000.0])
    value, slope = value_and_slope(lambda s: alpha_dpo_loss(s, 1.0, 0.4), far)
    assert value.isfinite().all() and slope.isfinite().all()
    assert slope.abs().max() < 1e-9


def test_alpha_takes_no_gradient():
    alpha = torch.tensor(0.5, requires_grad=True)
    s = torch.ones(2, requires_grad=True)
    alpha_dpo_loss(s, 1.0, alpha).sum().backward()
    assert alpha.grad is None


def test_accuracy_of_a_tie_is_a_half():
    """Salesforce's counts none: it reports 0 where the model is its reference."""
    assert implicit_accuracy(torch.tensor([0.1, 0.0, -0.2])).tolist() == [1.0, 0.5, 0.0]


def test_the_loser_is_held_where_it_would_raise_the_winners_error():
    """|g_w|^2 = 1, products 2, 1/2, -3 and 0: a half, and no change."""
    winner = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    loser = torch.tensor([[2.0, 5.0], [0.5, 1.0], [-3.0, 0.0], [0.0, 1.0]])
    assert loser_scale(winner, loser).tolist() == [0.5, 1.0, 1.0, 1.0]
    assert loser_scale(torch.zeros(1, 2), loser[:1]).tolist() == [1.0]
    draw = torch.Generator().manual_seed(0)
    winner, loser = (torch.randn(50, 6, generator=draw) for _ in range(2))
    step = winner - loser_scale(winner, loser)[:, None] * loser
    assert ((step * winner).sum(1) >= -1e-5).all()
    assert ((winner - loser) * winner).sum(1).min() < -0.1


def test_a_scaled_gradient_is_the_same_value():
    x, factor = torch.tensor([0.1, 0.2], requires_grad=True), torch.tensor([0.5, 0.0])
    scaled = scale_gradient(x, factor)
    assert torch.equal(scaled, x)
    scaled.sum().backward()
    assert torch.equal(x.grad, factor)
