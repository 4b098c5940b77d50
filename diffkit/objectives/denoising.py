"""Denoising score matching, the plain training of a diffusion model.

    z_t = alpha_t z_0 + sigma_t eps,    loss = w(t) mean((f(z_t, t, c) - y)^2)

with the target y of the model's own parametrisation: eps, z_0, v = alpha_t eps - sigma_t z_0, or
the velocity eps - z_0 of flow matching, or EDM's F. Of the last the unweighted loss is EDM's own:
its weight (sigma^2 + s^2) / (sigma s)^2 of |D - z_0|^2, with s = sigma_data, is 1 / c_out^2, and
D - z_0 = c_out (F - y).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.data.batch import Batch
from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioning
from diffkit.models.denoiser import Denoiser
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.schedule import Density, Parametrization
from diffkit.objectives.base import Objective, Phase
from diffkit.randomness import SampleKeys

__all__ = [
    "Denoised",
    "DenoisingConfig",
    "DenoisingObjective",
    "DenoisingPlayer",
    "Draws",
    "Shared",
    "denoising_loss",
    "min_snr_weight",
    "offset_noise",
]


# -- mathematics --------------------------------------------------------------------------------


def denoising_loss(output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """w mean((output - target)^2), one value a sample, in at least float32.

    Arguments:
        output, target: (B, ...).
        weight: w, (B,); 1 without.
    """
    dtype = torch.promote_types(torch.promote_types(output.dtype, target.dtype), torch.float32)
    loss = (output.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)
    return loss if weight is None else loss * weight.to(loss)


def min_snr_weight(snr: Tensor, gamma: float, parametrization: Parametrization) -> Tensor:
    """Min-SNR-gamma weights of a loss in the given parametrisation (Hang et al. 2023, section 3.4).

    The weight min(snr, gamma) of the loss on x_0, carried over to

        x_0: min(snr, gamma),    eps: min(snr, gamma) / snr,    v: min(snr, gamma) / (snr + 1).

    Arguments:
        snr: alpha_t^2 / sigma_t^2, any shape; 0 (pure noise) gives eps the limit 1 and v 0.
        gamma: the cut-off, above 0; 5 in the paper.

    Raises `UserError` for flow matching's velocity and EDM's F: the paper gives no weight for them.
    """
    if parametrization == "sample":
        return snr.clamp_max(gamma)
    if parametrization == "epsilon":
        return (gamma / snr).clamp_max(1.0)
    if parametrization == "v_prediction":
        return snr.clamp_max(gamma) / (snr + 1)
    raise UserError(
        f"min_snr: is defined for eps-, x0- and v-prediction, not for {parametrization}; leave it "
        "out. For a flow model there is --denoising.density logit_normal."
    )


def offset_noise(eps: Tensor, offsets: Tensor, strength: float) -> Tensor:
    """eps + strength x offsets: noise whose mean over each channel varies (Guttenberg 2023).

    Arguments:
        eps: standard normal noise (B, C, h, w).
        offsets: standard normal draws (B, C, 1, 1).
    """
    return eps + strength * offsets


# -- objective ----------------------------------------------------------------------------------

_DROPOUT = 0.1


@dataclass
class DenoisingConfig:
    """Loss weights, noise and condition dropout of denoising training."""

    min_snr: float | None = None
    """Gamma of min-SNR weighting (5 in the paper); uniform weights without it."""
    offset_noise: float = 0.0
    """Standard deviation of an offset added to each channel's noise."""
    condition_dropout: float | None = None
    """Probability with which a caption is replaced by the empty one, a label by the null class, for
    guidance; 0.1 by default, 0 for a model without a null class."""
    density: Density | None = None
    """Density of training times; logit_normal is for flow models (Stable Diffusion 3). By default
    log_normal for EDM models, uniform for the others."""
    logit_mean: float = 0.0
    """Mean of the logit-normal density."""
    logit_std: float = 1.0
    """Standard deviation of the logit-normal density."""
    log_mean: float = -1.2
    """Mean of ln sigma, for EDM models."""
    log_std: float = 1.2
    """Standard deviation of ln sigma, for EDM models."""
    guidance: float | None = None
    """Scale told to a model with a guidance embedding (Flux-dev); its usual 3.5 without this."""

    def check(self) -> None:
        """Raise `UserError` for impossible values."""
        if self.min_snr is not None and not self.min_snr > 0:
            raise UserError(f"denoising.min_snr: {self.min_snr} must be above 0.")
        if self.condition_dropout is not None and not 0 <= self.condition_dropout <= 1:
            raise UserError(
                f"denoising.condition_dropout: {self.condition_dropout} is not in [0, 1]."
            )
        if self.offset_noise < 0:
            raise UserError(f"denoising.offset_noise: {self.offset_noise} must not be negative.")
        if self.density != "logit_normal" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise UserError(
                "denoising.logit_mean, logit_std: need --denoising.density logit_normal."
            )
        if self.guidance is not None and self.guidance < 0:
            raise UserError(f"denoising.guidance: {self.guidance} must not be negative.")
        for name in ("logit_std", "log_std"):
            if not getattr(self, name) > 0:
                raise UserError(f"denoising.{name}: {getattr(self, name)} must be above 0.")

    def resolve(self, model: LatentDiffusion) -> DenoisingConfig:
        """The values that None stands for with this model.

        Raises `UserError` for what this model cannot be trained with.
        """
        classes, rate = model.conditioner.classes, self.condition_dropout
        if classes is not None and classes.null is None:
            if rate:
                raise UserError(
                    f"denoising.condition_dropout: {rate}, but this {model.family.name} has no "
                    "null class that a label could be replaced by; leave it out."
                )
            rate = 0.0
        density = self.density or model.schedule.density
        if density != "log_normal" and (self.log_mean, self.log_std) != (-1.2, 1.2):
            raise UserError("denoising.log_mean, log_std: are for EDM models; leave them out.")
        return replace(self, condition_dropout=_DROPOUT if rate is None else rate, density=density)

    def canonical(self) -> DenoisingConfig:
        """None for every value that None would become with any model that can have the value.

        Two configurations with equal canonical forms train alike. A model without a null class is
        trained with no dropout of 0.1, and no model of one kind with the density of another.
        """
        rate = None if self.condition_dropout == _DROPOUT else self.condition_dropout
        density = None if self.density in ("uniform", "log_normal") else self.density
        return replace(self, condition_dropout=rate, density=density)

    def normal(self) -> tuple[float | None, float | None]:
        """(mean, standard deviation) of the normal variable of the density, if it has one."""
        if self.density == "logit_normal":
            return self.logit_mean, self.logit_std
        return (self.log_mean, self.log_std) if self.density == "log_normal" else (None, None)


