"""Spectra of noise, of a pure wave, and what blur, brightness and contrast do to them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from diffkit import randomness
from diffkit.perceptual.spectra import high_frequency_energy, power_spectrum, ring_frequencies


def noise(count: int = 4, height: int = 64, width: int = 64) -> Tensor:
    return randomness.normal((count, 3, height, width), "spectra")


def wave(cycles_down: int, cycles_across: int, height: int = 64, width: int = 64) -> Tensor:
    rows = torch.arange(height).double()[:, None] * cycles_down / height
    columns = torch.arange(width).double() * cycles_across / width
    return torch.cos(2 * math.pi * (rows + columns)).expand(1, 3, height, width)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80)])
def test_white_noise_is_flat_at_its_variance(height: int, width: int) -> None:
    spectrum = power_spectrum(0.5 * noise(60, height, width)).mean(0)
    assert spectrum.shape == ring_frequencies(height, width).shape == (min(height, width) // 2,)
    torch.testing.assert_close(spectrum[1:], torch.full_like(spectrum[1:], 0.25), rtol=0.1, atol=0)
    assert spectrum[0] == pytest.approx(0.25 * 2 / 3, rel=0.2)


@pytest.mark.parametrize(
    ("down", "across", "ring"), [(0, 5, 5), (5, 0, 5), (3, 4, 5), (20, 0, 20), (0, 31, 31)]
)
def test_a_wave_lies_in_its_ring(down: int, across: int, ring: int) -> None:
    spectrum = power_spectrum(wave(down, across))[0]
    assert int(spectrum.argmax()) == ring - 1
    # The window spreads a line over its neighbours on both sides, and no further.
    around = spectrum[max(0, ring - 3) : ring + 2].sum()
    assert float(around / spectrum.sum()) > 0.999
    assert float(ring_frequencies(64, 64)[ring - 1]) == ring / 32


def test_rings_are_round_in_pixels_whatever_the_shape() -> None:
    """A wave of 8 pixels has a quarter of Nyquist across the short and across the long side."""
    frequencies = ring_frequencies(32, 96)
    for image in (wave(4, 0, 32, 96), wave(0, 12, 32, 96)):
        assert float(frequencies[power_spectrum(image)[0].argmax()]) == 0.25


def test_power_by_hand() -> None:
    """A wave of amplitude 1 at (0, 8) of a 32 x 32 picture.

    The DFT of a Hann window of 32 is 16 at 0, -8 at +1 and -1, and 0 elsewhere. That of the wave is
    half of it around column 8 (and half around -8), times that of the window down the rows. Ring 8
    holds rows -1, 0, 1 of column 8 (radii 8.06, 8, 8.06), with powers (16 * 8)^2 / 4 at row +-1 and
    (16 * 16 / 2)^2 at row 0, hence 128^2 + 2 * 64^2; also the mirrored ones; columns 7 and 9 lie in
    other rings. The sum of the squared window is (3/8 * 32)^2 = 144.
    """
    rows = torch.arange(-16, 16).double()
    members = int((torch.hypot(rows[:, None], rows[None]).round() == 8).sum())
    peak = 2 * (128**2 + 2 * 64**2) / 144
    spectrum = power_spectrum(wave(0, 8, 32, 32))
    assert float(spectrum[0, 7]) == pytest.approx(peak / members, rel=1e-9)


@pytest.mark.parametrize("cutoff", [0.25, 0.5, 0.75])
def test_the_share_of_a_wave_is_all_or_nothing(cutoff: float) -> None:
    low, high = wave(0, round(32 * cutoff) - 2), wave(round(32 * cutoff) + 2, 0)
    assert float(high_frequency_energy(low, cutoff)) < 1e-12
    assert float(high_frequency_energy(high, cutoff)) == pytest.approx(1, abs=1e-12)


def test_share_of_white_noise_is_the_area_beyond_the_cutoff() -> None:
    """1 - pi (c / 2)^2 / 1 of the plane of frequencies, corners included."""
    share = high_frequency_energy(noise(40), 0.5).mean()
    assert float(share) == pytest.approx(1 - math.pi / 16, abs=0.005)


def test_blur_lowers_it_and_more_blur_more() -> None:
    images = noise()
    shares = [high_frequency_energy(images)]
    for sigma in (0.5, 1.0, 2.0):
        shares.append(high_frequency_energy(gaussian_blur(images, 9, sigma)))
    for sharper, softer in zip(shares, shares[1:]):
        assert bool((softer < sharper).all())


def test_brightness_and_contrast_play_no_part() -> None:
    images = noise() * 0.1
    for changed, factor in ((images + 0.7, 1), (images * 3, 9), (0.2 - images, 1)):
        torch.testing.assert_close(
            power_spectrum(changed), factor * power_spectrum(images), rtol=1e-4, atol=1e-8
        )
        torch.testing.assert_close(
            high_frequency_energy(changed), high_frequency_energy(images), rtol=1e-5, atol=0
        )


def test_a_ramp_has_no_detail() -> None:
    """Without the window the jump from the right border to the left would be high frequencies."""
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    assert float(high_frequency_energy(ramp)) < 1e-6


def test_one_colour_has_none() -> None:
    flat = torch.full((2, 3, 16, 16), 0.1)
    assert high_frequency_energy(flat).tolist() == [0, 0]
    assert float(power_spectrum(flat).max()) == 0


def test_each_picture_by_itself() -> None:
    images = noise(3)
    torch.testing.assert_close(power_spectrum(images)[1:2], power_spectrum(images[1:2]))
    assert power_spectrum(images).dtype == high_frequency_energy(images).dtype == torch.float64
