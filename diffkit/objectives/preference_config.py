"""The values of preference optimisation, and the combinations of them that cannot work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from diffkit.errors import UserError
from diffkit.objectives.base import check_finite
from diffkit.objectives.denoising import DenoisingConfig

__all__ = ["PreferenceConfig", "check_draws"]

Loss = Literal[
    "dpo",
    "cdpo",
    "rdpo",
    "hinge",
    "ipo",
    "simpo",
    "alpha_dpo",
    "adaptive_dpo",
    "adaptive_ipo",
]

_KAPPA, _KAPPA_NUMBERS = 2500.0, 4 * 64 * 64
_IPO_BETA = 100.0
_PIXEL_WEIGHT = 2.0


@dataclass
class PreferenceConfig:
    """Loss of the pairs, reference, guards, and the loss of decoded pictures."""

    loss: Loss = "dpo"
    """Diffusion-DPO (dpo), with smoothed (cdpo) or unbiased (rdpo) labels; hinge; ipo; simpo, which
    has no reference; alpha_dpo; Adaptive-DPO (adaptive_dpo), and its weights on ipo
    (adaptive_ipo)."""
    kappa: float | None = None
    """What multiplies the difference of mean squared errors: by default 2500, half of Salesforce's
    beta 5000, for latents of 4 x 64 x 64 numbers and more, and less in proportion for smaller ones,
    whose means are noisier (312 for 2048 numbers). simpo by default measures it over its first 50
    steps, so that the middle pair has a logit of about 0.5, and then keeps it."""
    flip_rate: float | None = None
    """Share q of wrong labels that cdpo and rdpo reckon with, below 0.5."""
    ipo_beta: float | None = None
    """ipo's target of the difference of mean errors is 1 / (2 beta); 100 by default. Its loss is
    multiplied by kappa beta / 2, which gives it dpo's slope where training starts."""
    sdpo: bool = False
    """Scale the loser's gradient down where it would raise the winner's error (Diffusion-SDPO)."""
    anchor: float = 0.0
    """Adds anchor x kappa x the winner's error to the loss; 0.01 to 0.1 holds it."""
    drift_limit: float | None = 1.1
    """The run stops when the winners' error is this many times the start model's, on average over
    the last steps; None to go on whatever happens."""
    timesteps: tuple[int, ...] = ()
    """The only times to train at, such as 249 499 749 999 for Turbo models; all by default."""

    pixel: Literal["none", "dpo", "simpo"] = "none"
    """Adds the same of errors between decoded pictures (pixel-space post-training), against the
    reference (dpo) or without (simpo)."""
    pixel_weight: float | None = None
    """Weight of that loss; 2 by default."""
    pixel_kappa: float | None = None
    """Its kappa; measured over the first 50 steps by default."""
    pixel_crop: int | None = None
    """Edge in latent pixels of a random window of both pictures of a pair, to decode less."""
    pixel_relative: bool = False
    """Divide each picture's error by the picture's variance, for pairs that differ in contrast."""

    def check(self) -> None:
        """Raise `UserError` for impossible values, and for those that would do nothing."""
        check_finite(self, "preference")
        self._check_ranges()
        labels = self.loss in ("cdpo", "rdpo")
        if labels and self.flip_rate is None:
            raise UserError(f"preference.flip_rate: {self.loss} needs the share of wrong labels.")
        if not labels and self.flip_rate is not None:
            raise UserError(
                f"preference.flip_rate: {self.loss} reckons with no wrong labels; use it with "
                "--preference.loss cdpo or rdpo."
            )
        if self.ipo_beta is not None and not self.loss.endswith("ipo"):
            raise UserError(
                f"preference.ipo_beta: is not for {self.loss}; use it with --preference.loss ipo."
            )
        if len(set(self.timesteps)) < len(self.timesteps):
            raise UserError("preference.timesteps: names a time twice.")
        self._check_pixel()

    def _check_ranges(self) -> None:
        for name in ("kappa", "ipo_beta", "pixel_weight", "pixel_kappa", "pixel_crop"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"preference.{name}: {value} must be above 0.")
        if self.flip_rate is not None and not 0 <= self.flip_rate < 0.5:
            raise UserError(f"preference.flip_rate: {self.flip_rate} is not in [0, 0.5).")
        if not self.anchor >= 0:
            raise UserError(f"preference.anchor: {self.anchor} must not be negative.")
        if self.drift_limit is not None and not self.drift_limit > 1:
            raise UserError(
                f"preference.drift_limit: {self.drift_limit} must be above 1, where every run "
                "starts."
            )

    def _check_pixel(self) -> None:
        if self.pixel == "none":
            for name in ("pixel_weight", "pixel_kappa", "pixel_crop", "pixel_relative"):
                if getattr(self, name):
                    raise UserError(
                        f"preference.{name}: no picture is decoded; add --preference.pixel simpo "
                        "or dpo."
                    )
            return
        if self.loss == "simpo" and self.pixel == "dpo":
            raise UserError(
                "preference.pixel: dpo compares with a reference, which simpo has not; use "
                "--preference.pixel simpo, or another --preference.loss."
            )
        if self.adaptive:
            raise UserError(
                f"preference.pixel: {self.loss} judges pairs by their latent errors alone; use it "
                "with another --preference.loss."
            )
        if self.sdpo:
            raise UserError(
                "preference.sdpo: holds the winner's latent error, which the pixel loss moves as "
                "well; leave one of the two out."
            )

    @property
    def adaptive(self) -> bool:
        """Whether pairs are weighed by annotators."""
        return self.loss.startswith("adaptive")

    @property
    def referenced(self) -> bool:
        """Whether the loss compares with the start model."""
        return self.loss != "simpo"

    def resolved(self, numbers: int) -> PreferenceConfig:
        """With the kappa of latents of so many numbers; None remains where it is measured.

        2500 min(1, numbers / 16384): a mean over more numbers varies less, and a logit in the
        proportion of a sum keeps its size. SDXL's 4 x 128 x 128 were published with 2500 as well.
        """
        if self.kappa is not None or not self.referenced:
            return self
        return replace(self, kappa=_KAPPA * min(1.0, numbers / _KAPPA_NUMBERS))

    @property
    def used_ipo_beta(self) -> float:
        """beta of IPO."""
        return _IPO_BETA if self.ipo_beta is None else self.ipo_beta

    @property
    def used_pixel_weight(self) -> float:
        """mu; 0 where no picture is decoded."""
        if self.pixel == "none":
            return 0.0
        return _PIXEL_WEIGHT if self.pixel_weight is None else self.pixel_weight


def check_draws(config: PreferenceConfig, denoising: DenoisingConfig) -> None:
    """Raise `UserError` for values of denoising training that preference losses do not take."""
    denoising.check()
    if denoising.min_snr is not None:
        raise UserError(
            "denoising.min_snr: weighs the denoising loss, and preference losses compare plain "
            "errors; leave it out."
        )
    usual = DenoisingConfig()
    names = ("density", "logit_mean", "logit_std", "log_mean", "log_std")
    if config.timesteps and any(getattr(denoising, n) != getattr(usual, n) for n in names):
        raise UserError(
            "preference.timesteps: times out of a list have no density; leave one of the two out."
        )
