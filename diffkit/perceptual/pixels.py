"""Distances between two pictures from their pixels alone, computed in floats.

Pictures are uint8, or floats in [-1, 1]. Both become float64 in [0, 1] before anything is
subtracted: a difference of uint8 arrays wraps modulo 256 and gives two unrelated pictures 28 dB.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffkit.models.named_weights import optional_module

__all__ = ["MS_SSIM_SIDE", "PSNR_CEILING", "ms_ssim", "psnr", "ssim", "why_no_ms_ssim"]

PSNR_CEILING = 100.0
"""dB given to equal pictures, whose PSNR is infinite, and to nearly equal ones above it."""

_REACH = 5
_TAILS = [math.exp(-0.5 * (place / 1.5) ** 2) for place in range(-_REACH, _REACH + 1)]
_WINDOW = [tail / sum(_TAILS) for tail in _TAILS]
_STRIP = 1 << 17  # pixels that are compared at once

MS_SSIM_SIDE = 176
"""The smallest side of MS-SSIM: after four halvings the window of 11 must still fit."""


def psnr(images: Tensor, other: Tensor) -> Tensor:
    """10 log10(1 / mean (x - y)^2) dB over each picture, x and y in [0, 1]: (B,) float32.

    Arguments:
        images, other: (B, C, H, W), each uint8 or floats in [-1, 1].

    Returns:
        At most `PSNR_CEILING`. Two pictures of independent uniform noise have 7.78 dB, as their
        mean squared difference is 1/6.
    """
    _check(images, other)
    if images.dtype == other.dtype == torch.uint8:
        # exact: squares of whole numbers up to 255 in float32, added up in float64
        change = (images.short() - other.to(images.device).short()).float()
        error = change.square_().mean((1, 2, 3), dtype=torch.float64) / 255**2
    else:
        x, y = _same(images, other)
        error = (x - y).square().mean((1, 2, 3))
    return (-10 * error.log10()).clamp(max=PSNR_CEILING).float()


def ssim(images: Tensor, other: Tensor) -> Tensor:
    """Structural similarity (B,) float32, Wang et al. 2004, Gaussian window 11 of sigma 1.5.

        (2 m_x m_y + c1) (2 v_xy + c2) / ((m_x^2 + m_y^2 + c1) (v_x + v_y + c2)),

    with weighted means m and variances v of the window around each pixel, c1 = 0.01^2 and c2 =
    0.03^2, averaged over pixels and channels. Borders are mirrored, as in torchmetrics; NaN where a
    side has fewer than 6 pixels, too few for that.

    Arguments:
        images, other: (B, C, H, W), each uint8 or floats in [-1, 1]; compared on [0, 1], since the
            constants are for luminances that begin at 0, and in float64, since in float32 the
            variances of a plain area are rounding alone. Any size: it goes strip by strip.
    """
    _check(images, other)
    count, channels, height, width = images.shape
    if min(height, width) <= _REACH:
        return torch.full((count,), torch.nan, device=images.device)
    rows, columns = (_mirrored(length, images.device) for length in (height, width))
    total = torch.zeros(count, dtype=torch.float64, device=images.device)
    strip = max(1, _STRIP // (count * width))
    for top in range(0, height, strip):
        wanted = rows[top : top + strip + 2 * _REACH]
        parts = (part.to(images.device)[:, :, wanted][..., columns] for part in (images, other))
        total += _similarities(*map(_unit, parts)).sum((1, 2, 3))
    return (total / (channels * height * width)).float()


def _mirrored(length: int, device: torch.device) -> Tensor:
    """Indices of a line of pixels and of those that are mirrored at both ends."""
    places = torch.arange(-_REACH, length + _REACH, device=device).abs()
    return torch.where(places < length, places, 2 * (length - 1) - places)


def _similarities(x: Tensor, y: Tensor) -> Tensor:
    """The index of every whole window: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    mean_x, mean_y, xx, yy, xy = _windowed(torch.stack([x, y, x * x, y * y, x * y]))
    c1, c2 = 0.01**2, 0.03**2
    means, product = mean_x.square() + mean_y.square(), mean_x * mean_y
    variances = (xx - mean_x.square()).clamp_min(0) + (yy - mean_y.square()).clamp_min(0)
    upper = (2 * product + c1) * (2 * (xy - product) + c2)
    return upper / ((means + c1) * (variances + c2))


def _windowed(x: Tensor) -> Tensor:
    """Weighted means of all whole windows, one axis after the other."""
    for axis in (-2, -1):
        length = x.shape[axis] - len(_WINDOW) + 1
        total = torch.zeros_like(x.narrow(axis, 0, length))
        for start, weight in enumerate(_WINDOW):
            total.add_(x.narrow(axis, start, length), alpha=weight)
        x = total
    return x


def ms_ssim(images: Tensor, other: Tensor) -> Tensor:
    """Multi-scale SSIM (B,) float32, Wang et al. 2003, five scales; NaN for small pictures.

    Arguments:
        images, other: as in `ssim`. `why_no_ms_ssim` says whether a size is too small.

    Raises:
        UserError: torchmetrics is not installed.
    """
    functional = optional_module("torchmetrics.functional.image", "evaluate", "the metric ms_ssim")
    x, y = _same(images, other)
    if why_no_ms_ssim(*x.shape[-2:]):
        return torch.full((len(x),), torch.nan, device=x.device)
    values: Tensor = functional.multiscale_structural_similarity_index_measure(
        x, y, data_range=1.0, reduction="none", normalize="relu"
    )
    return values.reshape(-1).float()


def why_no_ms_ssim(height: int, width: int) -> str | None:
    """Why pictures of this size have no MS-SSIM; None where they have."""
    if min(height, width) >= MS_SSIM_SIDE:
        return None
    return f"MS-SSIM needs sides of at least {MS_SSIM_SIDE} pixels, not {width}x{height}"


def _same(images: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    _check(images, other)
    return _unit(images), _unit(other).to(images.device)


def _check(images: Tensor, other: Tensor) -> None:
    if images.shape != other.shape or images.ndim != 4:
        raise ValueError(
            f"two batches (B, C, H, W) of one shape are compared, not {tuple(images.shape)} and "
            f"{tuple(other.shape)}"
        )


def _unit(images: Tensor) -> Tensor:
    """float64 in [0, 1]."""
    if images.dtype == torch.uint8:
        return images.double() / 255
    return (images.double() + 1) / 2
