"""Configuration of pixel-space post-training."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.pixel_space import PixelConfig, PixelObjective
from diffkit.training.denoising import DenoisingTraining

__all__ = ["PixelTraining", "build_pixel"]


@dataclass
class PixelTraining(DenoisingTraining):
    """Fine-tune on a few good pictures, in latents and as the decoder shows them (pixel space)."""

    learning_rate: float = 1e-5
    """Peak learning rate; a LoRA wants about 1e-4."""
    ema: float | None = 0.999
    """Decay of a moving average of the weights; the average is then the result."""
    pixel: PixelConfig = field(default_factory=PixelConfig)

    def check(self) -> None:
        """Raise `UserError` for values and combinations that cannot work."""
        super().check()
        self.pixel.check()


def build_pixel(model: LatentDiffusion, config: PixelTraining, lora: str | None) -> PixelObjective:
    """The objective of `pixel`."""
    return PixelObjective(model, config.pixel, config.denoising, lora, config.size)
