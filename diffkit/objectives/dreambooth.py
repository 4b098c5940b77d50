"""DreamBooth (Ruiz et al. 2022, arXiv:2208.12242): a word for a subject, from a few pictures of it.

    loss = L(x, c) + w L(x_pr, c_pr)                            (their equation 2, section 3.3)

L is the denoising loss, x a picture of the subject with a prompt that names it ("a photo of sks
dog"), x_pr a picture of its class with the prompt of the class ("a photo of a dog"), usually made
by the model itself before training: it keeps what the model knows of the class. Both have their own
noises and times. What trains is all weights of the denoiser or a LoRA on them, and on request the
CLIP text encoders alike. Without the second term and with a caption for each picture this is the
usual training of a style LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffkit.data.paired import PairedBatch
from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioner
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.text_encoders import clip_encoders, freeze_unread
from diffkit.objectives.denoising import DenoisingConfig, DenoisingPlayer
from diffkit.objectives.personal import PersonalObjective, PersonalPlayer

__all__ = ["DreamBoothConfig", "DreamBoothObjective", "prior_preservation_loss"]


def prior_preservation_loss(instance: Tensor, prior: Tensor, weight: float) -> Tensor:
    """L(instance) + w L(prior), one value a pair (B,), float32.

    Arguments:
        instance: denoising losses of the subject's pictures, (B,).
        prior: denoising losses of the class pictures, (B,).
        weight: w.
    """
    return instance.float() + weight * prior.float()


@dataclass
class DreamBoothConfig:
    """Prompts, class pictures and what trains in DreamBooth."""

    instance_prompt: str | None = None
    """Prompt of every picture, such as "a photo of sks dog"; their own captions without it."""
    class_prompt: str | None = None
    """Turns prior preservation on: prompt of the class pictures, such as "a photo of a dog"."""
    class_images: Path | None = None
    """Folder of class pictures; without it the base model makes them once, into the run's cache."""
    class_count: int = 100
    """Class pictures to be made."""
    class_steps: int | None = None
    """Sampling steps of class pictures; the model's usual ones by default."""
    class_guidance: float | None = None
    """Guidance scale of class pictures; the model's usual one by default."""
    prior_weight: float = 1.0
    """Weight of the loss of class pictures."""
    train_text_encoder: bool = False
    """Train the CLIP text encoders too."""

    def check(self) -> None:
        """Raise `UserError` for impossible values, and for those that would do nothing."""
        usual = DreamBoothConfig()
        making = ("class_count", "class_steps", "class_guidance")
        if self.class_prompt is None:
            for name in ("class_images", *making, "prior_weight"):
                if getattr(self, name) != getattr(usual, name):
                    raise UserError(
                        f"dreambooth.{name}: belongs to prior preservation; add "
                        "--dreambooth.class-prompt."
                    )
        if self.class_images is not None:
            for name in making:
                if getattr(self, name) != getattr(usual, name):
                    raise UserError(
                        f"dreambooth.{name}: no class pictures are made where "
                        "--dreambooth.class-images gives them; leave one of the two out."
                    )
        for name in ("class_count", "class_steps", "prior_weight"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"dreambooth.{name}: {value} is too small; it must be above 0.")
        if self.class_guidance is not None and not self.class_guidance >= 0:
            raise UserError(f"dreambooth.class_guidance: {self.class_guidance} is negative.")
        for name in ("instance_prompt", "class_prompt"):
            if getattr(self, name) == "":
                raise UserError(f"dreambooth.{name}: is empty; leave it out, or say what is there.")


class DreamBoothPlayer(PersonalPlayer):
    """The networks in training with the loss of instance and class pictures."""

    prior_weight = 1.0
    """w."""

    def forward(self, phase: str, draws: Any, shared: Any) -> dict[str, Tensor]:
        """Losses (B,) of draws of pictures, or of pairs (instance, class) of them.

        Of pairs "loss" is the sum, beside it its terms "instance_loss" and "prior_loss"; a pair has
        two times, so none is told.
        """
        if not isinstance(draws, tuple):
            return self.terms(phase, draws, shared)
        instance, prior = (
            self.terms(phase, *part)["loss"] for part in zip(draws, shared, strict=True)
        )
        loss = prior_preservation_loss(instance, prior, self.prior_weight)
        return {"loss": loss, "instance_loss": instance.detach(), "prior_loss": prior.detach()}


class DreamBoothObjective(PersonalObjective):
    """DreamBooth of all weights, or of the LoRA that the model carries.

    Arguments:
        model: what to train; parameters with `requires_grad` are trained.
        config: see `DreamBoothConfig`.
        denoising: noise, times, weights and dropout of both losses.
        lora: name of the LoRA that is trained, None when all weights are.

    Raises `UserError` for a config that this model cannot be trained with.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        config: DreamBoothConfig,
        denoising: DenoisingConfig,
        lora: str | None = None,
    ) -> None:
        config.check()
        self.config = config
        encoders: dict[str, nn.Module] = {}
        if config.train_text_encoder:
            encoders = clip_encoders(model.conditioner)
            if not encoders:
                raise UserError(
                    f"dreambooth.train_text_encoder: {model.family.name} models have no CLIP text "
                    "encoder; leave it out."
                )
            freeze_unread(model.conditioner, encoders)
        super().__init__(model, denoising, lora, encoders)

    def _make_player(
        self,
        denoising: DenoisingPlayer,
        conditioner: Conditioner,
        encoders: Mapping[str, nn.Module],
        drops: bool,
    ) -> PersonalPlayer:
        player = DreamBoothPlayer(denoising, conditioner, encoders, drops)
        player.prior_weight = self.config.prior_weight
        return player

    def draw(self, batch: Any, repeat: int) -> Any:
        """The draws of a batch, or (instance, class) of a pair of batches."""
        if isinstance(batch, PairedBatch):
            return super().draw(batch.own, repeat), super().draw(batch.companions, repeat)
        return super().draw(batch, repeat)

    def shared(self, draws: Any) -> Any:
        """What frozen networks say about the draws, or about each of a pair."""
        if isinstance(draws, tuple):
            return tuple(super(DreamBoothObjective, self).shared(part) for part in draws)
        return super().shared(draws)
