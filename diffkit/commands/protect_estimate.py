"""What a protection job will take, said before it starts, and its fit to the free memory.

One step of the largest view is counted on networks without weights; other views count by their
area. What happens at the picture's own size (resizing, the step itself, reading, measuring and
saving) is timed on a small picture and scaled by pixels: with large pictures it is most of it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffkit.models.cost import measure_rates, parameter_count
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.skeleton import skeleton, skeleton_of
from diffkit.protection.estimate import StepCost, StepShape, estimate_step, in_bytes, in_time
from diffkit.protection.job import Job, Request
from diffkit.protection.memory import Effort, free_memory
from diffkit.protection.pgd import Pgd, StepRule
from diffkit.protection.protect import check_mask, check_model, idle_networks, plan_for
from diffkit.protection.rounds import work_of
from diffkit.protection.settings import Settings
from diffkit.protection.timesteps import SEARCH

__all__ = ["JobEstimate", "Models", "estimate_job"]

_AROUND = 8
"""Reading, the control, measuring and saving cost about as much as this many steps do apart from
the networks."""

_BUFFERS = 12
"""float32 copies of a picture that a step and the measures hold."""

_MARGIN = 0.9
"""Share of the free memory that a job may be planned for."""

_WAITING = 7
"""Bytes of each value of a picture of a folder that is protected together: as it was read, as it is
attacked and as it is saved, 8 bits each, and x."""

_SAMPLE = 512  # side in pixels of the picture that is timed


@dataclass(frozen=True)
class Models:
    """Where the networks of a count come from.

    Attributes:
        loaded: models in memory; empty where only their configs are to be read.
        sources: their names, read when nothing is loaded.
        revision: of the first, if it is a hub id.
    """

    loaded: Sequence[LatentDiffusion]
    sources: Sequence[str] = ()
    revision: str | None = None

    def skeletons(self) -> list[LatentDiffusion]:
        """The same without weights; those of loaded models are not read again."""
        if self.loaded:
            return [skeleton_of(model) for model in self.loaded]
        revisions = [self.revision, *[None] * (len(self.sources) - 1)]
        return [skeleton(*pair) for pair in zip(self.sources, revisions, strict=True)]


@dataclass(frozen=True)
class JobEstimate:
    """What the pending pictures of a job will take.

    Attributes:
        settings: of the job.
        pictures: to be done.
        present: results that are in the output folder already.
        views: (fewest, most) views a step.
        largest: (height, width) of the largest view; None where no model is used.
        flops: floating-point operations of the networks, attention's products left out.
        seconds: estimated; with a limit of LPIPS for the worst case of its search.
        memory_bytes: estimated peak on the device, the weights of all networks included.
        waiting_bytes: what a folder that is protected together takes in the memory of the CPU.
        free_bytes: what is free for it, None if unknown.
        lean, batch_size: how it will be done.
        lowered: whether these ask for less memory than the user did.
    """

    settings: Settings
    pictures: int
    present: int
    views: tuple[int, int] = (0, 0)
    largest: tuple[int, int] | None = None
    flops: int = 0
    seconds: float = 0.0
    memory_bytes: int = 0
    waiting_bytes: int = 0
    free_bytes: int | None = None
    lean: bool = False
    batch_size: int = 1
    lowered: bool = False

    @property
    def fits(self) -> bool:
        """Whether it is expected to fit; True where the free memory is unknown."""
        return self.free_bytes is None or self.memory_bytes <= _MARGIN * self.free_bytes

    @property
    def words(self) -> str:
        """For a person, in a few lines."""
        rule, done = self.settings.rule(), "no picture" if not self.pictures else ""
        what = done or f"{self.pictures} picture{'s' if self.pictures > 1 else ''}"
        lines = [f"{what} to protect: {self.settings.method}, at most {rule.levels} levels"]
        if self.present:
            lines[0] += f"; {self.present} results are there already"
        if self.largest is None:
            return lines[0] + "."
        low, high = self.views
        views = f"{low}" if low == high else f"{low} to {high}"
        height, width = self.largest
        lines[0] += (
            f", {rule.steps} steps of {views} view{'s' if high > 1 else ''}, the model sees up to "
            f"{width}x{height}."
        )
        free = "" if self.free_bytes is None else f" of {in_bytes(self.free_bytes)} free"
        lines.append(
            f"estimate: {in_time(self.seconds)}, {in_bytes(self.memory_bytes)} of memory{free}, "
            f"{_si(self.flops)}FLOP."
        )
        if self.waiting_bytes:
            folder = in_bytes(self.waiting_bytes)
            lines.append(f"All pictures of a folder wait in the memory of the CPU: {folder}.")
        if self.settings.class_prompt is not None:
            lines.append("Making class pictures comes on top, where they are not there yet.")
        if self.lowered:
            how = f", {self.batch_size} at once" if self.batch_size > 1 else ", one at a time"
            lines.append(f"To fit the memory: two passes a step{how}.")
        if not self.fits:
            lines.append(
                "This may be more than the free memory holds: --dtype bf16, --views 1 or smaller "
                "pictures need less."
            )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        rule = self.settings.rule()
        return {
            "method": self.settings.method,
            "levels": rule.levels,
            "steps": rule.steps if self.largest is not None else 0,
            "pictures": self.pictures,
            "present": self.present,
            "views": list(self.views),
            "largest_view": None if self.largest is None else list(self.largest),
            "flops": self.flops,
            "seconds": self.seconds,
            "memory_bytes": self.memory_bytes,
            "waiting_bytes": self.waiting_bytes,
            "free_bytes": self.free_bytes,
            "low_vram": self.lean,
            "batch_size": self.batch_size,
        }

    def fitted(self, request: Request) -> Request:
        """The request, with less memory at once where the estimate asks for it."""
        return dataclasses.replace(request, lean=self.lean, batch_size=self.batch_size)


def estimate_job(
    job: Job, request: Request, models: Models, device: str, dtype: torch.dtype
) -> JobEstimate:
    """Count the pending pictures of a job on this machine.

    Raises `UserError` where the model cannot do what the method needs, before its weights are read.
    """
    settings = request.settings
    items = [item for unit in job.pending for item in unit.items if not item.done]
    present = sum(item.done or item.output.exists() for item in job.items)
    if settings.row.loss is None or not items:
        return JobEstimate(settings, len(items), present)
    nets = models.skeletons()
    for net in nets:
        check_model(net, settings)
    check_mask(nets[0], settings, request.mask is not None)
    sizes = Counter(item.source.header.size for item in items)
    place = torch.device(device)
    plans = {size: plan_for(nets[0], settings, *size, device=place).shapes for size in sizes}
    largest = max((view for plan in plans.values() for view in plan), key=math.prod)
    seen = sum(sizes[size] * sum(map(math.prod, plan)) for size, plan in plans.items())
    areas = seen / math.prod(largest)
    pixels = sum(3 * math.prod(size) * count for size, count in sizes.items())
    waiting = _waiting(job, settings)
    most = 3 * max(map(math.prod, sizes))
    count = _Count(nets, settings, largest, dtype, most, waiting if place.type == "cpu" else None)
    batch = min(request.batch_size, len(items))
    effort = Effort(batch, request.lean)
    free = free_memory(device)
    held = count.loaded if models.loaded else 0
    while free is not None and count.memory(effort) - held > _MARGIN * free and effort.lower():
        pass
    rates = measure_rates(device, dtype)
    step = count.step(effort.lean)
    scores = 2 + (settings.rule().steps // 10 if settings.keep_best else 0)
    gradients = _gradients(job, settings)
    network = gradients * step.seconds(rates) + scores * step.score_seconds(rates)
    own = (settings.rule().steps + _AROUND) * pixels * _pixel_seconds(device)
    tries = 1 if request.max_lpips is None else 1 + math.ceil(math.log2(settings.rule().levels))
    return JobEstimate(
        settings=settings,
        pictures=len(items),
        present=present,
        views=(min(map(len, plans.values())), max(map(len, plans.values()))),
        largest=largest,
        flops=int(areas * gradients * step.flops),
        seconds=tries * (areas * network + own),
        memory_bytes=count.memory(effort),
        waiting_bytes=waiting,
        free_bytes=None if free is None else free + held,
        lean=effort.lean,
        batch_size=effort.batch_size,
        lowered=(effort.lean, effort.batch_size) != (request.lean, batch),
    )


def _waiting(job: Job, settings: Settings) -> int:
    """Bytes of the largest folder that is protected together."""
    if settings.row.joint is None:
        return 0
    values = [sum(3 * math.prod(i.source.header.size) for i in unit.items) for unit in job.pending]
    return _WAITING * max(values)


def _gradients(job: Job, settings: Settings) -> float:
    """Gradients for each picture: those of its steps, of the search for times at its longest, and
    of a surrogate's training, a step of which is taken for one."""
    own = settings.rule().steps + (SEARCH if settings.times == "greedy" else 0)
    if settings.row.joint is None:
        return own
    sizes = [len(unit.items) for unit in job.pending]
    steps = sum(work_of(settings, size) for size in sizes) / sum(sizes)
    return own + steps - settings.rule().steps


