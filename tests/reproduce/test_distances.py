"""The kernel distance of samples of a fixed list of captions."""

from __future__ import annotations

import pytest
import torch
from runner.distances import caption_distance

from diffkit.evaluation.kernel_distance import kernel_distance_weighted, polynomial_kernel


def test_one_caption_is_the_usual_statistic() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 5, generator=generator) for n in (7, 9))
    usual = kernel_distance_weighted(x, y, torch.ones(7))
    assert caption_distance(x[None], y[None]) == pytest.approx(float(usual), rel=1e-12)


def test_two_captions_by_hand() -> None:
    """k of one caption's two samples counts one half, k of samples of both captions one half."""
    x = torch.tensor([[[1.0], [2.0]], [[0.0], [-1.0]]])
    y = torch.tensor([[[0.0], [0.0]]])
    same = ((1 * 2 + 1) ** 3 + (0 * -1 + 1) ** 3) / 2
    other = ((0 + 1) ** 3 + (-1 + 1) ** 3 + (0 + 1) ** 3 + (-2 + 1) ** 3) / 4
    assert caption_distance(x, y) == pytest.approx((same + other) / 2 + 1 - 2 * 1)


def test_samples_of_the_same_captions_are_not_too_near() -> None:
    """The plain statistic was below 0 by as much as separates good students: the mean of 200 draws.

    Captions far apart, samples of one near each other.
    """
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(6, 1, 4, generator=generator)
    found, plain = [], []
    for _ in range(200):
        x, y = (centres + 0.3 * torch.randn(6, 3, 4, generator=generator) for _ in range(2))
        found.append(caption_distance(x, y))
        flat = x.flatten(0, 1), y.flatten(0, 1)
        plain.append(float(kernel_distance_weighted(*flat, torch.ones(18))))
    scale = float(polynomial_kernel(centres[:, 0], centres[:, 0]).diagonal().mean())
    error = float(torch.tensor(found).std()) / 200**0.5
    assert abs(sum(found) / 200) < 3 * error < 0.01 * scale
    assert sum(plain) / 200 < -0.02 * scale
