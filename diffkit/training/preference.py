"""Configuration of preference optimisation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.adaptive_dpo import AdaptiveConfig
from diffkit.objectives.denoising import DenoisingConfig
from diffkit.objectives.preference import PreferenceConfig, PreferenceObjective
from diffkit.objectives.preference_config import check_draws
from diffkit.training.config import TrainConfig

__all__ = ["PreferenceTraining", "build_preference"]


def _every_prompt() -> DenoisingConfig:
    """Draws that drop no prompt; Diffusion-DPO dropped 0.2 of them for models with guidance."""
    return DenoisingConfig(condition_dropout=0.0)


@dataclass
class PreferenceTraining(TrainConfig):
    """Teach a model, from pairs of pictures, what people prefer (Diffusion-DPO and relatives)."""

    max_steps: int = 2000
    """Training steps in all."""
    batch_size: int = 32
    """Pairs of one optimizer step, over all processes."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps in which the rate rises linearly to its peak."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    denoising: DenoisingConfig = field(default_factory=_every_prompt)

    def pairs(self) -> bool:
        """Winners and losers."""
        return True

    def needs_captions(self) -> bool:
        """Unless all of them are dropped."""
        return self.denoising.condition_dropout != 1

    def canonical(self) -> PreferenceTraining:
        """With the canonical form of the denoising values, and the warm-up in steps.

        The warm-up decides the weights of steps that were made: another --max-steps may not change
        it. The limit of the winners' drift is no part of what the run is, beyond that simpo looks
        at the start model for it.
        """
        preference = self.preference
        if preference.referenced or preference.drift_limit is not None:
            preference = replace(preference, drift_limit=PreferenceConfig().drift_limit)
        adaptive = self.adaptive
        if self.preference.adaptive:
            adaptive = replace(adaptive, warmup_steps=adaptive.warmup(self.max_steps))
        denoising = self.denoising.canonical()
        return replace(self, preference=preference, denoising=denoising, adaptive=adaptive)

    def check(self) -> None:
        """Raise `UserError` for values and combinations that cannot work."""
        self.preference.check()
        check_draws(self.preference, self.denoising)
        if self.preference.adaptive:
            self._check_adaptive()
        elif name := self.adaptive.changed():
            raise UserError(
                f"adaptive.{name}: {self.preference.loss} has no annotators; use it with "
                "--preference.loss adaptive_dpo."
            )
        super().check()

    def _check_adaptive(self) -> None:
        adaptive = self.adaptive
        adaptive.check()
        if adaptive.margin != "off" and self.preference.loss != "adaptive_dpo":
            raise UserError(
                f"adaptive.margin: {self.preference.loss} has none; use it with --preference.loss "
                "adaptive_dpo."
            )
        warmup = adaptive.warmup(self.max_steps)
        if warmup >= self.max_steps:
            raise UserError(
                f"adaptive.warmup_steps: in all {self.max_steps} steps every pair would weigh the "
                f"same, as {warmup} are the warm-up; make --max-steps larger, or use "
                "--preference.loss dpo."
            )
        if adaptive.normalization != "batch":
            return
        if self.accumulation > 1:
            raise UserError(
                "adaptive.normalization: batch needs the whole batch at once, so it does not go "
                "with --accumulation; use --adaptive.normalization rms."
            )
        if self.batch_size < 2:
            raise UserError(
                "adaptive.normalization: batch compares the pairs of a batch with one another and "
                "needs at least 2; use --adaptive.normalization rms, or a larger --batch-size."
            )


def build_preference(
    model: LatentDiffusion, config: PreferenceTraining, lora: str | None
) -> PreferenceObjective:
    """The objective of `preference`."""
    values = config.preference, config.adaptive, config.denoising
    return PreferenceObjective(model, *values, config.max_steps, lora, config.size)
