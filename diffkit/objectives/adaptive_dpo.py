"""Adaptive-DPO (Zhang et al. 2025, arXiv:2503.16921): pairs weighed by the models' own doubts.

M annotators m (the model, and a slow and a fast moving average of it) see the same noisy pictures:

    l_m = rho s_m / |s_m|                    s_m = d_ref - d_m, one value a pair
    C   = | mean_m sigmoid(l_m) - 1 |        intra-annotator confidence (equation 11)
    V   = min(std_m l_m, 1)                  inter-annotator stability (equation 12)
    u   = C V, or C                          minority metric (equation 13)
    W   = 1 / (k1 u + c1)                    weight of the pair (equation 14)
    G   = kappa mean(s_0) - k2 u^2           margin (equation 15, which has k2 = 1 / kappa)
    L   = -W log sigmoid(kappa s_0 - G)

u, W and G carry no gradient. The published code takes |s_m| over the batch, which leaves entries of
about 1 / sqrt(B): rho = 15 then means 3.75 for the 16 pairs of its batches, 0.94 for 256, and
nothing at all for one. Instead |s_m| can be 4 R_m with R_m a running root mean square: the norm
of 16 pairs of that size, whatever the batch. A step goes by the steps before it, so that neither
processes nor parts of a batch come in; while s still grows R_m lags behind it, and rho is sharper
than said: if s grows in proportion to the steps, by 1.6 times at the 100th and 2 at the 6th.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor, distributed
from torch.nn.functional import softplus

from diffkit.errors import UserError
from diffkit.objectives.base import check_finite

__all__ = [
    "AdaptiveConfig",
    "Judgement",
    "adaptive_dpo_loss",
    "adaptive_margin",
    "annotator_logits",
    "batch_statistics",
    "confidence",
    "judge",
    "minority",
    "rms_norm",
    "stability",
    "weights",
]

Stability = Literal["std", "none"]
Weighting = Literal["linear", "quadratic", "sigmoid", "sqrt"]
Margin = Literal["off", "linear", "quadratic"]

USUAL_BATCH = 16
"""Pairs of a batch for which the paper's rho = 15 was chosen."""


