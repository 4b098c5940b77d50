"""Power spectra of pictures: how much detail a model draws, and at which scale."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["high_frequency_energy", "power_spectrum", "ring_frequencies"]


def ring_frequencies(height: int, width: int) -> Tensor:
    """Centres of the rings of `power_spectrum`, as a share of Nyquist: (R,) float64 in (0, 1].

    R = min(height, width) // 2; ring r (from 1) is centred at r / min(height, width) cycles a
    pixel.
    """
    side = min(height, width)
    return torch.arange(1, side // 2 + 1, dtype=torch.float64) * 2 / side


def power_spectrum(images: Tensor) -> Tensor:
    """Radially averaged power of images (B, C, H, W): (B, R) float64, rings as `ring_frequencies`.

        P(f) = |DFT(w (x - m))(f)|^2 / sum(w^2)

    with w the periodic Hann window of both axes, which keeps the jump between opposite borders out
    of the high frequencies, and m the mean under w, so that P(0) = 0 and brightness plays no part.
    Averaged over the channels and over each ring; white noise of variance s^2 gives s^2 in every
    ring but the first, which loses a third with the mean. Frequencies beyond Nyquist (the
    corners of the plane) are in no ring.
    """
    power = _power(images)
    height, width = images.shape[-2:]
    side = min(height, width)
    ring = (_radius(height, width, images.device) * side / 2).round().long()
    kept = (ring >= 1) & (ring <= side // 2)
    index = ring[kept] - 1
    sums = power.new_zeros(len(images), side // 2).index_add_(1, index, power[:, kept])
    return sums / torch.bincount(index, minlength=side // 2)


def high_frequency_energy(images: Tensor, cutoff: float = 0.5) -> Tensor:
    """Share of the power of images (B, C, H, W) at `cutoff` times Nyquist and above: (B,) float64.

    In [0, 1], of the power in `power_spectrum` before the averaging, corners included, the mean of
    the picture left out; 0 for a picture of one colour. It does not change with brightness or
    contrast; blur lowers it, noise raises it.
    """
    power = _power(images)
    high = _radius(images.shape[-2], images.shape[-1], images.device) >= cutoff
    total = power.sum((1, 2))
    return power[:, high].sum(1) / torch.where(total > 0, total, 1)


def _power(images: Tensor) -> Tensor:
    """Windowed, mean-free power, averaged over the channels: (B, H, W) float64."""
    height, width = images.shape[-2:]
    rows, columns = (
        torch.hann_window(side, dtype=torch.float64, device=images.device)
        for side in (height, width)
    )
    window = torch.outer(rows, columns)
    # Relative to the first pixel, a picture of one colour is exactly zero.
    x = images.double() - images[..., :1, :1].double()
    mean = (x * window).sum((-2, -1), keepdim=True) / window.sum()
    spectrum = torch.fft.fft2(window * (x - mean))
    return spectrum.abs().square().mean(1) / window.square().sum()


def _radius(height: int, width: int, device: torch.device) -> Tensor:
    """Distance of each frequency of the plane from 0, as a share of Nyquist: (H, W) float64."""
    rows = torch.fft.fftfreq(height, 0.5, dtype=torch.float64, device=device)
    columns = torch.fft.fftfreq(width, 0.5, dtype=torch.float64, device=device)
    return torch.hypot(rows[:, None], columns[None, :])
