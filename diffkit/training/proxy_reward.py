"""Configuration of the training of a latent proxy reward."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import EMBEDDED, LatentDiffusion
from diffkit.models.model_card import public_name
from diffkit.objectives.proxy_reward import ProxyRewardConfig, ProxyRewardObjective
from diffkit.training.config import TrainConfig, Trained

__all__ = ["ProxyRewardTraining", "build_proxy_reward"]


@dataclass
class ProxyRewardTraining(TrainConfig):
    """Train a network that tells how well latents fit a caption, as a proxy of rewards."""

    max_steps: int = 10_000
    """Training steps in all."""
    batch_size: int = 64
    """Samples of one optimizer step, over all processes."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    warmup_steps: int = 200
    """Steps in which the rate rises linearly to its peak."""
    proxy: ProxyRewardConfig = field(default_factory=ProxyRewardConfig)

    def trained(self) -> frozenset[Trained]:
        """None of the model's networks: the proxy is one of its own."""
        return frozenset()

    def result_name(self) -> str:
        """The proxy."""
        return "proxy"

    def card(self, model: LatentDiffusion) -> dict[str, Any]:
        """A proxy of rewards, and the command that uses it."""
        base = self.model if self.model == EMBEDDED else shlex.quote(public_name(self.model))
        rewards = "" if self.model == EMBEDDED else " --reward.rewards hpsv2"
        use = f"--model {base} --data DATA --output RUN --reward.mode proxy{rewards}"
        use += " --reward.proxy THIS"
        command = f"diffkit train rg_lcd {use}"
        return {"relation": "adapter", "adapter": "proxy_reward", "command": command}

    def check(self) -> None:
        """Raise `UserError` for values and combinations that cannot work."""
        self.proxy.check()
        unused = {
            "lora_rank": "the proxy trains whole",
            "gradient_checkpointing": "the proxy keeps its activations",
            "validation_prompts": "the model stays as it is, and so would its pictures",
        }
        for name, reason in unused.items():
            if getattr(self, name) not in (None, False):
                raise UserError(f"{name}: {reason}; leave it out.")
        if self.batch_size < 2:
            raise UserError("batch_size: a pair is told apart from others, at least 2 in all.")
        if self.cache_embeddings and self.proxy.network != "taps":
            raise UserError(
                "cache_embeddings: the proxy has a text tower of its own; leave it out, or use "
                "--proxy.network taps."
            )
        if self.max_aspect != 1 and self.proxy.network == "resnet":
            raise UserError(
                "max_aspect: the ResNet reads latents of one size; leave it out, or use "
                "--proxy.network vit."
            )
        super().check()

    def check_processes(self, processes: int) -> int:
        """Samples of one micro-batch, which must be whole groups."""
        samples = super().check_processes(processes)
        group = self.proxy.group or self.batch_size
        if samples % group:
            raise UserError(
                f"proxy.group: a process works off {samples} samples at once, which are no groups "
                f"of {group}; use a divisor of {samples}, such as --proxy.group {samples}."
            )
        return samples


def build_proxy_reward(
    model: LatentDiffusion, config: ProxyRewardTraining, lora: str | None
) -> ProxyRewardObjective:
    """The objective of `proxy_reward`."""
    return ProxyRewardObjective(model, config.proxy, config.batch_size, config.size, config.seed)
