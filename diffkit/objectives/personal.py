"""What the objectives share that teach a model a subject or a style from a few pictures.

They minimise the denoising loss of `diffkit.objectives.denoising`, and may train what encodes the
prompts: then prompts are encoded in the player, with gradients, instead of once beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from diffkit.data.batch import Batch
from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioner, Conditioning
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.text_encoders import encode_null, encode_prompts
from diffkit.objectives.base import Objective, Phase
from diffkit.objectives.denoising import (
    DenoisingConfig,
    DenoisingObjective,
    DenoisingPlayer,
    Draws,
    Shared,
)

__all__ = ["PersonalObjective", "PersonalPlayer"]


class PersonalPlayer(nn.Module):
    """The denoiser, and the text encoders where they train, with the denoising loss of a batch.

    Arguments:
        denoising: the denoiser with its loss.
        conditioner: encodes the prompts of `encoders`.
        encoders: text encoders through which gradients flow; none when prompts come encoded.
        drops: whether some prompts are dropped.
    """

    def __init__(
        self,
        denoising: DenoisingPlayer,
        conditioner: Conditioner,
        encoders: Mapping[str, nn.Module],
        drops: bool,
    ) -> None:
        super().__init__()
        self.denoising = denoising
        self.encoders = nn.ModuleDict(dict(encoders))
        self.conditioner = conditioner
        self.drops = drops

    def forward(self, phase: str, draws: Draws, shared: Shared) -> dict[str, Tensor]:
        """{"loss", "time"}, each (B,); see `DenoisingPlayer`."""
        return self.terms(phase, draws, shared)

    def terms(self, phase: str, draws: Draws, shared: Shared) -> dict[str, Tensor]:
        """The denoising loss of one batch, with its prompts encoded here where encoders train."""
        if len(self.encoders):
            shared = replace(shared, cond=self._encode(draws))
        terms: dict[str, Tensor] = self.denoising(phase, draws, shared)
        return terms

    def _encode(self, draws: Draws) -> Conditioning:
        batch = draws.batch
        cond = encode_prompts(self.conditioner, batch.captions, batch.sizes)
        if not self.drops:
            return cond
        return cond.drop(draws.drop, encode_null(self.conditioner))


class PersonalObjective(Objective):
    """Denoising training on few pictures; methods choose what trains and how losses add up.

    Arguments:
        model: what to train; parameters with `requires_grad` are trained.
        denoising: noise, times, weights and dropout of the loss.
        lora: name of the LoRA that is trained, None for none.
        encoders: the text encoders through which gradients flow, by component name.

    Raises `UserError` for a model without text, and for a config that it cannot be trained with.
    """

    name = "denoiser"
    """Of the player."""

    def __init__(
        self,
        model: LatentDiffusion,
        denoising: DenoisingConfig,
        lora: str | None,
        encoders: Mapping[str, nn.Module],
    ) -> None:
        if not model.family.text_components:
            raise UserError(
                f"model: {model.family.name} models read no text, so they cannot be taught a word "
                "for a subject; give a text-to-image model."
            )
        self.model = model
        self._base = DenoisingObjective(model, denoising, lora)
        self._encodes = bool(encoders)
        player = self._base.players()["denoiser"]
        assert isinstance(player, DenoisingPlayer)
        drops = bool(self._base.config.condition_dropout)
        self._player = self._make_player(player, model.conditioner, encoders, drops)

    def _make_player(
        self,
        denoising: DenoisingPlayer,
        conditioner: Conditioner,
        encoders: Mapping[str, nn.Module],
        drops: bool,
    ) -> PersonalPlayer:
        return PersonalPlayer(denoising, conditioner, encoders, drops)

    def players(self) -> Mapping[str, nn.Module]:
        """One: all networks that the gradient passes."""
        return {self.name: self._player}

    def phases(self) -> Sequence[Phase]:
        """One step of the player."""
        return (Phase("denoising", self.name),)

    def averaged(self) -> Sequence[str]:
        """The player."""
        return (self.name,)

    def place(self, device: torch.device) -> None:
        """Make the null conditioning there; codec and encoders follow when they are needed."""
        self._base.place(device)

    def draw(self, batch: Batch, repeat: int) -> Draws:
        """Noise, times and dropped captions of a micro-batch, by address."""
        return self._base.draw(batch, repeat)

    def shared(self, draws: Draws) -> Shared:
        """Latents, and the conditioning unless the player encodes it."""
        if self._encodes:
            return Shared(self._base.latents(draws), Conditioning())
        return self._base.shared(draws)

    def save(self, folder: Path) -> None:
        """Write a plain diffusers folder, or the LoRA in diffusers' layout."""
        self._base.save(folder)
