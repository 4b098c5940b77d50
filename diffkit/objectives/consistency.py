"""Latent consistency distillation: a student that makes in one step what its teacher makes in many.

Luo et al. 2023 (arXiv:2310.04378); with LoRA arXiv:2311.05556. One update, for each sample with an
interval t > t' of the solver's grid and a guidance weight w (`diffkit.models.consistency`):

    z_t  = alpha_t z_0 + sigma_t eps
    z_t' = solver step from t to t' with the teacher's guided prediction at z_t
    loss = d(f_theta(z_t, t, c, w), f_theta'(z_t', t', c, w))

theta' is a moving average of theta, theta' <- mu theta' + (1 - mu) theta after every optimizer
step, or theta itself; neither gets a gradient through f_theta'. The teacher, the start weights, is
a frozen copy, or the LoRA switched off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffkit.data.batch import Batch
from diffkit.errors import UserError
from diffkit.generation.card import add_to_card, is_student
from diffkit.models.conditioner import Conditioning
from diffkit.models.consistency import Interval, SolverGrid, ddpm_grid, flow_grid, lcm_guidance
from diffkit.models.few_step import (
    consistency_scheduler,
    frozen_teacher,
    phased_scheduler,
    with_guidance_embedding,
)
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.schedule import Schedule
from diffkit.objectives.base import Phase
from diffkit.objectives.collapse import DiversityWatch
from diffkit.objectives.consistency_config import ConsistencyConfig
from diffkit.objectives.consistency_player import (
    ConsistencyDraws,
    ConsistencyPlayer,
    ConsistencyShared,
    Point,
)
from diffkit.objectives.denoising import DenoisingConfig, DenoisingObjective, Draws
from diffkit.objectives.views import Ema
from diffkit.randomness import SampleKeys

if TYPE_CHECKING:
    from diffkit.perceptual.latent_lpips import LatentLpips

__all__ = ["ConsistencyObjective", "prepare_student", "solver_grid"]


def solver_grid(schedule: Schedule, steps: int, segments: int, tokens: int) -> SolverGrid:
    """The grid of a model; `tokens` of a picture decide a flow's shift by resolution."""
    times = schedule.num_train_timesteps
    if schedule.kind == "flow":
        return flow_grid(times, steps, schedule.sampling_shift(tokens), segments)
    return ddpm_grid(times, steps, segments)


def prepare_student(
    model: LatentDiffusion, config: ConsistencyConfig, lora: bool
) -> LatentDiffusion:
    """The student as it starts, made of a teacher: with the scheduler of its result, and told the
    guidance scale where `config` says so. What it predicts is what the teacher predicts.

    Raises `UserError` for a model that cannot be distilled so, few-step models among them.
    """
    resolved = config.resolve(model, lora)
    told = getattr(model.denoiser.model.config, "time_cond_proj_dim", None)
    if told is not None or is_student(model):
        raise UserError(
            "model: it was distilled to few steps already, and has no trajectories that a student "
            "could follow; give the model that it was made from."
        )
    scheduler = phased_scheduler(model)
    if config.segments == 1:
        scheduler = consistency_scheduler(model, config.solver_steps)
    if resolved.embedding and not model.family.takes_guidance:
        zero = config.embedding_init == "zero"
        model = with_guidance_embedding(model, config.embedding_dim, zero)
    model.set_scheduler(scheduler)
    return model


