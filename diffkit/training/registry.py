"""The methods that `diffkit train` knows: the configuration of each and how to make it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffkit.objectives.base import Objective
from diffkit.training.config import TrainConfig
from diffkit.training.consistency import ConsistencyTraining, build_consistency
from diffkit.training.denoising import DenoisingTraining, build_denoising
from diffkit.training.diffusion_gan import GanTraining, build_gan
from diffkit.training.latent_perceptual import LatentPerceptualTraining, build_latent_perceptual
from diffkit.training.personal import (
    DreamBoothLoraTraining,
    DreamBoothTraining,
    TextualInversionTraining,
    build_dreambooth,
    build_textual_inversion,
)
from diffkit.training.pixel_space import PixelTraining, build_pixel
from diffkit.training.preference import PreferenceTraining, build_preference
from diffkit.training.proxy_reward import ProxyRewardTraining, build_proxy_reward
from diffkit.training.reward_guided import RewardGuidedTraining, build_reward_guided

__all__ = ["METHODS", "Method", "method_of"]


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
    "denoising": Method(DenoisingTraining, build_denoising),
    "dreambooth": Method(DreamBoothTraining, build_dreambooth),
    "dreambooth_lora": Method(DreamBoothLoraTraining, build_dreambooth),
    "textual_inversion": Method(TextualInversionTraining, build_textual_inversion),
    "lpl": Method(LatentPerceptualTraining, build_latent_perceptual),
    "preference": Method(PreferenceTraining, build_preference),
    "pixel": Method(PixelTraining, build_pixel),
    "lcd": Method(ConsistencyTraining, build_consistency),
    "rg_lcd": Method(RewardGuidedTraining, build_reward_guided),
    "proxy_reward": Method(ProxyRewardTraining, build_proxy_reward),
    "gan": Method(GanTraining, build_gan),
}


def method_of(config: TrainConfig) -> Method:
    """The method whose configuration this is."""
    return next(method for method in METHODS.values() if method.config is type(config))
