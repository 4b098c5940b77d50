"""PSNR, SSIM and MS-SSIM: closed forms, and no arithmetic modulo 256."""

from __future__ import annotations

import math

import pytest
import torch

from diffkit import randomness
from diffkit.perceptual.pixels import MS_SSIM_SIDE, ms_ssim, psnr, ssim, why_no_ms_ssim


def uniform(purpose: str, side: int = 64, count: int = 2) -> torch.Tensor:
    return randomness.integers(0, 256, (count, 3, side, side), purpose).to(torch.uint8)


def test_two_independent_pictures_have_under_8_decibels():
    """E (x - y)^2 = 1/6 on [0, 1], 7.78 dB; uint8 differences would wrap to 28."""
    found = psnr(uniform("a"), uniform("b"))
    assert found.shape == (2,) and found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((2,), 10 * math.log10(6)), atol=0.2, rtol=0)


def test_psnr_of_one_level_both_ways():
    low = uniform("a").clamp(max=254)
    for pair in ((low, low + 1), (low + 1, low)):
        torch.testing.assert_close(psnr(*pair), torch.full((2,), 20 * math.log10(255)))


def test_floats_and_pixels_agree():
    a, b = uniform("a"), uniform("b")
    signed = [x.float() / 127.5 - 1 for x in (a, b)]
    for metric in (psnr, ssim):
        torch.testing.assert_close(metric(*signed), metric(a, b), atol=1e-5, rtol=0)
        torch.testing.assert_close(metric(signed[0], b), metric(a, b), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (6, 40), (301, 17)])
def test_ssim_is_that_of_torchmetrics(monkeypatch, height, width):
    """Strip by strip: torchmetrics unfolds all windows at once, 58 GB at 12 megapixels."""
    metrics = pytest.importorskip("torchmetrics.functional.image")
    monkeypatch.setattr("diffkit.perceptual.pixels._STRIP", 64 * 7)
    a = randomness.integers(0, 256, (2, 3, height, width), "a").to(torch.uint8)
    b = (a.int() + randomness.integers(-30, 31, a.shape, "b")).clamp(0, 255).to(torch.uint8)
    b[1] = 255 - b[1]
    pair = [x.double() / 255 for x in (a, b)]
    expected = metrics.structural_similarity_index_measure(*pair, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssim(a, b).double(), expected, atol=1e-6, rtol=0)
    assert -1 <= float(ssim(a, b).min()) < 0 < float(ssim(a, b).max()) < 1
    assert ssim(a[..., :5, :], b[..., :5, :]).isnan().all()


def test_equal_pictures():
    a = uniform("a", MS_SSIM_SIDE, 1)
    assert psnr(a, a).tolist() == [100.0]
    for metric in (ssim, ms_ssim):
        torch.testing.assert_close(metric(a, a), torch.ones(1), atol=1e-6, rtol=0)


def test_ms_ssim_of_plain_pictures():
    """Only the luminance of the last scale differs from 1, to its weight 0.1333."""
    a, b = 51 / 255, 153 / 255
    expected = ((2 * a * b + 1e-4) / (a * a + b * b + 1e-4)) ** 0.1333
    one = torch.full((1, 3, MS_SSIM_SIDE, MS_SSIM_SIDE + 9), 51, dtype=torch.uint8)
    assert ms_ssim(one, 3 * one).item() == pytest.approx(expected, abs=1e-4)


def test_small_pictures_have_no_ms_ssim():
    assert ms_ssim(uniform("a"), uniform("b")).isnan().tolist() == [True, True]
    assert "at least 176" in why_no_ms_ssim(175, 500)
    assert why_no_ms_ssim(176, 176) is None


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="of one shape"):
        psnr(uniform("a", 32), uniform("b", 64))
    with pytest.raises(ValueError, match="of one shape"):
        psnr(uniform("a")[0], uniform("b")[0])
