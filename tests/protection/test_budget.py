"""Budgets in levels: boxes, rounding, the projection on integers."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffkit.errors import UserError
from diffkit.perceptual.pixels import psnr
from diffkit.protection.budget import LEVEL, as_signed, box, check_levels, to_levels
from diffkit.protection.pgd import random_noise

ALL = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)


def test_levels_and_signed_values() -> None:
    x = as_signed(ALL)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    assert LEVEL == 2 / 255
    torch.testing.assert_close(x.flatten().diff(), torch.full((255,), LEVEL))


def test_every_pixel_survives_the_way_there_and_back() -> None:
    for levels in (0, 1, 16):
        assert torch.equal(to_levels(as_signed(ALL), ALL, levels), ALL)


@pytest.mark.parametrize("levels", [0, 1, 4, 8, 16, 32])
def test_the_box_is_the_budget_cut_at_black_and_white(levels: int) -> None:
    low, high = box(ALL, levels)
    signed = ALL.short()
    expected = (
        as_signed((signed - levels).clamp(0, 255)),
        as_signed((signed + levels).clamp(0, 255)),
    )
    torch.testing.assert_close(low, expected[0])
    torch.testing.assert_close(high, expected[1])
    # the corners of the box become exactly k levels, and what is beyond it no more than that
    for x, sign in ((low, -1), (high, 1), (low - 1, -1), (high + 1, 1)):
        q = to_levels(x, ALL, levels)
        assert torch.equal(q.short(), (signed + sign * levels).clamp(0, 255))


def test_weights_share_out_the_budget() -> None:
    """floor(k m), with k m = 2 for m = 1/4: 0.25 * 8 must not become 1.9999 levels."""
    weight = torch.tensor([0.0, 0.25, 0.3, 1.0]).view(1, 1, 1, 4)
    pixels = torch.full((1, 3, 1, 4), 100, dtype=torch.uint8)
    q = to_levels(torch.ones(1, 3, 1, 4), pixels, 8, weight)
    assert (q[0, 0, 0] - 100).tolist() == [0, 2, 2, 8]
    low, high = box(pixels, 8, weight)
    x = as_signed(pixels)
    assert torch.equal(low[..., 0], x[..., 0])
    assert torch.equal(high[..., 0], x[..., 0])
    torch.testing.assert_close(high[..., 2] - x[..., 2], torch.full((1, 3, 1), 2.4 * LEVEL))
    tenths = torch.arange(1, 11).view(1, 1, 1, -1) / 10
    many = torch.full((1, 1, 1, 10), 100, dtype=torch.uint8)
    assert (to_levels(torch.ones(many.shape), many, 10, tenths) - 100).flatten().tolist() == list(
        range(1, 11)
    )


@pytest.mark.parametrize("levels", [-1, 33, 2.0, True, "8"])
def test_impossible_budgets(levels: object) -> None:
    with pytest.raises(UserError, match="whole number from 0 to 32"):
        check_levels(levels)  # type: ignore[arg-type]


def test_the_share_of_a_pixel_is_rounded_down_but_not_by_rounding_errors() -> None:
    """A quarter of 8 levels is 2 and a little less is 1, on devices without float64 too."""
    pixels = torch.full((1, 1, 1, 4), 100, dtype=torch.uint8)
    weight = torch.tensor([0.25, 0.2499, 0.1 * 10 - 1e-7, 0.0]).view(1, 1, 1, 4)
    q = to_levels(as_signed(pixels) + 1, pixels, 8, weight)
    assert (q - pixels).flatten().tolist() == [2, 1, 8, 0]
    assert q.device == pixels.device


def test_a_constant_change_survives_a_png_exactly() -> None:
    """Mist and Diff-Protect cut off instead of rounding: k levels became k - 1 or -k - 1."""
    pixels = torch.full((1, 3, 8, 8), 100, dtype=torch.uint8)
    for levels in (-16, -1, 1, 8):
        q = to_levels(as_signed(pixels) + levels * LEVEL, pixels, 16)
        file = io.BytesIO()
        Image.fromarray(q[0].permute(1, 2, 0).numpy()).save(file, "PNG")
        read = np.asarray(Image.open(io.BytesIO(file.getvalue())))
        assert (read.astype(int) - 100 == levels).all()


def test_symmetric_noise_has_no_mean_shift() -> None:
    """The released samples of Diff-Protect are up to 2.5 levels darker than their originals."""
    pixels = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    draws = torch.Generator().manual_seed(0)
    x = as_signed(pixels) + 8 * LEVEL * (2 * torch.rand(pixels.shape, generator=draws) - 1)
    q = to_levels(x, pixels, 8)
    assert abs(float((q.short() - pixels.short()).float().mean())) < 0.1


def test_psnr_of_unrelated_pictures_is_low() -> None:
    """In wrapping uint8 arithmetic, as Diff-Protect's, it is 28 dB for any two pictures."""
    draws = torch.Generator().manual_seed(0)
    a, b = (
        torch.randint(0, 256, (1, 3, 64, 64), generator=draws).to(torch.uint8) for _ in range(2)
    )
    assert 7 < float(psnr(a, b)) < 8


@pytest.mark.parametrize("levels", [0, 1, 8, 16])
def test_the_control_moves_every_pixel_by_the_whole_budget(levels: int) -> None:
    pixels = torch.full((2, 3, 16, 16), 128, dtype=torch.uint8)
    q = random_noise(pixels, levels, [1, 2])
    delta = q.short() - 128
    assert (delta.abs() == levels).all()
    if levels:
        assert not torch.equal(q[0], q[1])
        assert abs(float(delta.float().mean())) < 0.2 * levels
    assert torch.equal(random_noise(pixels[1:], levels, [2])[0], q[1])
    weight = torch.zeros(2, 1, 16, 16)
    assert torch.equal(random_noise(pixels, levels, [1, 2], weight), pixels)
