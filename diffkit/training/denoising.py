"""Configuration of plain denoising training, which other methods build on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.denoising import DenoisingConfig, DenoisingObjective
from diffkit.training.config import TrainConfig

__all__ = ["DenoisingTraining", "build_denoising"]


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


def build_denoising(
    model: LatentDiffusion, config: DenoisingTraining, lora: str | None
) -> DenoisingObjective:
    """The objective of `denoising`."""
    return DenoisingObjective(model, config.denoising, lora)
