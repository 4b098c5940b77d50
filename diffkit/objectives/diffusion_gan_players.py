"""The networks of a diffusion model's distillation into a one-step generator, with their losses.

What goes from network to network of other players goes through their `forward` without gradients
of theirs: the generator asks the discriminator and the scores through functions that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.models.conditioner import Conditioning
from diffkit.models.denoiser import Denoiser
from diffkit.models.discriminators import Discriminator, Given, twice_differentiable
from diffkit.models.eager import eager_sum
from diffkit.models.few_step import one_step
from diffkit.objectives.adversarial_losses import (
    approximate_r1,
    discriminator_loss,
    mean_logit,
    mix_and_match,
    r1_penalty,
    relativistic_loss,
)
from diffkit.objectives.collapse import DiversityGuard
from diffkit.objectives.denoising import denoising_loss
from diffkit.objectives.diffusion_gan_config import GanConfig
from diffkit.objectives.shares import GradientShare

__all__ = [
    "DiscriminatorPlayer",
    "FakeScorePlayer",
    "GanDraws",
    "GanMaterial",
    "GeneratorPlayer",
    "Loss",
    "Noising",
]


@dataclass(frozen=True)
class Noising:
    """Times t (B,) and noise eps (B, C, h, w) to which latents are noised."""

    t: Tensor
    eps: Tensor


@dataclass(frozen=True)
class GanDraws:
    """One micro-batch on the device, with all its randomness.

    Attributes:
        batch: trajectories, or pictures.
        noise: z (B, C, h, w); of trajectories the one that led to their end point.
        posterior: of the latents of pictures; None for trajectories.
        score: to noise generated latents for what follows them; None without it.
        direction: to noise them for the generator's loss, other than what was just learnt there.
        judged: to noise what a discriminator on features sees; None for one of clean latents.
        replaced: (B,) true where the discriminator sees an unrelated end point as generated.
        penalised: (n,) rows that have the exact R1 penalty in this step; most often none.
        r1_noise: (B, C, h, w) of the approximate one; None where it is not due.
        augmentation: of E-LatentLPIPS, or None.
    """

    batch: Any
    noise: Tensor
    posterior: Tensor | None
    score: Noising | None
    direction: Noising | None
    judged: Noising | None
    replaced: Tensor
    penalised: Tensor
    r1_noise: Tensor | None
    augmentation: Any


@dataclass(frozen=True)
class GanMaterial:
    """What frozen networks say about the draws, without gradients.

    Attributes:
        real: (B, C, h, w) latents, float32: the teacher's end points, or of pictures.
        given: what latents are judged with: the prompts, z, the noising.
        fake: (B, C, h, w) the generator's latents for the other players; None while those wait.
    """

    real: Tensor
    given: Given
    fake: Tensor | None


@dataclass(frozen=True)
class Loss:
    """A loss of the generator's latents y.

    Attributes:
        of: (draws, material) -> a function of y (b, C, h, w) and the real latents, (b,).
        chunk: samples that run at once; None, where the function knows the whole batch, for all.
    """

    of: Callable[[GanDraws, GanMaterial], Callable[[Tensor, Tensor], Tensor]]
    chunk: int | None = None


class GeneratorPlayer(nn.Module):
    """forward("generator", draws, material) -> the losses of each sample and what is logged.

    forward("generate", None, given) -> latents (B, C, h, w) of the noise and prompts in `given`.

    Logged are the value of each loss by its name, its weight, and NAME_square, the square of its
    gradient's length at the latents; "diversity", see `DiversityGuard`.

    Arguments:
        denoiser: the network.
        time: at which it is called, in the model's units.
        guidance: what a network with a guidance embedding is told.
        losses: by name, the first one first.
        shares: their weights.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        time: int,
        guidance: float | None,
        losses: Mapping[str, Loss],
        shares: GradientShare,
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.time = time
        self.guidance = guidance
        self.losses = dict(losses)
        self.shares = shares
        self.guard: DiversityGuard | None = None
        self.opposed = True
        """Whether the losses of the other networks count yet; else the first one alone."""

    def forward(self, phase: str, draws: Any, material: Any) -> Any:
        """The losses, or latents; see above."""
        if phase == "generate":
            return self.generate(material)
        names = tuple(self.losses) if self.opposed else tuple(self.losses)[:1]
        losses = [self.losses[name] for name in names]
        total, values, squares = eager_sum(
            [loss.of(draws, material) for loss in losses],
            self.shares.weights[: len(names)],
            self.generate(material.given),
            material.real,
            chunks=[loss.chunk for loss in losses],
        )
        terms: dict[str, Any] = {"loss": total}
        for place, name in enumerate(names):
            terms |= {name: values[place], f"{name}_square": squares[place]}
            if place:
                terms[f"{name}_weight"] = self.shares.weights[place].expand_as(total)
        if self.guard is not None:
            terms["diversity"] = self.guard.value.expand_as(total)
        return terms

    def generate(self, given: Given) -> Tensor:
        """x0_hat at the generator's time, (B, C, h, w) in at least float32.

        The output of a network that predicts eps is amplified by sigma / alpha there (14.6 on
        Stable Diffusion's schedule), and its effective learning rate with it.
        """
        noise = given.noise
        kind = torch.float32 if self.denoiser.schedule.kind == "flow" else torch.int64
        t = torch.full((len(noise),), self.time, dtype=kind, device=noise.device)
        told = None if self.guidance is None else noise.new_full((len(noise),), self.guidance)
        return one_step(self.denoiser, noise, given.cond, t, told)


