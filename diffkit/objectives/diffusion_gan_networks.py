"""What opposes a one-step generator: of which networks it is made, and how well it tells."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffkit.console import warn
from diffkit.errors import UserError
from diffkit.generation.card import is_student
from diffkit.models.denoiser import Denoiser
from diffkit.models.discriminators import (
    Discriminator,
    Given,
    feature_discriminator,
    unet_discriminator,
)
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import plain_copy
from diffkit.objectives.diffusion_gan_config import GanConfig

__all__ = ["Accuracy", "new_discriminator", "plain", "teacher_of"]

ACCURATE = 0.95
"""Accuracy of a discriminator above which a run is warned."""
BLIND = 0.52
"""Accuracy below which it tells no more than chance."""
DECAY = 0.99
WATCHED = 100
"""Steps after which the average tells more than the luck of a few samples."""


def teacher_of(
    model: LatentDiffusion, teacher: LatentDiffusion | None, opposed: bool
) -> LatentDiffusion:
    """What the other networks start from; `UserError` for what cannot be that of this model."""
    if teacher is None:
        if opposed and is_student(model):
            raise UserError(
                "model: it is a few-step student already, and no teacher whose score or features "
                "others could start from; name the model that it was made from with --gan.teacher."
            )
        return model
    if is_student(teacher):
        raise UserError("gan.teacher: it is a few-step student; give the model it was made from.")
    if (theirs := _kind(teacher)) != (ours := _kind(model)):
        raise UserError(
            f"gan.teacher: {theirs} is no teacher of {ours}: family, schedule, channels of latents "
            "and width of the text's embeddings must be the same."
        )
    return teacher


def _kind(model: LatentDiffusion) -> tuple[Any, ...]:
    """What two models must have in common for one to judge the other's latents and prompts."""
    config: Any = model.denoiser.model.config
    # PixArt's cross_attention_dim is its own width.
    names = ("caption_channels", "joint_attention_dim", "cross_attention_dim")
    width = next((config[name] for name in names if config.get(name)), None)
    return model.family.name, model.schedule.kind, model.codec.channels, width


def plain(denoiser: Denoiser) -> Denoiser:
    """A copy without adapters, for times of the whole schedule."""
    return Denoiser(plain_copy(denoiser.model), denoiser.family, denoiser.schedule)


def new_discriminator(
    model: LatentDiffusion,
    teacher: Denoiser,
    config: GanConfig,
    seed: int,
    told: float | None,
    dtype: torch.dtype,
) -> Discriminator:
    """The discriminator as it starts.

    Arguments:
        model: whose latents and prompts it sees.
        teacher: what it is a copy of.
        config: resolved.
        seed: of the heads.
        told: what a network with a guidance embedding is told.
        dtype: of what stays frozen.
    """
    edge = 2 * model.working_multiple
    cond = model.conditioner.encode([model.conditioner.example], (edge, edge))
    shape = model.codec.channels, edge // model.codec.factor, edge // model.codec.factor
    example = Given(cond.to(teacher.device), torch.zeros(1, *shape, device=teacher.device))
    if config.discriminator == "ladd":
        network = feature_discriminator(teacher, example, seed=seed, guidance=told)
        network.denoiser.to(dtype)
        return network
    inputs = {"noise_input": bool(config.noise_input), "multiscale": config.multiscale}
    return unet_discriminator(teacher, example, seed=seed, guidance=told, **inputs)


class Accuracy:
    """The running part of true and generated latents that a discriminator tells right.

    Attributes:
        tensors: "accuracy" and "steps", for `state()`.
    """

    def __init__(self) -> None:
        self.tensors: Mapping[str, Tensor] = {n: torch.zeros(()) for n in ("accuracy", "steps")}
        self._warned = False

    def place(self, device: torch.device) -> None:
        """Move the numbers there."""
        self.tensors = {name: value.to(device) for name, value in self.tensors.items()}

    def update(self, accuracy: Tensor) -> None:
        """Take in that of one step, ()."""
        self.tensors["accuracy"].lerp_(accuracy, 1 - DECAY)
        self.tensors["steps"].add_(1)

    def inspect(self, remedy: str, followed: bool) -> None:
        """Warn once of a discriminator that tells nearly all, or nothing.

        Arguments:
            remedy: against the first.
            followed: the generator follows it, however weak its gradient.
        """
        steps = self.tensors["steps"].item()
        if self._warned or steps < WATCHED:
            return
        accuracy = self.tensors["accuracy"].item() / (1 - math.pow(DECAY, steps))
        if accuracy > ACCURATE:
            self._warned = True
            warn(
                f"gan: the discriminator tells {accuracy:.0%} of true and generated latents apart, "
                f"so that the generator learns little from it; {remedy}, or lower --gan.rate."
            )
        elif followed and accuracy < BLIND:
            self._warned = True
            warn(
                f"gan: the discriminator tells {accuracy:.0%} of true and generated latents apart, "
                "no more than chance, and its gradient is kept at a share of the first loss's, so "
                "that the generator follows noise; try a fixed --gan.weight in its place, a longer "
                "--gan.warmup, a higher --gan.rate, a lower --beta1 or learning rate, or "
                "--gan.loss relativistic."
            )
