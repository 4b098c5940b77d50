"""What preference optimisation keeps from step to step: running means of the steps before.

All are of means over the global batch, so they do not depend on how it is split; a step uses those
of the steps before it only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkit.objectives.adaptive_dpo import AdaptiveConfig, rms_norm
from diffkit.objectives.preference_config import PreferenceConfig

__all__ = ["ANNOTATORS", "CALIBRATION_STEPS", "Controls", "PreferenceState", "RunningMean"]

ANNOTATORS = ("policy", "slow", "fast")
"""Of Adaptive-DPO: the model in training, and its two moving averages."""

CALIBRATION_STEPS = 50
"""First steps, over which a kappa is measured that is not given."""

_MEAN_LOGIT = 0.6
"""Mean |kappa s| that a measured kappa aims at: the median of |x| is 0.85 of its mean if x is
normal, and 0.69 if it is Laplace's, so the median pair has a logit of 0.42 to 0.51. A median would
need all pairs in one place; a mean does not."""

_SQUARES, _DRIFT, _MARGIN = 0.99, 0.95, 0.99
_MU = 0.9999
_LEAST = 1e-12


class RunningMean:
    """sum_k decay^(n-k) x_k / sum_k decay^(n-k): an average without the bias of its start.

    decay 1 is the plain mean of all x, 0 the last x.
    """

    def __init__(self, decay: float, device: torch.device, shape: tuple[int, ...] = ()) -> None:
        self.decay = decay
        self.sum = torch.zeros(shape, device=device)
        self.count = torch.zeros((), device=device)

    def update(self, value: Tensor) -> None:
        """Take in the next x, of the mean's shape."""
        self.sum.mul_(self.decay).add_(value)
        self.count.mul_(self.decay).add_(1)

    def value(self, without: float = 0.0) -> Tensor:
        """The mean; `without` before the first x."""
        known = self.count > 0
        return torch.where(known, self.sum / torch.where(known, self.count, 1.0), without)


@dataclass(frozen=True)
class Controls:
    """Numbers of one step, without dimensions unless said otherwise.

    Attributes:
        kappa, pixel_kappa: of the two losses; 0 while nothing is known to measure them by.
        alpha: of alpha-DPO.
        norm: of the annotators' s, (M,).
        mean: of s, for the margin of Adaptive-DPO.
        warm: the weights of Adaptive-DPO are still 1.
    """

    kappa: Tensor
    pixel_kappa: Tensor
    alpha: Tensor
    norm: Tensor
    mean: Tensor
    warm: bool


class PreferenceState:
    """The running means of a run, and the controls that follow from them.

    Arguments:
        config, adaptive: of the loss; a kappa of None is measured.
        warmup: first steps with W = 1.
        device: where the means lie.
    """

    def __init__(
        self, config: PreferenceConfig, adaptive: AdaptiveConfig, warmup: int, device: torch.device
    ) -> None:
        self.config = config
        self.warmup = warmup
        self._device = device
        self.means: dict[str, RunningMean] = {}
        rms = config.adaptive and adaptive.normalization == "rms"
        if rms:
            self._add("squares", _SQUARES, (len(ANNOTATORS),))
        if rms and adaptive.margin != "off":
            self._add("margin", _MARGIN)
        if config.loss == "alpha_dpo":
            self._add("probability", 0.0)
        if config.kappa is None:
            self._add("difference", 1.0)
        if config.pixel == "simpo" and config.pixel_kappa is None:
            self._add("pixel_difference", 1.0)
        if config.pixel == "dpo" and config.pixel_kappa is None:
            self._add("pixel_gain", 1.0, (2,))
        if config.referenced or config.drift_limit is not None:
            self._add("winner_drift", _DRIFT, (2,))

    def _add(self, name: str, decay: float, shape: tuple[int, ...] = ()) -> None:
        self.means[name] = RunningMean(decay, self._device, shape)

    def watched(self) -> tuple[str, ...]:
        """Terms of which the means are taken."""
        names: list[str] = []
        if "squares" in self.means:
            names += [f"square_{name}" for name in ANNOTATORS]
        if "pixel_gain" in self.means:
            names += ["winner_error", "pixel_winner_error"]
        alike = ("margin", "probability", "difference", "pixel_difference", "winner_drift")
        return (*names, *(name for name in alike if name in self.means))

    def update(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Take in the global means of step `step` = 0, 1, ..."""
        several = {
            "squares": [f"square_{name}" for name in ANNOTATORS],
            "pixel_gain": ["winner_error", "pixel_winner_error"],
        }
        for name, mean in self.means.items():
            if mean.decay == 1 and step >= CALIBRATION_STEPS:
                continue
            parts = several.get(name)
            mean.update(torch.stack([terms[x] for x in parts]) if parts else terms[name])

    def controls(self, step: int) -> Controls:
        """What step `step` goes by."""
        kappa = self._kappa()
        squares = self._value("squares").expand(len(ANNOTATORS))
        # Before the first step the model is its own reference, which gives every pair 1/2.
        alpha = _MU * self._value("probability", without=0.5)
        warm = step < self.warmup
        mean = self._value("margin")
        return Controls(kappa, self._pixel_kappa(kappa), alpha, rms_norm(squares), mean, warm)

    def _value(self, name: str, without: float = 0.0) -> Tensor:
        """A running mean; `without` where it is not kept, or not known yet."""
        if name not in self.means:
            return torch.full((), without, device=self._device)
        return self.means[name].value(without)

    def _kappa(self) -> Tensor:
        fixed = self.config.kappa
        return self._measured("difference") if fixed is None else self._number(fixed)

    def _pixel_kappa(self, kappa: Tensor) -> Tensor:
        """So that decoded differences have the logits of latent ones, or those of `_MEAN_LOGIT`."""
        if self.config.pixel_kappa is not None:
            return self._number(self.config.pixel_kappa)
        if self.config.pixel == "simpo":
            return self._measured("pixel_difference")
        latent, decoded = self._value("pixel_gain").expand(2)
        return kappa * latent / decoded.clamp_min(_LEAST)

    def _number(self, value: float) -> Tensor:
        return torch.full((), value, device=self._device)

    def _measured(self, name: str) -> Tensor:
        # 0 in the first step, which only measures its pairs.
        mean = self.means[name]
        return torch.where(mean.count > 0, _MEAN_LOGIT / mean.value().clamp_min(_LEAST), 0.0)

    def drift(self) -> float | None:
        """Running ratio of the winners' errors to the start model's; None if it is not kept."""
        if "winner_drift" not in self.means:
            return None
        # Steps without a look at the start model add two zeros, which leave the ratio as it is.
        own, reference = self.means["winner_drift"].value().tolist()
        return float(own / reference) if reference else None

    def tensors(self) -> dict[str, Tensor]:
        """All means, for a checkpoint."""
        found: dict[str, Tensor] = {}
        for name, mean in self.means.items():
            found |= {f"{name}.sum": mean.sum, f"{name}.count": mean.count}
        return found
