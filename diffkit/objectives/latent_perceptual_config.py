"""Flags of the latent perceptual loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffkit.errors import UserError
from diffkit.objectives.base import check_finite
from diffkit.perceptual.decoder_features import FeatureLoss
from diffkit.perceptual.feature_distance import Norm, Stats

__all__ = ["GateReading", "LatentPerceptualConfig"]

GateReading = Literal["snr", "noise_to_signal"]

_SHARE = 0.2


@dataclass
class LatentPerceptualConfig:
    """Weight, gate and features of the latent perceptual loss."""

    share: float | None = None
    """Part of the whole loss that the perceptual one is kept at while its weight is found, which is
    then frozen; 0.2 by default."""
    weight: float | None = None
    """A fixed weight in place of a share; the paper's is 3, which with the norm channel_norm_target
    is as much as 3 times the channels of the decoder's mid block. At 0 the loss is computed and
    logged, and the training is that without it."""
    threshold: float = 3.0
    """What the gate compares with, at every sample's time."""
    gate: GateReading = "snr"
    """Samples that have the loss: those whose alpha^2 / sigma^2 is at least the threshold (snr), or
    whose sigma / alpha is at most the threshold (noise_to_signal)."""
    blocks: int = 4
    """Up blocks of the decoder whose features are compared, besides the mid block's; a decoder of
    fewer gives all it has. 2 takes half the time of 4 and less memory."""
    norm: Norm = "spatial"
    """Features are divided by their deviation over space (spatial, the paper's), or each pixel's by
    the norm of the true ones over channels (channel_norm_target, as diffusers' script)."""
    stats: Stats = "prediction"
    """Whose deviation: the prediction's, with or without a gradient through it, the target's, or
    each map its own."""
    keep_outliers: bool = False
    """Compare the decoder's few very large activations too."""
    start: int = 0
    """First training step with the loss."""
    memory: Literal["plain", "low"] = "plain"
    """low: decode one sample at a time and keep nothing of the decoder beside the denoiser's
    activations; a decode more of time for a gated sample."""

    def check(self) -> None:
        """Raise `UserError` for impossible values, and for those that would do nothing."""
        check_finite(self, "lpl")
        if self.weight is not None and self.share is not None:
            raise UserError("lpl.share: the weight is fixed by lpl.weight; leave one of them out.")
        if self.weight is not None and not self.weight >= 0:
            raise UserError(f"lpl.weight: {self.weight} must not be negative.")
        if self.share is not None and not 0 < self.share < 1:
            raise UserError(f"lpl.share: {self.share} is not between 0 and 1.")
        if not self.threshold > 0:
            raise UserError(f"lpl.threshold: {self.threshold} must be above 0.")
        for name in ("blocks", "start"):
            if getattr(self, name) < 0:
                raise UserError(f"lpl.{name}: {getattr(self, name)} must not be negative.")
        if self.norm != "spatial" and self.stats != "prediction":
            raise UserError(
                f"lpl.stats: {self.norm} divides by no deviation; leave it out, or use --lpl.norm "
                "spatial."
            )

    def target_share(self) -> float | None:
        """The share that decides the weight; None for a fixed weight."""
        if self.weight is not None:
            return None
        return _SHARE if self.share is None else self.share

    def features(self) -> FeatureLoss:
        """Which features are compared, and how."""
        return FeatureLoss(self.blocks, self.norm, self.stats, masked=not self.keep_outliers)

    def against_inflation(self) -> tuple[str, str]:
        """Why predicted features may vary more than true ones (a clause), and what helps."""
        less = f"a lower --lpl.{'share' if self.weight is None else 'weight'}"
        if self.norm == "spatial" and self.stats == "prediction":
            cause = ": the loss falls by inflating them"
            return cause, f"{less} or --lpl.stats prediction_detached"
        if self.stats == "own":
            return ", which --lpl.stats own does not see", f"{less} or --lpl.stats target"
        return "", less