class _Count:
    """Costs of a step of the largest view, each effort counted once.

    Arguments:
        nets: without weights.
        settings: method and options.
        view: (height, width) of the largest.
        dtype: of the networks.
        pixels: values of the largest picture.
        shared: bytes of what waits on a CPU, where the networks are there too; None on others.
    """

    def __init__(
        self,
        nets: Sequence[LatentDiffusion],
        settings: Settings,
        view: tuple[int, int],
        dtype: torch.dtype,
        pixels: int,
        shared: int | None,
    ) -> None:
        self.nets, self.settings, self.view, self.dtype = nets, settings, view, dtype
        self.pixels = pixels
        self.shared = shared
        self._steps: dict[bool, StepCost] = {}

    @property
    def loaded(self) -> int:
        """Bytes of all networks, which are on the device at first."""
        return self._bytes([part for net in self.nets for part in net.networks.values()])

    @property
    def _aside(self) -> int:
        """Bytes of those that leave it before the first step."""
        if self.shared is not None:
            return 0
        return self._bytes(
            [part for net in self.nets for part in idle_networks(net, self.settings)]
        )

    def _bytes(self, networks: Sequence[torch.nn.Module]) -> int:
        return self.dtype.itemsize * sum(map(parameter_count, networks))

    def step(self, lean: bool) -> StepCost:
        """One picture's, over all models."""
        if lean not in self._steps:
            shape = StepShape.of(self.settings, lean=lean)
            costs = [estimate_step(net, *self.view, shape, dtype=self.dtype) for net in self.nets]
            self._steps[lean] = _added(costs)
        return self._steps[lean]

    def memory(self, effort: Effort) -> int:
        """Estimated peak in bytes."""
        step = self.step(effort.lean)
        each = step.memory_bytes - step.weight_bytes + 4 * _BUFFERS * self.pixels
        weights = self.loaded - self._aside + self._copied + self._trained
        return max(self.loaded, weights + effort.batch_size * each + (self.shared or 0))

    @property
    def _copied(self) -> int:
        """Bytes of autoencoders that compute on a copy in float32."""
        vaes = [net.codec.vae for net in self.nets if net.codec.computes(self.dtype) != self.dtype]
        return 4 * sum(parameter_count(vae) for vae in vaes if vae is not None)

    @property
    def _trained(self) -> int:
        """Bytes of a surrogate whose weights all train: float32 weights, gradients and both moments
        of Adam. Those of a LoRA are nothing beside the rest."""
        if self.settings.surrogate != "full":
            return 0
        return 16 * parameter_count(self.nets[0].denoiser)