@dataclass(frozen=True)
class Draws:
    """One micro-batch on the device, with all its randomness.

    Attributes:
        batch: images or moments, captions, labels or conditioning.
        posterior: (B, C, h, w) standard normal noise of the latents' own posterior.
        eps: (B, C, h, w) the noise to be added.
        t: (B,) training times in the model's units.
        drop: (B,) true where the caption or the label is dropped.
    """

    batch: Batch
    posterior: Tensor
    eps: Tensor
    t: Tensor
    drop: Tensor


@dataclass(frozen=True)
class Shared:
    """What the frozen codec and text encoder make of the draws: z_0 (B, C, h, w) and c."""

    z0: Tensor
    cond: Conditioning


@dataclass(frozen=True)
class Denoised:
    """What the network was given, said, and should have said, each (B, C, h, w).

    Attributes:
        z_t: noisy latents, at least float32.
        output: in the model's parametrisation, in the network's own precision.
        target: of the output, at least float32.
    """

    z_t: Tensor
    output: Tensor
    target: Tensor


class DenoisingPlayer(nn.Module):
    """The denoiser with its loss: forward(phase, draws, shared) -> {"loss", "time"}, each (B,).

    Methods that add terms of the same output subclass it.
    """

    def __init__(
        self, denoiser: Denoiser, min_snr: float | None, guidance: float | None = None
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.min_snr = min_snr
        self.guidance = guidance

    def forward(self, phase: str, draws: Draws, shared: Shared) -> dict[str, Any]:
        """The weighted denoising loss of each sample, and its place on the noise schedule."""
        loss = self.loss(self.denoise(draws, shared), draws.t)
        return {"loss": loss, "time": self.denoiser.schedule.place(draws.t)}

    def denoise(self, draws: Draws, shared: Shared) -> Denoised:
        """Add the noise and run the network."""
        schedule = self.denoiser.schedule
        z_t = schedule.add_noise(shared.z0, draws.eps, draws.t)
        told = None
        if self.guidance is not None:
            told = torch.full((len(z_t),), self.guidance, device=z_t.device)
        output = self.denoiser(z_t, draws.t, shared.cond, told)
        return Denoised(z_t, output, schedule.target(shared.z0, draws.eps, draws.t))

    def loss(self, denoised: Denoised, t: Tensor) -> Tensor:
        """The weighted denoising loss (B,)."""
        schedule = self.denoiser.schedule
        weight = None
        if self.min_snr is not None:
            weight = min_snr_weight(schedule.snr(t), self.min_snr, schedule.prediction_type)
        return denoising_loss(denoised.output, denoised.target, weight)


def _check_inputs(model: LatentDiffusion) -> None:
    """Raise `UserError` for a denoiser that needs more than z_t, t and a caption."""
    channels, taken = model.codec.channels, model.denoiser.geometry.channels
    if taken != channels:
        raise UserError(
            f"model: its denoiser takes {taken} channels and the latents have "
            f"{channels}: an inpainting or editing model, which denoising training gives no mask. "
            "Give the text-to-image model that it was made from."
        )


def _told_guidance(model: LatentDiffusion, guidance: float | None) -> float | None:
    """The guidance scale that the network is told in training; None for one without that input.

    A guidance-distilled Flux is trained at one scale, as by diffusers' scripts. A U-Net with the
    same input was distilled to few steps by the same stroke, which this loss would undo.
    """
    family = model.family
    if not family.takes_guidance:
        if guidance is not None:
            raise UserError(
                f"denoising.guidance: this {family.name} model has no guidance embedding that it "
                "could be told to; leave it out."
            )
        return None
    if family.train_guidance is None:
        raise UserError(
            "model: its U-Net has a guidance embedding (time_cond_proj_dim), so it was distilled, "
            "and denoising training has no guidance scales for it. Give the model that it was "
            "distilled from."
        )
    return family.train_guidance if guidance is None else guidance


class DenoisingObjective(Objective):
    """Denoising training of all weights, or of the LoRA that the model carries.

    Arguments:
        model: what to train; parameters of its denoiser with `requires_grad` are trained.
        config: see `DenoisingConfig`.
        lora: name of the LoRA that is trained, None when all weights are.

    Raises `UserError` for a config that this model cannot be trained with.
    """

    def __init__(
        self, model: LatentDiffusion, config: DenoisingConfig, lora: str | None = None
    ) -> None:
        config.check()
        config = config.resolve(model)
        _check_inputs(model)
        self.model = model
        self.config = config
        self.lora = lora
        schedule = model.schedule
        if config.min_snr is not None:
            min_snr_weight(torch.ones(1), config.min_snr, schedule.prediction_type)
        schedule.train_timesteps(torch.zeros(1), config.density)
        self._player = DenoisingPlayer(model.denoiser, config.min_snr, self.told_guidance())
        self._device = torch.device("cpu")
        self._null: Conditioning | None = None

    def told_guidance(self) -> float | None:
        """The guidance scale that the network is told in training; None for one without it."""
        return _told_guidance(self.model, self.config.guidance)

    def players(self) -> Mapping[str, nn.Module]:
        """One: the denoiser."""
        return {"denoiser": self._player}

    def phases(self) -> Sequence[Phase]:
        """One step of the denoiser."""
        return (Phase("denoising", "denoiser"),)

    def averaged(self) -> Sequence[str]:
        """The denoiser."""
        return ("denoiser",)

    def place(self, device: torch.device) -> None:
        """Make the null conditioning there; codec and encoders follow when they are needed."""
        # "cuda" is never equal to the "cuda:0" that a module tells; a tensor knows its full name.
        self._device = torch.empty(0, device=device).device
        conditioner = self.model.conditioner
        if conditioner.classes is None or conditioner.classes.null is not None:
            # Sizes are told even to a model without a prompt, so these are never used.
            self._null = conditioner.null(1, sizes=(64, 64)).to(device)

    def draw(self, batch: Batch, repeat: int) -> Draws:
        """Noise, times and dropped captions of a micro-batch, by address."""
        config, keys = self.config, batch.keys
        again = f"/{repeat}" if repeat else ""
        shape = self._latent_shape(batch)
        eps = keys.normal(shape, f"noise{again}")
        if config.offset_noise:
            offsets = keys.normal((shape[0], 1, 1), f"offset{again}")
            eps = offset_noise(eps, offsets, config.offset_noise)
        t = self.times(keys, repeat)
        assert config.condition_dropout is not None  # resolved
        drop = keys.uniform(f"drop{again}") < config.condition_dropout
        posterior = keys.normal(shape, f"posterior{again}")
        device = self._device
        return Draws(
            batch.to(device), *(x.to(device, non_blocking=True) for x in (posterior, eps, t, drop))
        )

    def times(self, keys: SampleKeys, repeat: int) -> Tensor:
        """Training times (B,) in the model's units, on the CPU."""
        u = keys.uniform(f"timestep/{repeat}" if repeat else "timestep")
        return self.model.schedule.train_timesteps(u, self.config.density, *self.config.normal())

    def _latent_shape(self, batch: Batch) -> tuple[int, int, int]:
        if batch.moments is not None:
            return self.model.codec.channels, *batch.moments.shape[-2:]
        assert batch.images is not None
        return self.model.codec.latent_shape(*batch.images.shape[-2:])

    def shared(self, draws: Draws) -> Shared:
        """Latents and conditioning, from the caches where the batch has them."""
        return Shared(self.latents(draws), self.condition(draws))

    def latents(self, draws: Draws) -> Tensor:
        """z_0 (B, C, h, w), drawn from the codec's posterior."""
        batch, codec = draws.batch, self.model.codec
        moments = batch.moments
        if moments is None:
            assert batch.images is not None
            if codec.device != self._device:
                codec.to(self._device)
            moments = codec.encode_moments(batch.images)
        return codec.sample(moments, draws.posterior)

    def condition(self, draws: Draws) -> Conditioning:
        """c of B samples, the null's where it is dropped; no gradient."""
        batch, conditioner = draws.batch, self.model.conditioner
        cond = batch.conditioning
        if conditioner.classes is not None:
            cond = conditioner.encode_labels(batch.labels, len(batch))
        elif cond is None:
            for encoder in conditioner.encoders.values():
                encoder.to(self._device)
            cond = conditioner.encode(batch.captions, batch.sizes)
        else:
            cond = conditioner.with_sizes(cond, batch.sizes)
        return cond if self._null is None else cond.drop(draws.drop, self._null)

    def save(self, folder: Path) -> None:
        """Write a plain diffusers folder, or the LoRA in diffusers' layout."""
        if self.lora is None:
            encoders = self.model.conditioner.encoders.values()
            if any(next(encoder.parameters()).dtype != torch.float32 for encoder in encoders):
                # They computed in the run's precision; the result takes them from the source.
                self.model.conditioner.free()
            self.model.save(folder, overwrite=True)
        else:
            from diffkit.models.lora import save_lora

            save_lora(self.model, folder, self.lora)
