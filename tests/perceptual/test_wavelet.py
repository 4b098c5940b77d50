"""Doubling and halving with sym6: an orthogonal wavelet, exact reconstruction, mirrored borders."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffkit.perceptual.wavelet import MARGIN, SYM6, double, halve, resamplers


def test_the_taps_are_an_orthogonal_low_pass() -> None:
    """Sum sqrt(2); even shifts are orthonormal; h(-1) = 0 six times over, as of six moments."""
    taps = torch.tensor(SYM6, dtype=torch.float64)
    assert taps.sum().item() == pytest.approx(2**0.5, abs=1e-12)
    for shift in range(6):
        product = (taps[2 * shift :] * taps[: len(taps) - 2 * shift]).sum().item()
        assert product == pytest.approx(float(shift == 0), abs=1e-11)
    places = torch.arange(len(taps), dtype=torch.float64)
    for moment in range(6):
        alternating = (-1.0) ** places * places**moment * taps
        assert abs(alternating.sum().item()) < 1e-4


def test_halving_undoes_doubling() -> None:
    """Of the doubled map all but the ends, where the filter meets the zeros beyond."""
    x = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    n = 20 - MARGIN
    torch.testing.assert_close(halve(n) @ (double(20) @ x), x[MARGIN // 2 : MARGIN // 2 + n])


def test_doubling_is_zero_insertion_and_convolution() -> None:
    x = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    taps = torch.tensor(SYM6, dtype=torch.float64)
    spread = torch.stack([x, torch.zeros_like(x)], 1).flatten()
    kernel = (2 * taps / taps.sum()).flip(0)
    theirs = F.conv1d(F.pad(spread, (6, 5))[None, None], kernel[None, None])[0, 0]
    torch.testing.assert_close(double(9) @ x, theirs)


def test_the_border_is_mirrored() -> None:
    x = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    up, down = resamplers(5, torch.float64, torch.device("cpu"))
    padded = F.pad(x[None], (4, 4), mode="reflect")[0]
    torch.testing.assert_close(up @ x, double(13) @ padded)
    assert down.shape == (5, 22)


def test_kept_matrices_can_be_part_of_a_graph() -> None:
    """Those first made in inference mode could not be saved for a backward pass."""
    with torch.inference_mode():
        resamplers(7, torch.float32, torch.device("cpu"))
    up, _ = resamplers(7, torch.float32, torch.device("cpu"))
    x = torch.ones(7, requires_grad=True)
    (up @ x).sum().backward()
    assert x.grad is not None
