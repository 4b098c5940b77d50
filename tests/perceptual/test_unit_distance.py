"""LPIPS's distance of one layer: the package's arithmetic, its gradients, and dead pixels."""

from __future__ import annotations

import lpips
import pytest
import torch

from diffkit.kernels import channel_distance
from diffkit.perceptual.unit_distance import unit_distance


def maps(shape=(2, 5, 6, 3)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, *shape, generator=draws, dtype=torch.float64)
    return x, y, torch.rand(shape[1], generator=draws, dtype=torch.float64)


def test_hand_arithmetic() -> None:
    """(3, 4) / 5 against (0, 1), weights 1 and 2: 0.36 + 2 * 0.04."""
    x, y = (torch.tensor(values).double().view(1, 2, 1, 1) for values in ([3, 4], [0, 7]))
    assert unit_distance(x, y, torch.tensor([1.0, 2.0])).item() == pytest.approx(0.44)


@pytest.mark.parametrize("piece", [1 << 18, 40])
def test_it_is_the_packages(piece, monkeypatch) -> None:
    monkeypatch.setattr(channel_distance, "piece_size", lambda device: piece)
    x, y, weights = (part.requires_grad_() for part in maps())
    a, b = lpips.normalize_tensor(x), lpips.normalize_tensor(y)
    theirs = (weights.detach()[:, None, None] * (a - b) ** 2).sum(1).mean((1, 2))
    ours = unit_distance(x, y, weights)
    torch.testing.assert_close(ours, theirs)
    grad = torch.tensor([1.0, -2.0], dtype=torch.float64)
    expected = torch.autograd.grad(theirs, (x, y), grad)
    found = torch.autograd.grad(ours, (x, y), grad)
    torch.testing.assert_close(found, expected)


def test_a_pixel_without_features_has_no_gradient() -> None:
    """In the package it is 0 * inf, so one dead pixel made the gradient of the picture NaN."""
    x, y, weights = maps()
    x[0, :, 2, 1] = 0
    x.requires_grad_()
    unit_distance(x, y, weights).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert torch.equal(x.grad[0, :, 2, 1], torch.zeros(5, dtype=torch.float64))


def test_equal_maps_are_at_zero() -> None:
    x, _, weights = maps()
    assert torch.equal(unit_distance(x.float(), x.float(), weights.float()), torch.zeros(2))