class ConsistencyObjective(DenoisingObjective):
    """Latent consistency distillation of all weights, or of the LoRA that the model carries.

    Arguments:
        model: of `prepare_student`. Its denoiser, as it is now, is the teacher: without a LoRA a
            frozen copy is taken of it.
        config: see `ConsistencyConfig`.
        lora: name of the LoRA that is trained, None when all weights are.
        dtype: of the teacher's copy.

    Raises `UserError` for a config that this model cannot be trained with.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        config: ConsistencyConfig,
        lora: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config.check()
        self.consistency = config.resolve(model, lora is not None)
        super().__init__(model, DenoisingConfig(condition_dropout=0.0), lora)
        added = getattr(model.denoiser.model.config, "time_cond_proj_dim", None) is not None
        self._teacher = None if lora else frozen_teacher(model, dtype, drop_embedding=added)
        self._distilled = model.family.takes_guidance and not added
        self._perceptual = _latent_lpips(config, model)
        self._student = ConsistencyPlayer(model.denoiser, self.consistency, self._perceptual)
        self._target: Ema | None = None
        self._watch = DiversityWatch(model, config.diversity_every)
        self._grids: dict[int, SolverGrid] = {}

    def told_guidance(self) -> float | None:
        """None: the scale is drawn for each sample."""
        return None

    def players(self) -> Mapping[str, nn.Module]:
        """One: the student."""
        return {"student": self._student}

    def phases(self) -> Sequence[Phase]:
        """One step of the student."""
        return (Phase("lcd", "student"),)

    def averaged(self) -> Sequence[str]:
        """The student."""
        return ("student",)

    def meet(self, prompts: Sequence[str]) -> None:
        """Watch what the student makes of these."""
        self._student.guard = self._watch.meet(prompts)

    def place(self, device: torch.device) -> None:
        """Move the teacher; take the student as it is for the target's average."""
        super().place(device)
        self._watch.place(self._device)
        for network in (self._teacher, self._perceptual):
            if network is not None:
                network.to(self._device)
        if self.consistency.target == "ema":
            self._target = Ema(self._student, self.consistency.decay, warm=False)

    def begin(self, step: int) -> None:
        """Look at pictures of one step, where that is due."""
        self._watch.look(step, self._made)

    def _made(self, noise: Tensor, cond: Conditioning) -> Tensor:
        """What the student makes in one step of noises (n, C, h, w)."""
        config = self.consistency
        t = self._grid(noise).start[-1].to(noise.device).expand(len(noise))
        told = None
        if self.model.family.takes_guidance:
            assert config.guidance_min is not None and config.guidance_max is not None
            told = noise.new_full((len(noise),), (config.guidance_min + config.guidance_max) / 2)
        ends: Tensor = self._student("end", None, Point(noise, t, torch.zeros_like(t), cond, told))
        return ends

    def inspect(self) -> None:
        """Warn, or raise `RunFailed`, when pictures of one prompt become alike."""
        self._watch.inspect(self.phases()[0].name)

    def stepped(self, phase: str, means: Mapping[str, Tensor]) -> None:
        """Let the target follow the student."""
        if phase == self.phases()[0].name and self._target is not None:
            self._target.update(0)

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The target's weights, and the diversity so far."""
        found = {} if self._target is None else {"target": self._target.weights}
        return found | dict(self._watch.state())

    # -- a step -------------------------------------------------------------------------------

    def draw(self, batch: Batch, repeat: int) -> ConsistencyDraws:
        """Noise, interval and guidance of each sample, by address."""
        draws = super().draw(batch, repeat)
        config, keys = self.consistency, batch.keys
        again = f"/{repeat}" if repeat else ""
        index = (keys.uniform(f"interval{again}") * config.solver_steps).long()
        interval = self._grid(draws.eps).at(index.clamp_max(config.solver_steps - 1))
        low, high = config.guidance_min, config.guidance_max
        assert low is not None and high is not None  # resolved
        guidance = low + (high - low) * keys.uniform(f"guidance{again}")
        named = {f.name: getattr(draws, f.name) for f in fields(draws)}
        times = (interval.start, interval.end, interval.edge)
        interval = Interval(*(t.to(self._device, non_blocking=True) for t in times))
        named["t"] = interval.start
        guidance = guidance.to(self._device, non_blocking=True)
        named["augmentation"] = self._augmentation(keys, draws.eps.shape, again)
        return ConsistencyDraws(**named, interval=interval, guidance=guidance)

    def _augmentation(self, keys: SampleKeys, shape: Sequence[int], again: str) -> Any:
        """T of each sample, of the kinds that the distance's network is meant for; None if none."""
        if self._perceptual is None or not self._perceptual.config.augmentation:
            return None
        from diffkit.perceptual.latent_augment import draw

        kinds, purpose = self._perceptual.config.augmentation, f"latent augmentation{again}"
        return draw(keys, shape, kinds, purpose).to(self._device)

    def _grid(self, latents: Tensor) -> SolverGrid:
        tokens = self.model.denoiser.tokens(*latents.shape[-2:])
        if tokens not in self._grids:
            config = self.consistency
            self._grids[tokens] = solver_grid(
                self.model.schedule, config.solver_steps, config.segments, tokens
            )
        return self._grids[tokens]

    def shared(self, draws: Draws) -> ConsistencyShared:
        """z_t, and the target from where the teacher's step leads."""
        assert isinstance(draws, ConsistencyDraws)
        z0, cond = self.latents(draws), self.condition(draws)
        interval, schedule = draws.interval, self.model.schedule
        told = draws.guidance if self.model.family.takes_guidance else None
        z_t = schedule.add_noise(z0, draws.eps, interval.start)
        start = Point(z_t, interval.start, interval.edge, cond, told)
        output = self.teacher_output(start, draws.guidance)
        prediction = schedule.prediction(output, z_t, interval.start)
        z_end = schedule.step(prediction, interval.end)
        end = Point(z_end, interval.end, interval.edge, cond, told)
        return ConsistencyShared(z0, cond, start, self.target(end))

    def teacher_output(self, point: Point, guidance: Tensor) -> Tensor:
        """The teacher's guided output (B, C, h, w) at least float32; no gradient.

        Arguments:
            guidance: (B,) scales, diffusers' convention.
        """
        low, high = self.consistency.guidance_min, self.consistency.guidance_max
        told = guidance if self._distilled else None
        if self._distilled or low == high == 1.0:
            return _wide(self._ask_teacher(Point(point.z, point.t, point.edge, point.cond, told)))
        assert self._null is not None
        every = torch.ones(len(guidance), dtype=torch.bool, device=guidance.device)
        both = Conditioning.cat([point.cond, point.cond.drop(every, self._null)])
        z, t, edge = (torch.cat([x, x]) for x in (point.z, point.t, point.edge))
        given, without = _wide(self._ask_teacher(Point(z, t, edge, both, None))).chunk(2)
        return lcm_guidance(given, without, guidance - 1)

    def _ask_teacher(self, point: Point) -> Tensor:
        if self._teacher is not None:
            output: Tensor = self._teacher(point.z, point.t, point.cond, point.guidance)
            return output
        from diffkit.models.lora import disable_lora

        with disable_lora(self.model):
            output = self._student("output", None, point)
        return output

    def target(self, point: Point) -> Tensor:
        """f_theta' at points, (B, C, h, w), at least float32; no gradient."""
        with self._as_target(), torch.no_grad():
            ends: Tensor = self._student("end", None, point)
        return ends

    @contextlib.contextmanager
    def _as_target(self) -> Iterator[None]:
        """Inside the block the student holds the target's weights."""
        if self._target is None:
            yield
        else:
            with self._target.applied():
                yield

    def save(self, folder: Path) -> None:
        """Write a plain diffusers folder with its usual guidance and steps, or the LoRA."""
        super().save(folder)
        if self.lora is None:
            add_to_card(folder, {**self.consistency.sampling(self.model), "distilled": True})


def _latent_lpips(config: ConsistencyConfig, model: LatentDiffusion) -> LatentLpips | None:
    """The network of the distance; `UserError` for one of other latents."""
    if config.distance != "e_latentlpips":
        return None
    from diffkit.perceptual.latent_lpips_io import check_latent_space, load_latent_lpips

    network = load_latent_lpips(config.latent_lpips)
    check_latent_space(network, model.codec, f"lcd.latent_lpips: {config.latent_lpips}")
    return network


def _wide(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))
