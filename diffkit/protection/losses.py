"""What attacks maximise: pure functions of tensors, one value a sample, shape (B,), float32.

z are latents, scaled and shifted; y is what a perfect denoiser would put out for z, noise and time;
N is the number of latent elements of one picture. Sums and means are over one picture. Everything
is written as J to be ascended, so a distance that is to shrink has a minus.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "ACE_PLUS_WEIGHT",
    "MIST_WEIGHT",
    "mean_square",
    "moment_change",
    "posterior_mean",
    "prior_preservation",
    "score_distillation",
    "sum_square",
]

MIST_WEIGHT = 1e4 / 16384
"""Mist's weight 1e4 of a mean beside a sum over the 16,384 latent elements of 512 pixels: what it
is when both terms are means (Liang & Wu 2023, arXiv:2305.12683, and its code)."""

ACE_PLUS_WEIGHT = 1e2
"""Weight of the latent term of ACE+ (Zheng et al. 2023, arXiv:2310.04687, and its code)."""


def _difference(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(dtype) - b.to(dtype)).flatten(1)


def sum_square(a: Tensor, b: Tensor) -> Tensor:
    """sum (a - b)^2 of each sample: (B, ...), (B or 1, ...) -> (B,)."""
    return _difference(a, b).square().sum(1)


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """mean (a - b)^2 of each sample: (B, ...), (B or 1, ...) -> (B,)."""
    return _difference(a, b).square().mean(1)


def score_distillation(z: Tensor, residual: Tensor) -> Tensor:
    """sum z sg(r): the scalar whose gradient in z is r = eps_hat - eps (B, C, h, w).

    That is the gradient of (N/2) mean (eps_hat - eps)^2 with the denoiser's Jacobian set to the
    identity (Xue et al. 2023, arXiv:2311.12832, equation 8; Poole et al. 2022).
    """
    return (z * residual.detach()).flatten(1).sum(1)


def moment_change(moments: Tensor, start: Tensor, channels: int) -> Tensor:
    """mean (mu - mu_0)^2 + mean (log var - log var_0)^2 (PID, Li et al. 2024, arXiv:2406.15305).

    Arguments:
        moments, start: (B, 2C, h, w), or (B, C, h, w) of an encoder without a variance, whose
            second term is 0.
        channels: C.

    J and its gradient are exactly 0 at the start.
    """
    change = mean_square(moments[:, :channels], start[:, :channels])
    if moments.shape[1] > channels:
        change = change + mean_square(moments[:, channels:], start[:, channels:])
    return change


def posterior_mean(
    x0: Tensor, z_t: Tensor, now: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]
) -> Tensor:
    """Mean of q(z_s | z_t, x0) of a DDPM (Ho et al. 2020, equation 7), float32 at least.

        m = (alpha_s beta / sigma_t^2) x0 + (a sigma_s^2 / sigma_t^2) z_t,
        a = alpha_t / alpha_s,    beta = sigma_t^2 - a^2 sigma_s^2

    Arguments:
        x0: predicted or true latents (B, C, h, w).
        z_t: noised latents of the same shape.
        now: alpha and sigma at t, (B,) each.
        before: those at the earlier time s, (B,) each.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = (x.view(-1, 1, 1, 1) for x in (*now, *before))
    a = alpha_t / alpha_s
    beta = sigma_t**2 - a**2 * sigma_s**2
    return (alpha_s * beta * x0 + a * sigma_s**2 * z_t) / sigma_t**2


def prior_preservation(instance: Tensor, prior: Tensor, weight: float) -> Tensor:
    """L(instance) + w L(prior), (B,): the loss of DreamBooth (Ruiz et al. 2022, equation 2).

    Arguments:
        instance: denoising losses of the pictures, (B,).
        prior: denoising losses of pictures of their class, (B,).
        weight: w.
    """
    return instance + weight * prior
