"""What a one-step generator's latents are held against: pairs, a discriminator, two scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffkit.models.conditioner import Conditioning
from diffkit.models.consistency import pseudo_huber
from diffkit.models.denoiser import Denoiser
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.schedule import Schedule
from diffkit.objectives.adversarial_losses import (
    distribution_matching_direction,
    distribution_matching_loss,
    generator_loss,
    relativistic_loss,
)
from diffkit.objectives.denoising import denoising_loss
from diffkit.objectives.diffusion_gan_config import GanConfig
from diffkit.objectives.diffusion_gan_players import GanDraws, GanMaterial, Loss
from diffkit.perceptual.decoded import check_decoder
from diffkit.perceptual.decoder_features import FeatureLoss, latent_perceptual_loss
from diffkit.perceptual.latent_augment import Augmentation, draw
from diffkit.perceptual.latent_lpips import e_latentlpips
from diffkit.perceptual.latent_lpips_io import check_latent_space, load_latent_lpips
from diffkit.randomness import SampleKeys

__all__ = ["Regressor", "TeacherScore", "adversarial_loss", "matching_loss"]


class Regressor:
    """d(y, x) of the generator's latents and the teacher's, by the name in the config.

    Attributes:
        loss: for the generator.

    Raises `UserError` for a model that has no such distance.
    """

    def __init__(self, model: LatentDiffusion, config: GanConfig) -> None:
        self.network: Any = None
        self.codec = model.codec if config.regression == "lpl" else None
        self.kinds = ""
        if config.regression == "lpl":
            check_decoder(model.codec, model.family.name)
        if config.regression.endswith("latentlpips"):
            self.network = load_latent_lpips(config.latent_lpips)
            named = f"gan.latent_lpips: {config.latent_lpips}"
            check_latent_space(self.network, model.codec, named)
        if config.regression == "e_latentlpips":
            own = self.network.config.augmentation
            self.kinds = own if config.augmentation is None else config.augmentation
        self.loss = self._loss(config)

    def _loss(self, config: GanConfig) -> Loss:
        if config.regression == "lpl":
            # One sample at a time: a decoder's features are large.
            return Loss(lambda draws, material: self._features, chunk=1)
        functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "mse": denoising_loss,
            "huber": lambda y, x: pseudo_huber(y, x, config.huber),
            "latentlpips": lambda y, x: e_latentlpips(self.network, y, x, None),
        }
        if config.regression in functions:
            found = functions[config.regression]
            return Loss(lambda draws, material: found)
        return Loss(lambda draws, material: self._ensemble(draws.augmentation))

    def _features(self, y: Tensor, x: Tensor) -> Tensor:
        assert self.codec is not None
        return latent_perceptual_loss(self.codec, y, x, FeatureLoss(), lean=True).value

    def _ensemble(self, augmentation: Augmentation | None) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda y, x: e_latentlpips(self.network, y, x, augmentation)

    def draw(self, keys: SampleKeys, shape: Sequence[int]) -> Augmentation | None:
        """T of each sample, on the CPU; None for a distance without."""
        return draw(keys, shape, self.kinds) if self.kinds else None

    def place(self, device: torch.device) -> None:
        """Move what is frozen there."""
        for part in (self.network, self.codec):
            if part is not None:
                part.to(device)


def adversarial_loss(
    judge: Callable[[Tensor, Any], Sequence[Tensor]], relativistic: bool = False
) -> Loss:
    """softplus(-D(y, z, c)), or softplus(D(x, z, c) - D(y, z, c)), which has no gradient in x.

    `judge` gives D's maps of logits of latents and what is given.
    """

    def of(draws: GanDraws, material: GanMaterial) -> Callable[[Tensor, Tensor], Tensor]:
        given = material.given

        def against(y: Tensor, x: Tensor) -> Tensor:
            with torch.no_grad():
                true = judge(x, given)
            return relativistic_loss(judge(y, given), true)

        return against if relativistic else lambda y, x: generator_loss(judge(y, given))

    return Loss(of)


class TeacherScore:
    """The teacher's clean estimate of noisy latents, with classifier-free guidance.

    Arguments:
        denoiser: the teacher, frozen; it is set to evaluation.
        scale: of guidance; 1 for none.
        told: what a network with a guidance embedding is told.
    """

    def __init__(self, denoiser: Denoiser, scale: float, told: float | None) -> None:
        self.denoiser = denoiser.eval()
        self.scale = scale
        self.told = told
        self._null: Conditioning | None = None

    def place(self, device: torch.device, null: Conditioning | None) -> None:
        """Move the network there; `null` is the unconditional input, for guidance."""
        self.denoiser.to(device)
        self._null = null if null is None else null.to(device)

    def x0(self, z_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x0_hat (B, C, h, w) in at least float32."""
        told = None if self.told is None else z_t.new_full((len(z_t),), self.told)
        if self.scale == 1:
            return self.denoiser.predict(z_t, t, cond, told).x0
        assert self._null is not None
        every = torch.ones(len(z_t), dtype=torch.bool, device=z_t.device)
        uncond = cond.drop(every, self._null)
        return self.denoiser.guided(z_t, t, cond, uncond, self.scale, told).x0


def matching_loss(
    schedule: Schedule,
    teacher: TeacherScore,
    follower: Callable[[Tensor, Tensor, Conditioning], Tensor],
) -> Loss:
    """Distribution matching at `draws.direction`.

    Arguments:
        schedule: of both networks.
        follower: (z_t, t, cond) -> the raw output of the network of generated latents.
    """

    def of(draws: GanDraws, material: GanMaterial) -> Callable[[Tensor, Tensor], Tensor]:
        at, cond = draws.direction, material.given.cond
        assert at is not None

        def loss(y: Tensor, x: Tensor) -> Tensor:
            with torch.no_grad():
                z_t = schedule.add_noise(y, at.eps, at.t)
                fake = schedule.prediction(follower(z_t, at.t, cond), z_t, at.t).x0
                real = teacher.x0(z_t, at.t, cond)
                direction = distribution_matching_direction(y, fake, real)
            return distribution_matching_loss(y, direction)

        return loss

    return Loss(of)
