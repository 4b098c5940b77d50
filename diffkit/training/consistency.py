"""Configuration of latent consistency distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.consistency import ConsistencyObjective, prepare_student
from diffkit.objectives.consistency_config import FEW_STEPS, ConsistencyConfig
from diffkit.training.config import TrainConfig
from diffkit.training.devices import DTYPES
from diffkit.training.few_step_card import few_step_card

__all__ = ["ConsistencyTraining", "build_consistency"]

LCM_LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    "time_emb_proj",
)
"""Of U-Nets, as in LCM-LoRA (Luo et al. 2023, arXiv:2311.05556)."""


@dataclass
class ConsistencyTraining(TrainConfig):
    """Distil a model into one that samples in one to eight steps (LCM, LCM-LoRA)."""

    max_steps: int = 2000
    """Training steps in all."""
    batch_size: int = 16
    """Samples of one optimizer step, over all processes."""
    learning_rate: float = 1e-5
    """Peak learning rate: 1e-6 to 1e-5 for all weights of a large model; 1e-4 for a LoRA, which
    learns nothing at 1e-6, and for a small model."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    validation_steps: int = FEW_STEPS
    """Sampling steps of a validation picture."""
    lcd: ConsistencyConfig = field(default_factory=ConsistencyConfig)

    def prepared(self, model: LatentDiffusion) -> LatentDiffusion:
        """The student: with its few-step scheduler, and told the guidance scale.

        Raises `UserError` for a model that cannot be distilled so, and for validation pictures of
        more steps than it has.
        """
        steps = self.lcd.solver_steps
        few = model.schedule.kind == "ddpm" and self.validation_steps > steps
        if few and self.validation_prompts is not None:
            raise UserError(
                f"validation_steps: {self.validation_steps}, but a grid of {steps} solver steps "
                f"gives no more than {steps} to sample in; use --validation-steps {steps}."
            )
        return prepare_student(model, self.lcd, self.lora_rank is not None)

    def adapted(self, model: LatentDiffusion) -> tuple[str, ...] | None:
        """In a U-Net, convolutions and the time's projections too."""
        if self.lora_targets is None and model.family.denoiser == "unet":
            return LCM_LORA_TARGETS
        return self.lora_targets

    def sampling_guidance(self, model: LatentDiffusion) -> float | None:
        """That of the result: one that was trained, or 1 for a student that has it built in."""
        scale: float = self._sampling(model)["guidance_scale"]
        return scale

    def _sampling(self, model: LatentDiffusion) -> dict[str, Any]:
        return self.lcd.resolve(model, self.lora_rank is not None).sampling(model)

    def card(self, model: LatentDiffusion) -> dict[str, Any]:
        """With the lines that sample in few steps."""
        lora = self.lora_rank is not None
        return super().card(model) | few_step_card(model, self._sampling(model), lora)

    def check(self) -> None:
        """Raise `UserError` for values and combinations that cannot work."""
        self.lcd.check()
        super().check()
        segments = self.lcd.segments
        if self.validation_prompts is not None and 1 < segments != self.validation_steps:
            raise UserError(
                f"validation_steps: {self.validation_steps}, but a student of {segments} segments "
                f"samples from edge to edge; use --validation-steps {segments}."
            )


def build_consistency(
    model: LatentDiffusion, config: ConsistencyTraining, lora: str | None
) -> ConsistencyObjective:
    """The objective of `lcd`."""
    return ConsistencyObjective(model, config.lcd, lora, DTYPES[config.mixed_precision])
