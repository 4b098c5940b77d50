"""Distances between feature maps: one layer of the latent perceptual loss, and what backward needs.

Spatial norm (Berrada et al., "Boosting Latent Diffusion with Perceptual Objectives", 2025, arXiv
2411.04873): per sample, channel c and kept pixels p of a mask m,

    A - Bt = (phi_hat - phi) / sd,    sd^2 = var(phi_hat) + 1e-6
    L = 1/C sum_c [ sum_p m (A - Bt)^2 / max(1, sum_p m) ]

with phi_hat the features of the prediction and phi those of the target. Autograd would keep some
ten maps in float32 for this; `feature_distance` keeps the two maps as they are, the mask and a few
numbers a channel, and has its gradient in closed form: with n kept pixels and the channel's L_c,

    dL_c / dphi_hat = 2 m / (n sd^2) ( (phi_hat - phi) - L_c (phi_hat - mean) )

where the second term is the one through sd.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffkit.errors import UserError
from diffkit.kernels import channel_distance, masked_distance
from diffkit.kernels.masked_distance import Combination, Moments, Which

__all__ = [
    "FeatureTerms",
    "Norm",
    "Stats",
    "feature_distance",
    "feature_terms",
    "reference_distance",
]

Norm = Literal["spatial", "channel_norm_target"]
Stats = Literal["prediction", "prediction_detached", "target", "own"]

VARIANCE_EPS = 1e-6
NORM_EPS = 1e-6

_WHICH: dict[str, Which] = {
    "prediction": "prediction",
    "prediction_detached": "prediction",
    "target": "target",
    "own": "joint",
}


def feature_distance(
    predicted: Tensor,
    target: Tensor,
    keep: Tensor | None = None,
    *,
    norm: Norm = "spatial",
    stats: Stats = "prediction",
) -> Tensor:
    """Distance of one layer's features, (B,) in >= float32; 0 for equal maps and for empty masks.

    Arguments:
        predicted: (B, C, H, W), any floating dtype.
        target: the same shape and dtype; no gradient reaches it.
        keep: bool (B, C, H, W); everything if None. An infinite feature makes the value NaN
            wherever it is: it is an overflow, no outlier.
        norm: "spatial" as above. "channel_norm_target" divides each pixel's channel vector of both
            maps by the norm of the target's, plus 1e-6, as LPIPS and the public script of diffusers
            do; the mask then multiplies the squared difference and `stats` must be "prediction".
        stats: whose statistics over space normalise. "prediction", the paper's, with a gradient
            through sd; "prediction_detached" without; "target": sd of phi; "own": each map by its
            own mean and sd, which cannot see a wrong offset or gain and equals 2 (1 - correlation).

    Raises:
        UserError: an unknown norm or stats, or stats that the norm does not use.
    """
    _check(norm, stats)
    if norm == "spatial":
        value: Tensor = _Spatial.apply(predicted, target.detach(), keep, stats, _WHICH[stats])[0]
    else:
        value = _ChannelNorm.apply(predicted, target.detach(), keep)
    return value


class FeatureTerms(NamedTuple):
    """A layer's distance and what is worth watching of it, each (B,).

    Attributes:
        value: `feature_distance`, the only one with a gradient.
        predicted_variance, target_variance: the sum over channels of the variance over kept pixels.
        largest: the largest (mean squared difference) / (variance of the prediction + 1e-6) of a
            channel: a nearly constant channel can outweigh all others.
    """

    value: Tensor
    predicted_variance: Tensor
    target_variance: Tensor
    largest: Tensor


def feature_terms(
    predicted: Tensor,
    target: Tensor,
    keep: Tensor | None = None,
    *,
    norm: Norm = "spatial",
    stats: Stats = "prediction",
) -> FeatureTerms:
    """`FeatureTerms` of one layer; see `feature_distance`. The maps are read once for all of them
    where the norm is "spatial"."""
    _check(norm, stats)
    target = target.detach()
    if norm == "spatial":
        which: Which = "joint" if stats == "own" else "each"
        value, *numbers = _Spatial.apply(predicted, target, keep, stats, which)
        found = Moments(*numbers)
    else:
        value = _ChannelNorm.apply(predicted, target, keep)
        found = masked_distance.moments(predicted.detach(), target, keep, "each")
    largest = (found.square / (found.var_p + VARIANCE_EPS)).amax(1)
    return FeatureTerms(value, found.var_p.sum(1), found.var_t.sum(1), largest)


def reference_distance(
    predicted: Tensor,
    target: Tensor,
    keep: Tensor | None = None,
    *,
    norm: Norm = "spatial",
    stats: Stats = "prediction",
) -> Tensor:
    """`feature_distance` written down as its formula and left to autograd: what it is tested by."""
    _check(norm, stats)
    dtype = masked_distance.arithmetic(predicted)
    p, t = predicted.to(dtype), target.detach().to(dtype)
    m = torch.ones_like(p) if keep is None else keep.to(dtype)
    count = m.sum((2, 3), keepdim=True).clamp_min(1)
    if norm == "channel_norm_target":
        change = (p - t) / (t.square().sum(1, keepdim=True).sqrt() + NORM_EPS)
    else:
        (mean_p, sd_p), (mean_t, sd_t) = (_standard(x, m, count) for x in (p, t))
        if stats == "own":
            change = (p - mean_p) / sd_p - (t - mean_t) / sd_t
        elif stats == "target":
            change = (p - t) / sd_t
        else:
            change = (p - t) / (sd_p if stats == "prediction" else sd_p.detach())
    return ((m * change.square()).sum((2, 3), keepdim=True) / count).mean((1, 2, 3))


def _standard(x: Tensor, m: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd of the kept entries of each channel."""
    mean = (m * x).sum((2, 3), keepdim=True) / count
    variance = (m * (x - mean).square()).sum((2, 3), keepdim=True) / count
    return mean, (variance + VARIANCE_EPS).sqrt()


