"""The pure losses by hand arithmetic."""

from __future__ import annotations

import torch

from diffkit.protection.losses import (
    ACE_PLUS_WEIGHT,
    MIST_WEIGHT,
    mean_square,
    moment_change,
    score_distillation,
    sum_square,
)


def test_sums_and_means_are_over_one_picture() -> None:
    a = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 4.0]]]])
    b = torch.tensor([[[[0.0, 0.0]]]])
    assert sum_square(a, b).tolist() == [5, 16]
    assert mean_square(a, b).tolist() == [2.5, 8]


def test_half_precision_is_summed_in_float32() -> None:
    """In float16 300^2 * 4 is beyond the largest number."""
    a = torch.full((1, 4, 1, 1), 300.0, dtype=torch.float16)
    assert sum_square(a, torch.zeros_like(a)).item() == 360_000
    assert mean_square(a, torch.zeros_like(a)).dtype == torch.float32


def test_published_weights() -> None:
    """Mist's 1e4 stands beside a sum over the 4 x 64 x 64 latents of 512 pixels."""
    assert MIST_WEIGHT * (4 * 64 * 64) == 1e4
    assert ACE_PLUS_WEIGHT == 100


def test_the_scalar_of_score_distillation_has_the_residual_as_gradient() -> None:
    """As has 0.5 sum (z - sg(z - r))^2, DreamFusion's form of it."""
    z = torch.randn(2, 3, 4, 4).requires_grad_()
    r = torch.randn(2, 3, 4, 4).requires_grad_()
    (g,) = torch.autograd.grad(score_distillation(z, r).sum(), z)
    other = 0.5 * (z - (z - r).detach()).square().sum()
    (expected,) = torch.autograd.grad(other, z)
    torch.testing.assert_close(g, r.detach(), rtol=0, atol=0)
    torch.testing.assert_close(g, expected, rtol=1e-5, atol=1e-6)
    assert not score_distillation(z.detach(), r).requires_grad


def test_moment_change_adds_the_means_of_both_moments() -> None:
    start = torch.zeros(1, 4, 1, 1)
    moved = torch.tensor([1.0, 3.0, 2.0, 0.0]).view(1, 4, 1, 1)
    assert moment_change(moved, start, 2).item() == 5 + 2
    # an encoder without a variance
    assert moment_change(moved[:, :2], start[:, :2], 2).item() == 5


def test_nothing_moves_without_a_random_start() -> None:
    """At the clean moments both the value and the gradient of PID's loss are exactly zero."""
    moments = torch.randn(2, 8, 4, 4).requires_grad_()
    value = moment_change(moments, moments.detach(), 4)
    (g,) = torch.autograd.grad(value.sum(), moments)
    assert value.tolist() == [0, 0]
    assert not g.any()