def _added(costs: Sequence[StepCost]) -> StepCost:
    """One model after the other: operations and weights add up, the larger activations count."""
    live = max(cost.memory_bytes - cost.weight_bytes for cost in costs)
    weights = sum(cost.weight_bytes for cost in costs)
    return StepCost(
        passes=tuple(part for cost in costs for part in cost.passes),
        score=tuple(part for cost in costs for part in cost.score),
        batch=1,
        weight_bytes=weights,
        saved_bytes=max(cost.saved_bytes for cost in costs),
        memory_bytes=weights + live,
    )


def _pixel_seconds(device: str) -> float:
    """Seconds a step for each number of a picture, the networks left out."""
    pixels = torch.zeros(1, 3, _SAMPLE, _SAMPLE, dtype=torch.uint8, device=device)
    walk = Pgd(pixels, StepRule(steps=2), [0])
    state = walk.start()

    def gradient(x: torch.Tensor, step: int) -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        small = torch.nn.functional.interpolate(
            leaf, (64, 64), mode="bilinear", align_corners=False, antialias=True
        )
        return torch.autograd.grad(small.sum(), leaf)[0]

    walk.advance(state, gradient, 0, 1)
    start = time.perf_counter()
    walk.advance(state, gradient, 1, 2)
    float(state.x[0, 0, 0, 0])  # waits for the device
    return (time.perf_counter() - start) / 2 / pixels.numel()


def _si(value: float) -> str:
    """Three digits and a prefix: 2.16e12 -> "2.16 T"."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} E"