@dataclass
class AdaptiveConfig:
    """How Adaptive-DPO finds doubtful pairs and what it does with them."""

    stability: Stability = "none"
    """What of the annotators enters the minority metric u: their confidence alone (none), or that
    times their spread (std), as published. A pair that all get wrong alike has little spread, so
    with std it keeps its weight."""
    normalization: Literal["rms", "batch"] = "rms"
    """Scale of the annotators' logits: a running root mean square, or, as published, the norm over
    the batch, with which u depends on the batch size."""
    rho: float = 15.0
    """Sharpness of the annotators' logits, for 16 pairs."""
    weighting: Weighting = "linear"
    """W(u): linear 1/(k1 u + c1), quadratic 1/(k1 u^2 + c1), sigmoid 1/(exp(k1 u) + c1), sqrt
    1/(exp(k1 sqrt(u)) + c1). The last two give 1/2 at u = 0 with c1 = 1."""
    slope: float = 10.0
    """k1 of the weights."""
    intercept: float = 1.0
    """c1 of the weights."""
    margin: Margin = "off"
    """Margin G subtracted from kappa s: kappa mean(s) - k2 u (linear) or - k2 u^2 (quadratic)."""
    margin_scale: float = 1.0
    """k2 of the margin. As published it would be 1 / kappa, which is nothing."""
    warmup_steps: int | None = None
    """First steps, in which every pair has W = 1; a tenth of max_steps by default, at least 2."""
    slow: float = 0.9999
    """Decay of the slow annotator."""
    fast: float = 0.5
    """Decay of the fast annotator."""

    def check(self) -> None:
        """Raise `UserError` for impossible values, and for those that would do nothing."""
        check_finite(self, "adaptive")
        for name in ("rho", "intercept", "margin_scale"):
            if not getattr(self, name) > 0:
                raise UserError(f"adaptive.{name}: {getattr(self, name)} must be above 0.")
        if not self.slope >= 0:
            raise UserError(f"adaptive.slope: {self.slope} must not be negative.")
        for name in ("slow", "fast"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"adaptive.{name}: {getattr(self, name)} is not in [0, 1).")
        if self.margin == "off" and self.margin_scale != 1:
            raise UserError("adaptive.margin_scale: add --adaptive.margin linear or quadratic.")
        least = 2 if self.normalization == "rms" else 0
        if self.warmup_steps is not None and self.warmup_steps < least:
            raise UserError(
                f"adaptive.warmup_steps: {self.warmup_steps} is too small; it must be at least "
                f"{least}" + (", for the running mean square to be known." if least else ".")
            )

    def changed(self) -> str | None:
        """The name of a value that is not the default; None if all are."""
        usual = AdaptiveConfig()
        names = (f.name for f in fields(self) if getattr(self, f.name) != getattr(usual, f.name))
        return next(names, None)

    def warmup(self, max_steps: int) -> int:
        """Steps with W = 1 of a run of `max_steps`."""
        return max(2, max_steps // 10) if self.warmup_steps is None else self.warmup_steps


# -- mathematics --------------------------------------------------------------------------------


@torch.no_grad()
def batch_statistics(s: Tensor) -> tuple[Tensor, Tensor]:
    """(|s_m| (M,), mean of s_0) of s (M, B), over the pairs of all processes; a collective call."""
    sums = torch.cat([s.square().sum(1), s[0].sum()[None], s.new_full((1,), s.shape[1])])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
    return sums[:-2].sqrt(), sums[-2] / sums[-1]


def rms_norm(mean_square: Tensor) -> Tensor:
    """4 R_m, (M,): the norm that 16 pairs have whose mean square is `mean_square`, R_m^2 (M,)."""
    return (USUAL_BATCH * mean_square.detach()).sqrt()


def annotator_logits(s: Tensor, norm: Tensor, rho: float) -> Tensor:
    """l_m = rho s_m / max(norm_m, 1e-12), (M, B); 0 where a model is the reference.

    Arguments:
        s: s_m of every annotator, (M, B).
        norm: (M,), of `batch_statistics` or `rms_norm`.
        rho: sharpness for 16 pairs.
    """
    return rho * s.detach() / norm.clamp_min(1e-12)[:, None]


def confidence(logits: Tensor) -> Tensor:
    """C = |mean_m sigmoid(l_m) - 1|, (B,) in [0, 1]: how surely the label is contradicted."""
    return torch.sigmoid(-logits).mean(0)


def stability(logits: Tensor) -> Tensor:
    """V = min(std_m l_m, 1), (B,): how much annotators differ; the unbiased deviation."""
    return logits.std(0).clamp_max(1.0)


def minority(logits: Tensor, kind: Stability) -> Tensor:
    """u = C V with "std", C with "none"; (B,) in [0, 1]."""
    return confidence(logits) * stability(logits) if kind == "std" else confidence(logits)


def weights(u: Tensor, kind: Weighting, slope: float, intercept: float) -> Tensor:
    """W(u), (B,), see `AdaptiveConfig.weighting`."""
    growth = {
        "linear": lambda: slope * u,
        "quadratic": lambda: slope * u.square(),
        "sigmoid": lambda: torch.exp(slope * u),
        "sqrt": lambda: torch.exp(slope * u.sqrt()),
    }
    return 1 / (growth[kind]() + intercept)


def adaptive_margin(u: Tensor, kind: Margin, scale: float, mean_logit: Tensor) -> Tensor:
    """G, (B,): kappa mean(s) - k2 u ("linear") or - k2 u^2 ("quadratic"); 0 when "off".

    Arguments:
        mean_logit: kappa mean(s_0) over many pairs, without dimensions.
    """
    if kind == "off":
        return torch.zeros_like(u)
    return mean_logit - scale * (u if kind == "linear" else u.square())


def adaptive_dpo_loss(
    s: Tensor, kappa: float | Tensor, weight: Tensor, margin: Tensor | float = 0.0
) -> Tensor:
    """-W log sigmoid(kappa s - G), (B,); no gradient through W and G."""
    if isinstance(margin, Tensor):
        margin = margin.detach()
    return weight.detach() * softplus(margin - kappa * s)


@dataclass(frozen=True)
class Judgement:
    """What the annotators make of B pairs, without gradients: u, W and G, each (B,)."""

    u: Tensor
    weight: Tensor
    margin: Tensor


@torch.no_grad()
def judge(
    config: AdaptiveConfig, s: Tensor, norm: Tensor, mean_logit: Tensor, warm: bool = False
) -> Judgement:
    """u, W and G of pairs.

    Arguments:
        s: s_m of every annotator, (M, B).
        norm: (M,), of `batch_statistics` or `rms_norm`.
        mean_logit: kappa mean(s_0) for the margin, without dimensions.
        warm: the run is in its warm-up: u = 0 and W = 1.
    """
    u = minority(annotator_logits(s, norm, config.rho), config.stability)
    if warm:
        u = torch.zeros_like(u)
        weight = torch.ones_like(u)
    else:
        weight = weights(u, config.weighting, config.slope, config.intercept)
    margin = adaptive_margin(u, config.margin, config.margin_scale, mean_logit)
    return Judgement(u, weight, margin)
