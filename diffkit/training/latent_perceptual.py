"""Configuration of training with the latent perceptual loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.latent_perceptual import LatentPerceptualObjective
from diffkit.objectives.latent_perceptual_config import LatentPerceptualConfig
from diffkit.training.denoising import DenoisingTraining

__all__ = ["LatentPerceptualTraining", "build_latent_perceptual"]


@dataclass
class LatentPerceptualTraining(DenoisingTraining):
    """Train a finished model on for sharper detail: denoising with the latent perceptual loss."""

    learning_rate: float = 1e-5
    """Peak learning rate; that of the end of the model's own training is right."""
    ema: float | None = 0.999
    """Decay of a moving average of the weights, which is then the result; None for none."""
    lpl: LatentPerceptualConfig = field(default_factory=LatentPerceptualConfig)

    def check(self) -> None:
        """Raise `UserError` for values and combinations that cannot work."""
        self.lpl.check()
        super().check()
        if self.lpl.start >= self.max_steps:
            raise UserError(
                f"lpl.start: {self.lpl.start} is not below max_steps = {self.max_steps}, so the "
                "loss would never come in."
            )


def build_latent_perceptual(
    model: LatentDiffusion, config: LatentPerceptualTraining, lora: str | None
) -> LatentPerceptualObjective:
    """The objective of `lpl`."""
    return LatentPerceptualObjective(model, config.lpl, config.denoising, lora)
