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

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffkit.data.batch import Batch
from diffkit.data.trajectories import TrajectoryBatch
from diffkit.errors import UserError
from diffkit.generation.card import add_to_card
from diffkit.models.conditioner import Conditioning
from diffkit.models.denoiser import Denoiser
from diffkit.models.discriminators import Given
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.one_step import one_step_scheduler
from diffkit.objectives.adversarial_losses import replaced_rows
from diffkit.objectives.base import Objective, Phase
from diffkit.objectives.collapse import DiversityWatch
from diffkit.objectives.denoising import DenoisingConfig, DenoisingObjective, Draws
from diffkit.objectives.diffusion_gan_config import DmdConfig, GanConfig, loss_shares
from diffkit.objectives.diffusion_gan_losses import (
    Regressor,
    TeacherScore,
    adversarial_loss,
    matching_loss,
)
from diffkit.objectives.diffusion_gan_networks import (
    Accuracy,
    new_discriminator,
    plain,
    teacher_of,
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
        self._told = self._base.told_guidance()
        self._opposed = config.discriminator != "none" or config.dmd
        source = teacher_of(model, teacher, self._opposed)
        self._schedule = source.schedule
        self._score: TeacherScore | None = None
        self._regressor = Regressor(model, config)
        self._players: dict[str, nn.Module] = {}
        losses = self._losses(source.denoiser)
        shares = loss_shares(config, dmd)
        first, *others = shares
        self._shares = GradientShare(first, {name: shares[name] for name in others})
        time = _time(model, config, lora)
        model.set_scheduler(one_step_scheduler(model, time))
        given = model.denoiser, time, self._told
        self._generator = GeneratorPlayer(*given, losses, self._shares)
        self._accuracy = Accuracy()
        self._watch = DiversityWatch(model, config.diversity_every)
        self._device = torch.device("cpu")
        self._step = 0
        # Of this step by micro-batch: repeats of a phase have the same prompts and pictures.
        self._asked: dict[SampleKeys, tuple[Conditioning, Tensor]] = {}

    def _losses(self, teacher: Denoiser) -> dict[str, Loss]:
        """The generator's losses in the order of `loss_shares`; makes the players behind them."""
        config, found = self.config, {}
        if config.regression != "none":
            found["regression"] = self._regressor.loss
        if config.dmd:
            follower = FakeScorePlayer(plain(teacher).float().requires_grad_(True), self._told)
            self._players["fake_score"] = follower
            frozen = plain(teacher).to(self._dtype).requires_grad_(False)
            self._score = TeacherScore(frozen, self.dmd.scale(self.model), self._told)
            found["dmd"] = matching_loss(
                self._schedule,
                self._score,
                lambda z_t, t, cond: follower("output", None, (z_t, t, cond)),
            )
        if config.discriminator != "none":
            options = config, self._seed, self._told, self._dtype
            network = new_discriminator(self.model, teacher, *options)
            critic = DiscriminatorPlayer(network, config, self._batch_size)
            self._players["discriminator"] = critic
            found["adversarial"] = adversarial_loss(
                lambda y, given: critic("judge", None, (y, given)), config.loss == "relativistic"
            )
        return found

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
        self._generator.guard = self._watch.meet(prompts)

    def place(self, device: torch.device) -> None:
        """Move what is frozen, and encode what is watched."""
        self._base.place(device)
        self._device = torch.empty(0, device=device).device
        self._shares.place(self._device)
        self._accuracy.place(self._device)
        self._regressor.place(self._device)
        if self._score is not None:
            # Sizes are told even to a model without a prompt, so these are never used.
            guided, conditioner = self._score.scale != 1, self.model.conditioner
            null = conditioner.null(1, sizes=(64, 64)) if guided else None
            self._score.place(self._device, null)
        self._watch.place(self._device)

    # -- what lasts ---------------------------------------------------------------------------

    @torch.no_grad()
    def begin(self, step: int) -> None:
        """Let the other networks in, and look at pictures, where that is due."""
        config = self.config
        self._step = step
        self._asked.clear()
        self._generator.opposed = step >= config.start + config.warmup
        self._watch.look(step, self._made)

    def _made(self, noise: Tensor, cond: Conditioning) -> Tensor:
        latents: Tensor = self._generator("generate", None, Given(cond, noise))
        return latents

    def shown(self) -> Sequence[str]:
        """How well the discriminator tells, and whether the pictures of a prompt differ."""
        names = [] if self._watch.guard is None else ["generator/diversity"]
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
            self._accuracy.update(means["accuracy"])

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The averages behind the weights and the warnings, and the diversity so far."""
        return {"gan": {**self._shares.tensors, **self._accuracy.tensors}, **self._watch.state()}

    def inspect(self) -> None:
        """Warn of a discriminator that tells nearly all, and, or raise `RunFailed`, of pictures
        that become alike."""
        self._watch.inspect("gan")
        penalised = self.config.r1 != "none"
        first = next(iter(self._generator.losses)) == "adversarial"  # then it has no share
        followed = self._generator.opposed and self.config.weight is None and not first
        remedy = "raise --gan.gamma" if penalised else "use --gan.r1 exact"
        self._accuracy.inspect(remedy, followed)

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
        score = direction = judged = augmentation = None
        if self.config.dmd:
            span = self.dmd.low, self.dmd.high
            score = self._noising(keys, shape, f"score{again}", *span)
            direction = self._noising(keys, shape, "direction", *span)
        if self.config.discriminator == "ladd":
            judged = self._noising(keys, shape, f"judged{again}", 0.0, 1.0)
        if (drawn_map := self._regressor.draw(keys, noise.shape)) is not None:
            augmentation = drawn_map.to(self._device)
        return GanDraws(
            batch.to(self._device),
            self._there(noise),
            posterior,
            score,
            direction,
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
        keys = draws.batch.keys
        if keys not in self._asked:
            self._asked[keys] = self._frozen(draws)
        cond, real = self._asked[keys]
        t, eps = (None, None) if draws.judged is None else (draws.judged.t, draws.judged.eps)
        given, fake = Given(cond, draws.noise, t, eps), None
        if self._opposed and self._step >= self.config.start:
            fake = self._generator("generate", None, given)
        return GanMaterial(real, given, fake)

    def _frozen(self, draws: GanDraws) -> tuple[Conditioning, Tensor]:
        """Prompts and true latents of a micro-batch, from the text encoders and the autoencoder."""
        nothing = torch.zeros(0, device=self._device)
        keep = torch.zeros(len(draws.batch), dtype=torch.bool, device=self._device)
        if draws.posterior is None:
            source = Draws(draws.batch, nothing, nothing, nothing, keep)
            return self._base.condition(source), draws.batch.latents
        source = Draws(draws.batch, draws.posterior, draws.noise, nothing, keep)
        return self._base.condition(source), self._base.latents(source)

    def save(self, folder: Path) -> None:
        """Write a plain diffusers folder whose card says one step, or the LoRA."""
        self._base.save(folder)
        if self._lora is None:
            add_to_card(folder, {**self.config.sampling(self.model), "distilled": True})


def _time(model: LatentDiffusion, config: GanConfig, lora: str | None) -> int:
    """The generator's; `UserError` for one that a LoRA's pipeline would not be called at."""
    assert config.time is not None  # resolved
    if lora and config.time < model.schedule.num_train_timesteps - 1:
        raise UserError(
            "gan.time: a LoRA's file has no place for the scheduler that begins at another "
            "time than the last; leave it out, or train all weights without --lora-rank."
        )
    return config.time
