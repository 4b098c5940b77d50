"""Configuration of reward-guided consistency distillation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import EMBEDDED, LatentDiffusion
from diffkit.objectives.reward_guided import RewardGuidedObjective
from diffkit.objectives.reward_guided_config import RewardConfig
from diffkit.objectives.reward_terms import WeightedReward
from diffkit.rewards.latent_clip import LatentClip
from diffkit.rewards.proxy import LatentProxy
from diffkit.rewards.spec import load_reward, parse_rewards
from diffkit.training.consistency import ConsistencyTraining
from diffkit.training.devices import DTYPES

__all__ = ["RewardGuidedTraining", "build_reward_guided"]


@dataclass
class RewardGuidedTraining(ConsistencyTraining):
    """Distil a model into a few-step one that a reward pulls to what people prefer (RG-LCD)."""

    reward: RewardConfig = field(default_factory=RewardConfig)

    def canonical(self) -> RewardGuidedTraining:
        """With None for the embedded scorer, and for the chunk: it decides memory alone."""
        rewards = None if self.reward.rewards == "embedded" else self.reward.rewards
        return replace(self, reward=replace(self.reward, rewards=rewards, chunk=None))

    def check(self) -> None:
        """Raise `UserError` for values and combinations that cannot work."""
        reward = self.reward
        reward.check()
        judged = reward.active and reward.mode != "frozen_proxy"
        if judged and reward.rewards is None and self.model != EMBEDDED:
            raise UserError(
                "reward.rewards: name what is rewarded, such as hpsv2, pickscore or imagereward; "
                "the default is the scorer of the embedded model, which knows its 64x64 pictures "
                "alone (--reward.rewards embedded takes it nevertheless)."
            )
        super().check()
        if self.reward.mode == "proxy" and self.reward.refit_every > self.max_steps:
            raise UserError(
                f"reward.refit_every: {self.reward.refit_every} is beyond max_steps = "
                f"{self.max_steps}, so the proxy would be fitted once; use --reward.mode "
                "frozen_proxy, or fit it more often."
            )


def build_reward_guided(
    model: LatentDiffusion, config: RewardGuidedTraining, lora: str | None
) -> RewardGuidedObjective:
    """The objective of `rg_lcd`."""
    dtype, reward = DTYPES[config.mixed_precision], config.reward
    objective = RewardGuidedObjective(
        model,
        config.lcd,
        reward,
        _rewards(reward, dtype) if reward.active and reward.mode != "frozen_proxy" else (),
        lora,
        dtype,
        learning_rate=config.learning_rate,
        seed=config.seed,
    )
    _check_sides(objective.proxy, model, config)
    return objective


def _check_sides(
    proxy: LatentProxy | None, model: LatentDiffusion, config: RewardGuidedTraining
) -> None:
    """Raise `UserError` for a latent ResNet of another size than the run's: it reads one alone."""
    if not isinstance(proxy, LatentClip) or proxy.config.tower != "resnet":
        return
    size, side = config.size or model.default_size, proxy.config.side
    if config.max_aspect != 1 or model.latent_shape(size, size)[1] != side:
        raise UserError(
            f"reward.proxy: {config.reward.proxy} is a ResNet of latents of {side}x{side} alone; "
            f"use --size {side * model.codec.factor} without --max-aspect, or a ViT."
        )


def _rewards(reward: RewardConfig, dtype: torch.dtype) -> list[WeightedReward]:
    """The rewards with their weights; in float16 their small gradients would vanish."""
    wide = torch.float32 if dtype == torch.float16 else dtype
    named = parse_rewards(reward.rewards or "embedded")
    return [(load_reward(spec, dtype=wide), weight) for spec, weight in named]
