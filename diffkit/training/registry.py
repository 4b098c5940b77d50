"""The methods that `diffkit train` knows: the configuration of each and how to make it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.base import Objective
from diffkit.objectives.denoising import DenoisingConfig, DenoisingObjective
from diffkit.training.config import TrainConfig
from diffkit.training.personal import (
    DreamBoothLoraTraining,
    DreamBoothTraining,
    TextualInversionTraining,
    build_dreambooth,
    build_textual_inversion,
)

__all__ = ["METHODS", "DenoisingTraining", "Method", "method_of"]


@dataclass
class DenoisingTraining(TrainConfig):
    """Fine-tune the denoiser on pictures and captions, all weights or a LoRA."""

    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)

    def needs_captions(self) -> bool:
        """Unless all of them are dropped."""
        return self.denoising.condition_dropout != 1

    def canonical(self) -> DenoisingTraining:
        """With the canonical form of the method's own values."""
        return replace(self, denoising=self.denoising.canonical())

    def check(self) -> None:
        """Raise `UserError` for values and combinations that cannot work."""
        super().check()
        self.denoising.check()


def _denoising(
    model: LatentDiffusion, config: DenoisingTraining, lora: str | None
) -> DenoisingObjective:
    return DenoisingObjective(model, config.denoising, lora)


@dataclass(frozen=True)
class Method:
    """One word of `diffkit train`.

    Attributes:
        config: the common flags and the method's own, nested under its name.
        build: (model, config, name of the trained LoRA or None) -> the objective.
    """

    config: type[TrainConfig]
    build: Callable[..., Objective]


METHODS: dict[str, Method] = {
    "denoising": Method(DenoisingTraining, _denoising),
    "dreambooth": Method(DreamBoothTraining, build_dreambooth),
    "dreambooth_lora": Method(DreamBoothLoraTraining, build_dreambooth),
    "textual_inversion": Method(TextualInversionTraining, build_textual_inversion),
}


def method_of(config: TrainConfig) -> Method:
    """The method whose configuration this is."""
    return next(method for method in METHODS.values() if method.config is type(config))
