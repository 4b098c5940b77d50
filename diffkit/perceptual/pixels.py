"""Distances between two pictures from their pixels alone, computed in floats.

Pictures are uint8, or floats in [-1, 1]. Both become float64 in [0, 1] before anything is
subtracted: a difference of uint8 arrays wraps modulo 256 and gives two unrelated pictures 28 dB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffkit.models.named_weights import optional_module

__all__ = ["MS_SSIM_SIDE", "PSNR_CEILING", "ms_ssim", "psnr", "ssim", "why_no_ms_ssim"]

PSNR_CEILING = 100.0
"""dB given to equal pictures, whose PSNR is infinite, and to nearly equal ones above it."""

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
    x, y = _same(images, other)
    error = (x - y).square().mean((1, 2, 3))
    return (-10 * error.log10()).clamp(max=PSNR_CEILING).float()


def ssim(images: Tensor, other: Tensor) -> Tensor:
    """Structural similarity (B,) float32, Wang et al. 2004, Gaussian window 11 of sigma 1.5.

    Arguments:
        images, other: (B, C, H, W), each uint8 or floats in [-1, 1]; compared on [0, 1], since the
            constants are for luminances that begin at 0, and in float64, since in float32 the
            variances of a plain area are rounding alone.

    Raises:
        UserError: torchmetrics is not installed.
    """
    functional = optional_module("torchmetrics.functional.image", "evaluate", "the metric ssim")
    x, y = _same(images, other)
    values: Tensor = functional.structural_similarity_index_measure(
        x, y, data_range=1.0, reduction="none"
    )
    return values.reshape(-1).float()


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
    if images.shape != other.shape or images.ndim != 4:
        raise ValueError(
            f"two batches (B, C, H, W) of one shape are compared, not {tuple(images.shape)} and "
            f"{tuple(other.shape)}"
        )
    return _unit(images), _unit(other).to(images.device)


def _unit(images: Tensor) -> Tensor:
    """float64 in [0, 1]."""
    if images.dtype == torch.uint8:
        return images.double() / 255
    return (images.double() + 1) / 2
