"""Distillation of a diffusion model into a one-step generator: regression, and adversaries.

Kang et al., "Distilling Diffusion Models into Conditional GANs" (ECCV 2024, 2405.05967). Pairs of
noise z and end point x of the teacher's deterministic sampler are made before. The generator is the
teacher's network, called once at its noisiest time:

    G(z, c) = x0_hat(z, t_G, c)
    L_G = d(G(z, c), x) + w softplus(-D(G(z, c), z, c))

with a discriminator D that is told z and c (`diffkit.models.discriminators`); its loss is in
`adversarial_losses`. Beside or in place of the regression, distribution matching (Yin et al. 2024,
2405.14867) pulls G along the difference of two scores at noisy generated latents, the teacher's and
that of a network that is trained on what G makes.

The other networks come in at a step of their own, and are first trained while the generator does
not hear of them: a copy of a teacher under fresh heads is a strong judge that means nothing yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffkit.console import warn
from diffkit.data.batch import Batch
from diffkit.data.trajectories import TrajectoryBatch
from diffkit.errors import UserError
from diffkit.generation.card import add_to_card
from diffkit.models.conditioner import Conditioning
from diffkit.models.denoiser import Denoiser
from diffkit.models.discriminators import Given, feature_discriminator, unet_discriminator
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import plain_copy
from diffkit.models.one_step import one_step_scheduler
from diffkit.objectives.adversarial_losses import replaced_rows
from diffkit.objectives.base import Objective, Phase
from diffkit.objectives.collapse import DiversityGuard
from diffkit.objectives.denoising import (
    DenoisingConfig,
    DenoisingObjective,
    DenoisingPlayer,
    Draws,
)
from diffkit.objectives.diffusion_gan_config import DmdConfig, GanConfig, loss_shares
from diffkit.objectives.diffusion_gan_losses import (
    Regressor,
    TeacherScore,
    adversarial_loss,
    matching_loss,
)
from diffkit.objectives.diffusion_gan_players import (
    DiscriminatorPlayer,
    FakeScorePlayer,
    GanDraws,
    GanMaterial,
    GeneratorPlayer,
    Loss,
    Noising,
)
from diffkit.objectives.shares import GradientShare
from diffkit.randomness import SampleKeys

__all__ = ["DiffusionGanObjective"]

ACCURATE = 0.95
"""Accuracy of a discriminator above which a run is warned."""
DECAY = 0.99
WATCHED = 100
"""Steps after which the average tells more than the luck of a few samples."""


class DiffusionGanObjective(Objective):
    """One-step distillation of all weights, or into the LoRA that the model carries.

    The model's scheduler becomes the one whose single step is the generator.

    Arguments:
        model: the generator as it starts.
        config: see `GanConfig`.
        dmd: see `DmdConfig`.
        batch_size: of an optimizer step.
        lora: name of the LoRA that is trained, None when all weights are.
        teacher: what the other networks start from; the model itself by default.
        dtype: of frozen copies.
        seed: of new weights.

    Raises `UserError` for a config that this model cannot be trained with.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        config: GanConfig,
        dmd: DmdConfig,
        batch_size: int,
        lora: str | None = None,
        teacher: LatentDiffusion | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        config.check()
        dmd.check(config)
        self.model = model
        self.config = config = config.resolve(model)
        self.dmd = dmd
        self._batch_size = batch_size
        self._lora = lora
        self._dtype = dtype
        self._seed = seed
        self._base = DenoisingObjective(model, DenoisingConfig(condition_dropout=0.0), lora)
        player = self._base.players()["denoiser"]
        assert isinstance(player, DenoisingPlayer)
        self._told = player.guidance
        self._opposed = config.discriminator != "none" or config.dmd
        source = _teacher_of(model, teacher, self._opposed)
        self._schedule = source.schedule
        self._score: TeacherScore | None = None
        self._regressor = Regressor(model, config)
        self._players: dict[str, nn.Module] = {}
        losses = self._losses(source.denoiser)
        shares = loss_shares(config, dmd)
        first, *others = shares
        self._shares = GradientShare(first, {name: shares[name] for name in others})
        assert config.time is not None  # resolved
        if lora and config.time < model.schedule.num_train_timesteps - 1:
            raise UserError(
                "gan.time: a LoRA's file has no place for the scheduler that begins at another "
                "time than the last; leave it out, or train all weights without --lora-rank."
            )
        model.set_scheduler(one_step_scheduler(model, config.time))
        self._generator = GeneratorPlayer(
            model.denoiser, config.time, self._told, losses, self._shares
        )
        self._accuracy = {name: torch.zeros(()) for name in ("accuracy", "steps")}
        self._prompts: tuple[str, ...] = ()
        self._guard: DiversityGuard | None = None
        self._watched: Conditioning | None = None
        self._device = torch.device("cpu")
        self._step = 0
        self._warned = False

    def _losses(self, teacher: Denoiser) -> dict[str, Loss]:
        """The generator's losses in the order of `loss_shares`; makes the players behind them."""
        config, found = self.config, {}
        if config.regression != "none":
            found["regression"] = self._regressor.loss
        if config.dmd:
            follower = FakeScorePlayer(_plain(teacher).float().requires_grad_(True), self._told)
            self._players["fake_score"] = follower
            frozen = _plain(teacher).to(self._dtype).requires_grad_(False)
            self._score = TeacherScore(frozen, self.dmd.scale(self.model), self._told)
            found["dmd"] = matching_loss(
                self._schedule,
                self._score,
                lambda z_t, t, cond: follower("output", None, (z_t, t, cond)),
            )
        if config.discriminator != "none":
            critic = self._critic(teacher)
            self._players["discriminator"] = critic
            found["adversarial"] = adversarial_loss(
                lambda y, given: critic("judge", None, (y, given))
            )
        return found

    def _critic(self, teacher: Denoiser) -> DiscriminatorPlayer:
        config, model = self.config, self.model
        edge = 2 * model.working_multiple
        cond = model.conditioner.encode([model.conditioner.example], (edge, edge))
        shape = model.codec.channels, edge // model.codec.factor, edge // model.codec.factor
        example = Given(cond.to(teacher.device), torch.zeros(1, *shape, device=teacher.device))
        if config.discriminator == "ladd":
            network = feature_discriminator(teacher, example, seed=self._seed, guidance=self._told)
            network.denoiser.to(self._dtype)
        else:
            network = unet_discriminator(
                teacher,
                example,
                seed=self._seed,
                guidance=self._told,
                noise_input=bool(config.noise_input),
                multiscale=config.multiscale,
            )
        return DiscriminatorPlayer(network, config, self._batch_size)

    # -- players and phases -------------------------------------------------------------------

    def players(self) -> Mapping[str, nn.Module]:
        """The generator, and what opposes it: "discriminator", "fake_score"."""
        return {"generator": self._generator, **self._players}

    def phases(self) -> Sequence[Phase]:
        """First the other networks, on what the generator makes now, then the generator.

        It waits for them where it has no loss of its own.
        """
        config, found = self.config, []
        if "discriminator" in self._players:
            critic = Phase("discriminator", "discriminator", start=config.start, rate=config.rate)
            found.append(critic)
        if "fake_score" in self._players:
            options = {"repeats": self.dmd.updates, "start": config.start}
            found.append(Phase("fake_score", "fake_score", **options, rate=self.dmd.rate))
        waits = config.warmup if config.regression == "none" else 0
        return (*found, Phase("generator", "generator", start=waits))

    def averaged(self) -> Sequence[str]:
        """The generator."""
        return ("generator",)

    def meet(self, prompts: Sequence[str]) -> None:
        """Watch what the generator makes of these."""
        if self.config.diversity_every and prompts:
            self._prompts = tuple(prompts)
            self._guard = DiversityGuard(self.config.diversity_every, len(prompts))
            self._generator.guard = self._guard

    def place(self, device: torch.device) -> None:
        """Move what is frozen, and encode what is watched."""
        self._base.place(device)
        self._device = torch.empty(0, device=device).device
        self._shares.place(self._device)
        self._accuracy = {name: value.to(self._device) for name, value in self._accuracy.items()}
        self._regressor.place(self._device)
        conditioner = self.model.conditioner
        if self._score is not None:
            # Sizes are told even to a model without a prompt, so these are never used.
            null = conditioner.null(1, sizes=(64, 64)) if self._score.scale != 1 else None
            self._score.place(self._device, null)
        if self._guard is not None:
            self._guard.place(self._device)
            size = self.model.default_size
            self._watched = conditioner.encode(self._prompts, (size, size)).to(self._device)

    # -- what lasts ---------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Let the other networks in, and look at pictures, where that is due."""
        config = self.config
        self._step = step
        self._generator.opposed = step >= config.start + config.warmup
        guard = self._guard
        if guard is None or self._watched is None or not guard.due(step):
            return
        size = self.model.default_size
        noise = guard.noise(self.model.latent_shape(size, size)).to(self._device)
        made = []
        for row, part in enumerate(noise.chunk(guard.prompts)):
            cond = self._watched.select(slice(row, row + 1)).expand(len(part))
            made.append(self._generator("generate", None, Given(cond, part)))
        guard.record(torch.cat(made))

    def shown(self) -> Sequence[str]:
        """How well the discriminator tells, and whether the pictures of a prompt differ."""
        names = [] if self._guard is None else ["generator/diversity"]
        if "discriminator" in self._players:
            names.insert(0, "discriminator/accuracy")
        return tuple(names) if self._players else tuple(n.partition("/")[2] for n in names)

    def watched(self) -> Sequence[str]:
        """The squares of gradients, and the accuracy."""
        return (*self._shares.watched(), "accuracy")

    def stepped(self, phase: str, means: Mapping[str, Tensor]) -> None:
        """Move the averages."""
        if phase == "generator" and self._generator.opposed:
            self._shares.update(means)
        if phase == "discriminator":
            self._accuracy["accuracy"].lerp_(means["accuracy"], 1 - DECAY)
            self._accuracy["steps"].add_(1)

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The averages behind the weights and the warnings, and the diversity so far."""
        found = {"gan": self._shares.tensors | self._accuracy}
        return found if self._guard is None else found | {"diversity": self._guard.tensors}

    def inspect(self) -> None:
        """Warn of a discriminator that tells nearly all, and, or raise `RunFailed`, of pictures
        that become alike."""
        if self._guard is not None:
            self._guard.inspect("gan")
        steps = self._accuracy["steps"].item()
        if self._warned or steps < WATCHED:
            return
        accuracy = self._accuracy["accuracy"].item() / (1 - math.pow(DECAY, steps))
        if accuracy > ACCURATE:
            self._warned = True
            remedy = "raise --gan.gamma" if self.config.r1 != "none" else "use --gan.r1 exact"
            warn(
                f"gan: the discriminator tells {accuracy:.0%} of true and generated latents apart, "
                f"so that the generator learns little from it; {remedy}, or lower --gan.rate."
            )

    # -- a step -------------------------------------------------------------------------------

    def draw(self, batch: TrajectoryBatch | Batch, repeat: int) -> GanDraws:
        """Noise and choices of each sample, by address; those of pairs start from their noise."""
        keys, again = batch.keys, f"/{repeat}" if repeat else ""
        posterior: Tensor | None = None
        places: Sequence[int] = ()
        replaced = torch.zeros(len(batch), dtype=torch.bool)
        if isinstance(batch, TrajectoryBatch):
            noise, places = batch.noise, batch.places
            if repeat:
                noise = keys.normal(noise.shape[1:], f"noise{again}")
            share, size = self.config.mismatch or 0.0, self._batch_size
            replaced = replaced_rows(keys, places, share, size)
        else:
            drawn = self._base.draw(batch, repeat)
            noise, posterior = drawn.eps, drawn.posterior
        shape = noise.shape[1:]
        penalised, r1_noise = self._penalty_draws(keys, places, shape)
        score = judged = augmentation = None
        if self.config.dmd:
            score = self._noising(keys, shape, f"score{again}", self.dmd.low, self.dmd.high)
        if self.config.discriminator == "ladd":
            judged = self._noising(keys, shape, f"judged{again}", 0.0, 1.0)
        if (drawn_map := self._regressor.draw(keys, noise.shape)) is not None:
            augmentation = drawn_map.to(self._device)
        return GanDraws(
            batch.to(self._device),
            self._there(noise),
            posterior,
            score,
            judged,
            self._there(replaced),
            self._there(penalised),
            None if r1_noise is None else self._there(r1_noise),
            augmentation,
        )

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _penalty_draws(
        self, keys: SampleKeys, places: Sequence[int], shape: torch.Size
    ) -> tuple[Tensor, Tensor | None]:
        """The rows with an exact penalty in this step, and the noise of an approximate one.

        The exact one is of one sample of the global batch, the first.
        """
        config, none = self.config, torch.zeros(0, dtype=torch.int64)
        assert config.r1_every is not None  # resolved
        since = self._step - config.start
        if config.discriminator == "none" or since < 0 or since % config.r1_every:
            return none, None
        if config.r1 == "approximate":
            return none, keys.normal(shape, "r1")
        if config.r1 == "none":
            return none, None
        return torch.tensor([i for i, place in enumerate(places) if place == 0]).long(), None

    def _noising(
        self, keys: SampleKeys, shape: torch.Size, purpose: str, low: float, high: float
    ) -> Noising:
        """Times uniform in [low, high] of the training times, and noise."""
        times = self._schedule.num_train_timesteps
        t = (low + (high - low) * keys.uniform(f"{purpose} time")) * times
        if self._schedule.kind == "ddpm":
            t = t.long().clamp_max(times - 1)
        return Noising(self._there(t), self._there(keys.normal(shape, f"{purpose} noise")))

    def shared(self, draws: GanDraws) -> GanMaterial:
        """True latents, prompts, and what the generator makes now, for the other networks."""
        nothing = torch.zeros(0, device=self._device)
        keep = torch.zeros(len(draws.batch), dtype=torch.bool, device=self._device)
        if draws.posterior is None:
            source = Draws(draws.batch, nothing, nothing, nothing, keep)
            real = draws.batch.latents
        else:
            source = Draws(draws.batch, draws.posterior, draws.noise, nothing, keep)
            real = self._base.latents(source)
        cond = self._base.condition(source)
        t, eps = (None, None) if draws.judged is None else (draws.judged.t, draws.judged.eps)
        given, fake = Given(cond, draws.noise, t, eps), None
        if self._opposed and self._step >= self.config.start:
            fake = self._generator("generate", None, given)
        return GanMaterial(real, given, fake)

    def save(self, folder: Path) -> None:
        """Write a plain diffusers folder whose card says one step, or the LoRA."""
        self._base.save(folder)
        if self._lora is None:
            guidance = 1.0 if self._told is None else self._told
            add_to_card(folder, {"guidance_scale": guidance, "steps": 1})


def _plain(denoiser: Denoiser) -> Denoiser:
    """A copy without adapters, for times of the whole schedule."""
    return Denoiser(plain_copy(denoiser.model), denoiser.family, denoiser.schedule)


def _teacher_of(
    model: LatentDiffusion, teacher: LatentDiffusion | None, opposed: bool
) -> LatentDiffusion:
    """What the other networks start from; `UserError` for what cannot be that of this model."""
    if teacher is None:
        if opposed and model.schedule.consistency:
            raise UserError(
                "model: it is a few-step student already, and no teacher whose score or features "
                "others could start from; name the model that it was made from with --gan.teacher."
            )
        return model
    if teacher.schedule.consistency:
        raise UserError("gan.teacher: it is a few-step student; give the model it was made from.")
    same = (teacher.family.name, teacher.codec.channels, teacher.schedule.kind)
    if same != (model.family.name, model.codec.channels, model.schedule.kind):
        raise UserError(
            f"gan.teacher: {teacher.family.name} with {teacher.codec.channels} channels is no "
            f"teacher of this {model.family.name} with {model.codec.channels}."
        )
    return teacher