class DiscriminatorPlayer(nn.Module):
    """forward("discriminator", draws, material) -> the loss of each sample and what is logged.

    forward("judge", None, (latents, given)) -> the maps of logits of its heads.

    Logged are "real_logit" and "fake_logit"; "accuracy", the part of both that is told right, or of
    the pairs by a relativistic one; "r1", the mean squared gradient where it was penalised.

    Arguments:
        network: D.
        config: resolved.
        batch_size: of an optimizer step.
    """

    def __init__(self, network: Discriminator, config: GanConfig, batch_size: int) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.batch_size = batch_size

    def forward(self, phase: str, draws: Any, material: Any) -> Any:
        """The loss, or maps of logits; see above."""
        if phase == "judge":
            return self.network(*material)
        assert material.fake is not None
        fake = material.fake
        if self.config.mismatch:
            fake = mix_and_match(fake, draws.batch.unrelated, draws.replaced)
        both = self.network(torch.cat([material.real, fake]), material.given.twice())
        real_maps, fake_maps = zip(*(maps.chunk(2) for maps in both), strict=True)
        real, made = mean_logit(real_maps).detach(), mean_logit(fake_maps).detach()
        if self.config.loss == "relativistic":
            loss, right = relativistic_loss(real_maps, fake_maps), (real > made).float()
        else:
            loss = discriminator_loss(real_maps, fake_maps)
            right = ((real > 0).float() + (made < 0).float()) / 2
        terms: dict[str, Any] = {"real_logit": real, "fake_logit": made, "accuracy": right}
        if self.config.r1 == "none":
            return {"loss": loss, **terms}
        penalty, count = self._r1(draws, material, real_maps)
        terms |= {"r1": (penalty.detach(), count)}
        return {"loss": loss + self._strength() * penalty, **terms}

    def _strength(self) -> float:
        """What a penalty is multiplied by: it makes up for steps and samples without one."""
        assert self.config.r1_every is not None  # resolved
        samples = self.batch_size if self.config.r1 == "exact" else 1
        return self.config.gamma / 2 * self.config.r1_every * samples

    def _r1(
        self, draws: GanDraws, material: GanMaterial, maps: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """|dD/dx|^2 of each sample, 0 where it is not penalised; and 1 where it is. (B,) each."""
        real, given = material.real, material.given
        none, ones = real.new_zeros(len(real)), real.new_ones(len(real))
        if self.config.r1 == "approximate":
            if draws.r1_noise is None:
                return none, none
            sigma = self.config.r1_sigma
            noisy = self.network(real + sigma * draws.r1_noise, given)
            return approximate_r1(maps, noisy, sigma), ones
        rows = draws.penalised
        if not len(rows):
            return none, none
        some = given.select(rows)
        with twice_differentiable(self.network):
            found = r1_penalty(lambda x: mean_logit(self.network(x, some)), real[rows])
        return none.index_copy(0, rows, found.to(none)), none.index_copy(0, rows, ones[: len(rows)])


class FakeScorePlayer(nn.Module):
    """A denoiser that follows what the generator makes (DMD2).

    forward("fake_score", draws, material) -> its denoising loss on generated latents, "loss" and
    "time". forward("output", None, (z_t, t, cond)) -> its raw output.

    Arguments:
        denoiser: the network.
        guidance: what a network with a guidance embedding is told.
    """

    def __init__(self, denoiser: Denoiser, guidance: float | None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.guidance = guidance

    def forward(self, phase: str, draws: Any, material: Any) -> Any:
        """The loss, or an output; see above."""
        if phase == "output":
            return self._output(*material)
        score, fake, schedule = draws.score, material.fake, self.denoiser.schedule
        z_t = schedule.add_noise(fake, score.eps, score.t)
        output = self._output(z_t, score.t, material.given.cond)
        loss = denoising_loss(output, schedule.target(fake, score.eps, score.t))
        return {"loss": loss, "time": schedule.place(score.t)}

    def _output(self, z_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        told = None if self.guidance is None else z_t.new_full((len(z_t),), self.guidance)
        output: Tensor = self.denoiser(z_t, t, cond, told)
        return output
