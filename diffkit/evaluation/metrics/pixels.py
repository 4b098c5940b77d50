"""Metrics of the pixels themselves: detail, and distances to the other set's same picture."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkit.evaluation.metrics.base import SampleBatch, SampleMetric, Situation
from diffkit.evaluation.metrics.tools import Toolbox
from diffkit.perceptual import pixels
from diffkit.perceptual.spectra import high_frequency_energy

__all__ = ["HIGH_FREQUENCY", "LATENT_LPIPS", "LPIPS", "PSNR", "SSIM"]


def high_frequency(batch: SampleBatch, tools: Toolbox) -> Tensor:
    """Share (B,) of the spectral power above half of Nyquist, see `spectra`."""
    return high_frequency_energy(batch.images).float().cpu()


def psnr(batch: SampleBatch, tools: Toolbox) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB over the range of 8-bit pixels, at most 100."""
    return pixels.psnr(batch.images, _other(batch)).cpu()


def ssim(batch: SampleBatch, tools: Toolbox) -> Tensor:
    """Structural similarity (B,), Wang et al. 2004, on pixels in [0, 1], Gaussian window 11."""
    return pixels.ssim(batch.images, _other(batch)).cpu()


def lpips(batch: SampleBatch, tools: Toolbox) -> Tensor:
    """Learned perceptual distance (B,), Zhang et al. 2018, package lpips."""
    with torch.no_grad():
        values: Tensor = tools.lpips(batch.images, _other(batch))
    return values.reshape(-1).float().cpu()


def latent_lpips(batch: SampleBatch, tools: Toolbox) -> Tensor:
    """LatentLPIPS (B,) on the embedded model's latents, Kang et al. 2024, without augmentation."""
    values: Tensor = tools.latent_lpips(batch.images, _other(batch))
    return values.float().cpu()


def _other(batch: SampleBatch) -> Tensor:
    assert batch.other is not None  # the metrics' `needs` has made sure of it
    return batch.other


def _no_lpips(situation: Situation) -> str | None:
    from diffkit.errors import UserError

    try:
        situation.tools.lpips  # noqa: B018  # loads it, or says what is missing
    except UserError as error:
        return str(error)
    return None


HIGH_FREQUENCY = SampleMetric(
    "high_frequency",
    "high-frequency energy",
    None,
    frozenset(),
    "Share of a picture's detail above half the highest frequency. Blur lowers it, noise raises "
    "it; compare with that of the real pictures.",
    run=high_frequency,
)
PSNR = SampleMetric(
    "psnr",
    "PSNR to the other set's picture, dB",
    "higher",
    frozenset({"against"}),
    "How near the pictures of both sets from the same noise are, pixel by pixel.",
    run=psnr,
)
SSIM = SampleMetric(
    "ssim",
    "SSIM to the other set's picture",
    "higher",
    frozenset({"against"}),
    "How alike the pictures of both sets from the same noise are in local structure; 1 is equal.",
    run=ssim,
)
LPIPS = SampleMetric(
    "lpips",
    "LPIPS to the other set's picture",
    "lower",
    frozenset({"against", "lpips"}),
    "How different the pictures of both sets from the same noise look to a network; 0 is equal.",
    refuse=_no_lpips,
    run=lpips,
)
LATENT_LPIPS = SampleMetric(
    "latent_lpips",
    "LatentLPIPS to the other set's picture",
    "lower",
    frozenset({"against", "latent_lpips"}),
    "How different the latents of both sets' pictures from the same noise look to a network that "
    "learnt on pictures of the embedded model's kind, and says little about others; 0 is equal.",
    run=latent_lpips,
)
