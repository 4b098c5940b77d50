"""Statistics of a change: hand arithmetic on changes of known size and frequency."""

from __future__ import annotations

import math

import pytest
import torch

from diffkit.perceptual.delta import delta_statistics

GREY = torch.full((3, 32, 32), 100, dtype=torch.uint8)
BOARD = torch.tensor([[1, -1], [-1, 1]]).repeat(16, 16)


def test_no_change():
    found = delta_statistics(GREY, GREY)
    assert found.to_dict() == {
        "largest": 0, "mean": 0.0, "shift": 0.0, "high_frequency": 0.0, "psnr": 100.0,
    }  # fmt: skip


def test_a_shift_downwards_does_not_wrap():
    found = delta_statistics(GREY, GREY - 3)
    assert (found.largest, found.mean, found.shift) == (3, 3.0, -3.0)
    assert found.psnr == pytest.approx(20 * math.log10(255 / 3), abs=1e-4)


def test_the_finest_pattern_is_all_high_frequency():
    found = delta_statistics(GREY, (GREY.int() + 4 * BOARD).to(torch.uint8))
    assert (found.largest, found.mean, found.shift) == (4, 4.0, 0.0)
    assert found.high_frequency > 0.999


def test_a_slow_wave_has_none_and_one_pixel_counts():
    wave = (8 * torch.sin(torch.arange(32) * 2 * torch.pi / 16)).round().int()
    slow = delta_statistics(GREY, (GREY.int() + wave).to(torch.uint8))
    assert slow.high_frequency < 0.01
    one = GREY.clone()
    one[0, 5, 7] = 200
    found = delta_statistics(GREY, one)
    assert found.largest == 100 and found.mean == pytest.approx(100 / (3 * 32 * 32))


def test_grey_pictures_and_wrong_input():
    assert delta_statistics(GREY[:1], GREY[:1] + 1).largest == 1
    with pytest.raises(ValueError, match="uint8"):
        delta_statistics(GREY.float(), GREY.float())
    with pytest.raises(ValueError, match="one shape"):
        delta_statistics(GREY, GREY[..., 1:])
