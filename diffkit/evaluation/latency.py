"""How long a picture takes, stage by stage, of two models in turn.

A machine's speed drifts (other processes, heat, clocks), so a quotient of two separate runs says
little. Here every round times each model once, in random order. The stages of a picture are timed
inside one call of its stock pipeline, by hooks on the networks: what is measured is what is used.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffkit.console import progress
from diffkit.generation.engine import render
from diffkit.generation.recipe import Recipe
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.randomness import generator

__all__ = ["STAGES", "Subject", "Timing", "median_interval", "stages_of", "time_rounds"]

STAGES = ("text", "denoiser", "decode")


@dataclass(frozen=True)
class Subject:
    """What is timed: a model on its device, and the recipes of as many pictures as one batch."""

    model: LatentDiffusion
    recipes: tuple[Recipe, ...]


@dataclass
class Timing:
    """One call of a pipeline.

    Attributes:
        picture: seconds of the whole call, from prompts to 8-bit pictures.
        seconds: those inside each stage's networks, all their calls together.
        calls: of each stage's networks.
        rows: samples that those calls saw; guidance shows the denoiser two a picture.
    """

    picture: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)


def stages_of(model: LatentDiffusion) -> dict[str, list[nn.Module]]:
    """The networks of each of `STAGES` that this model has; a pixel model decodes nothing."""
    networks = model.networks
    text = [networks[name] for name in model.family.text_components if name in networks]
    stages = {"text": text, "denoiser": [networks[model.family.denoiser]]}
    if model.family.codec is not None:
        stages["decode"] = [networks[model.family.codec].get_submodule("decoder")]
    return {name: parts for name, parts in stages.items() if parts}


class _Clock:
    """Moments of a device: CUDA events, which stop nothing, elsewhere the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """Now."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        if self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to a later one, once the device has come there."""
        if self.device.type != "cuda":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


@contextmanager
def _watched(model: LatentDiffusion, clock: _Clock) -> Iterator[Timing]:
    """Within the context, calls of the model's networks are timed; filled in at its end."""
    timing = Timing()
    marks: dict[str, list[Any]] = {}
    handles = []

    def watch(stage: str, part: nn.Module) -> None:
        marks.setdefault(stage, [])
        timing.calls[stage] = timing.rows[stage] = 0

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            # Samples, tokens or latents come first in every call of diffusers and transformers.
            first = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            timing.calls[stage] += 1
            timing.rows[stage] += len(first)
            marks[stage].append(clock.mark())

        def after(module: nn.Module, args: Any, output: Any) -> None:
            marks[stage].append(clock.mark())

        # The codec may call a decoder's blocks one by one: from its first layer to its last.
        blocks = stage == "decode" and hasattr(part, "conv_in") and hasattr(part, "conv_out")
        opening: Any = part.conv_in if blocks else part
        closing: Any = part.conv_out if blocks else part
        handles.append(opening.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(closing.register_forward_hook(after))

    for stage, parts in stages_of(model).items():
        for part in parts:
            watch(stage, part)
    try:
        yield timing
    finally:
        for handle in handles:
            handle.remove()
    for stage, times in marks.items():
        pairs = zip(times[::2], times[1::2], strict=True)
        timing.seconds[stage] = sum(clock.between(start, end) for start, end in pairs)


def time_once(subject: Subject) -> Timing:
    """Draw the subject's pictures once."""
    clock = _Clock(subject.model.device)
    with _watched(subject.model, clock) as timing:
        start = clock.mark()
        render(subject.model, subject.recipes)
        end = clock.mark()
    return dataclasses.replace(timing, picture=clock.between(start, end))


def time_rounds(
    subjects: Sequence[Subject], rounds: int, seconds: float, seed: int = 0, least: int = 3
) -> list[list[Timing]]:
    """One list of timings a subject: round r of all subjects was measured together.

    Args:
        subjects: each is drawn once before, unmeasured: the first call chooses kernels.
        rounds: at most.
        seconds: no round is begun after this time, once there are `least`.
        seed: draws the order inside each round.
    """
    for subject in subjects:
        time_once(subject)
    order = generator(seed, "order of timings")
    taken: list[list[Timing]] = [[] for _ in subjects]
    end = time.perf_counter() + seconds
    for done in progress(range(rounds), "timing"):
        if done >= least and time.perf_counter() > end:
            break
        for which in torch.randperm(len(subjects), generator=order).tolist():
            taken[which].append(time_once(subjects[which]))
    return taken


def median_interval(
    values: Sequence[float], level: float = 0.95, seed: int = 0
) -> dict[str, float]:
    """{"value", "low", "high"}: the median and its percentile-bootstrap interval."""
    data = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(0, len(data), (10_000, len(data)))
    tail = 50 * (1 - level)
    low, high = np.percentile(np.median(data[rows], axis=1), [tail, 100 - tail])
    return {"value": statistics.median(values), "low": float(low), "high": float(high)}
