"""Configuration of reward-guided consistency distillation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.reward_guided import RewardGuidedObjective
from diffkit.objectives.reward_guided_config import RewardConfig
from diffkit.objectives.reward_terms import WeightedReward
from diffkit.rewards.spec import load_reward, parse_rewards
from diffkit.training.consistency import ConsistencyTraining
from diffkit.training.devices import DTYPES

__all__ = ["RewardGuidedTraining", "build_reward_guided"]


@dataclass
class RewardGuidedTraining(ConsistencyTraining):
    """Distil a model into a few-step one that a reward pulls to what people prefer (RG-LCD)."""

    reward: RewardConfig = field(default_factory=RewardConfig)

    def check(self) -> None:
        """Raise `UserError` for values and combinations that cannot work."""
        self.reward.check()
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
    return RewardGuidedObjective(
        model,
        config.lcd,
        reward,
        _rewards(reward, dtype) if reward.active and reward.mode != "frozen_proxy" else (),
        lora,
        dtype,
        learning_rate=config.learning_rate,
        seed=config.seed,
    )


def _rewards(reward: RewardConfig, dtype: torch.dtype) -> list[WeightedReward]:
    """The rewards with their weights; in float16 their small gradients would vanish."""
    wide = torch.float32 if dtype == torch.float16 else dtype
    return [(load_reward(spec, dtype=wide), w) for spec, w in parse_rewards(reward.rewards)]
