"""Configuration of the distillation into a one-step generator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.diffusion_gan import DiffusionGanObjective
from diffkit.objectives.diffusion_gan_config import DmdConfig, GanConfig
from diffkit.training.config import TrainConfig
from diffkit.training.devices import DTYPES, sharded
from diffkit.training.few_step_card import few_step_card

__all__ = ["GanTraining", "build_gan"]


@dataclass
class GanTraining(TrainConfig):
    """Distil a model into a one-step generator: Diffusion2GAN, DMD2, from noise-image pairs."""

    max_steps: int = 3000
    """Training steps in all."""
    batch_size: int = 16
    """Samples of one optimizer step, over all processes."""
    learning_rate: float = 1e-5
    """Peak learning rate of all networks: 1e-5 for a large model, with its discriminator down to
    5e-7; 1e-4 for a small one and for a LoRA."""
    max_grad_norm: float | None = 10.0
    """Gradients of a longer norm are scaled down to it."""
    ema: float | None = 0.999
    """Decay of a moving average of the generator, which is then the result; None for none."""
    validation_steps: int = 1
    """Sampling steps of a validation picture."""
    gan: GanConfig = field(default_factory=GanConfig)
    dmd: DmdConfig = field(default_factory=DmdConfig)

    def trajectories(self) -> bool:
        """Unless the data are pictures."""
        return not self.gan.pictures

    def sampling_guidance(self, model: LatentDiffusion) -> float | None:
        """None, the usual scale, for a generator that is told it; else 1, as it has it built in."""
        return None if model.family.takes_guidance else 1.0

    def card(self, model: LatentDiffusion) -> dict[str, Any]:
        """With the lines that sample in one step."""
        lora = self.lora_rank is not None
        return super().card(model) | few_step_card(model, self.gan.sampling(model), lora)

    def check_sharded(self) -> None:
        """Raise `UserError` for the exact penalty, for which one process alone asks the network."""
        if self.gan.exact_penalty():
            _refuse_sharded()

    def check(self) -> None:
        """Raise `UserError` for values and combinations that cannot work."""
        self.gan.check()
        self.dmd.check(self.gan)
        super().check()
        if self.validation_steps != 1:
            raise UserError("validation_steps: the generator makes pictures in one step.")
        opposed = self.gan.discriminator != "none" or self.gan.dmd
        first = self.gan.start + self.gan.warmup
        if opposed and first >= self.max_steps:
            raise UserError(
                f"gan.start, warmup: {self.gan.start} and {self.gan.warmup} steps are not below "
                f"max_steps = {self.max_steps}, so that the generator would never hear of the "
                "other networks; lower them, or use --gan.discriminator none."
            )
        if self.compile and opposed:
            raise UserError(
                "compile: networks are asked within the training step of others here, and features "
                "are read inside of them, which torch.compile cannot take; leave it out."
            )
        self.check_attention(self.gan)

    def check_attention(self, gan: GanConfig) -> None:
        """Raise `UserError` for attention without the second derivatives of an exact penalty."""
        plain = self.attention in ("sdpa", "classic", "native", "_native_math")
        if gan.exact_penalty() and not plain:
            raise UserError(
                f"attention: {self.attention} has no second derivative, which the penalty of the "
                "discriminator needs; leave it out, or use --gan.r1 approximate."
            )


def _refuse_sharded() -> None:
    raise UserError(
        "gan.r1: the exact penalty is of one sample, on one process, while FSDP needs all of them "
        "to gather the discriminator's weights; use --gan.r1 approximate."
    )


def build_gan(
    model: LatentDiffusion, config: GanTraining, lora: str | None
) -> DiffusionGanObjective:
    """The objective of `gan`."""
    teacher, dtype = None, DTYPES[config.mixed_precision]
    resolved = config.gan.resolve(model)  # which discriminator it is goes by the model
    config.check_attention(resolved)
    if sharded() and resolved.exact_penalty():
        _refuse_sharded()
    if config.gan.teacher is not None:
        teacher = LatentDiffusion.load(config.gan.teacher, attention=config.attention)
        if (
            config.gradient_checkpointing
        ):  # as the model in training has it, of which else copies are
            network: Any = teacher.denoiser.model
            network.enable_gradient_checkpointing()
    return DiffusionGanObjective(
        model, config.gan, config.dmd, config.batch_size, lora, teacher, dtype, config.seed
    )