def _check(norm: str, stats: str) -> None:
    if norm not in ("spatial", "channel_norm_target"):
        raise UserError(f"norm={norm!r} is unknown; use 'spatial' or 'channel_norm_target'")
    if stats not in _WHICH:
        raise UserError(f"stats={stats!r} is unknown; use one of {', '.join(_WHICH)}")
    if norm != "spatial" and stats != "prediction":
        raise UserError(
            f"stats={stats!r} has no effect with norm={norm!r}; leave it out or use norm='spatial'"
        )


class _Spatial(torch.autograd.Function):
    """(B,) and the `Moments` from two maps; saves them, the mask and `Combination`'s numbers."""

    @staticmethod
    def forward(
        ctx: Any,
        predicted: Tensor,
        target: Tensor,
        keep: Tensor | None,
        stats: Stats,
        which: Which,
    ) -> tuple[Tensor, ...]:
        found = masked_distance.moments(predicted, target, keep, which)
        rows, slope = (_own_values if stats == "own" else _shared_values)(found, stats)
        ctx.save_for_backward(predicted, target, keep, *slope)
        ctx.mark_non_differentiable(*found)
        return rows.mean(1), *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        predicted, target, keep, of_d, of_p, of_t, *means = ctx.saved_tensors
        scale = grad[:, None] / predicted.shape[1]
        of_t = None if of_t is None else scale * of_t
        slope = Combination(scale * of_d, scale * of_p, of_t, *means)
        return masked_distance.combine(predicted, target, keep, slope), *(None,) * 4


def _shared_values(found: Moments, stats: Stats) -> tuple[Tensor, Combination]:
    """L_c (B, C) with one sd for both maps, and its gradient."""
    sd2 = (found.var_t if stats == "target" else found.var_p) + VARIANCE_EPS
    rows, none = found.square / sd2, torch.zeros_like(sd2)
    of_d = 2 / (found.kept * sd2)
    of_p = -rows * of_d if stats == "prediction" else none
    return rows, Combination(of_d, of_p, None, none, found.mean_p, none)


def _own_values(found: Moments, stats: Stats) -> tuple[Tensor, Combination]:
    """L_c = mean (A - B)^2 with A = (p - mean_p) / sd_p and B likewise of t. With d = p - t it is

        A - B = ((d - mean_d) + g (t - mean_t)) / sd_p,    g = 1 - sd_p / sd_t,

    which, like its gradient 2 / (n sd_p) ((A - B) - q A) with q = mean (A - B) A, is exactly 0 for
    equal maps.
    """
    sd2_p, sd2_t = found.var_p + VARIANCE_EPS, found.var_t + VARIANCE_EPS
    g, cov_dt = 1 - (sd2_p / sd2_t).sqrt(), found.cov_dt
    rows = (found.var_d + 2 * g * cov_dt + g.square() * found.var_t) / sd2_p
    q = (found.var_d + cov_dt + g * (found.var_t + cov_dt)) / sd2_p
    size, mean_p, mean_t = 2 / (found.kept * sd2_p), found.mean_p, found.mean_t
    slope = Combination(size, -q * size, g * size, mean_p - mean_t, mean_p, mean_t)
    return rows.clamp_min(0), slope


class _ChannelNorm(torch.autograd.Function):
    """(B,) from two maps; saves them, the mask, and one number a pixel and a channel."""

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, target: Tensor, keep: Tensor | None) -> Tensor:
        found = channel_distance.normed(predicted, target, keep, NORM_EPS, own=False)
        ctx.save_for_backward(predicted, target, keep, found.norm_t, found.kept)
        return found.rows.mean(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        predicted, target, keep, norm_t, kept = ctx.saved_tensors
        scale = 2 * grad[:, None] / (predicted.shape[1] * kept)
        slope = channel_distance.normed_slope(
            predicted, target, keep, (None, norm_t), scale, NORM_EPS
        )
        return slope, None, None
