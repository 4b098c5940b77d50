"""How many edits an audit makes, and about how long they take, said before it starts.

An edit is counted on the model without weights: the encoder, the denoiser at each step (twice with
guidance) and the decoder. Purifiers and the networks that measure are not counted.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from diffkit.audit.edits import EditThreat
from diffkit.audit.mimicry_settings import RECIPES
from diffkit.audit.outcome import Audit
from diffkit.audit.request import AuditRequest
from diffkit.audit.subjects import working_views
from diffkit.models.cost import Cost, Rates, count, measure_rates
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.model_card import public_name
from diffkit.models.skeleton import skeleton_of
from diffkit.protection.estimate import in_time

__all__ = ["Cells", "Plan", "plan_edits"]

_BACKWARD = 3
"""A step of training, in forward passes of the denoiser."""

SAMPLE_STEPS = 50
"""Steps in which imitators draw."""


@dataclass(frozen=True)
class Cells:
    """Cells of a table that are to be measured.

    Attributes:
        threat: the edit.
        purified: behind a purifier.
        versions: of each picture.
        size: (height, width) of the picture.
    """

    threat: EditThreat
    purified: bool
    versions: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """What is to be made with one model.

    Attributes:
        model: its name.
        edits: to be made; `purified` of them behind purifiers.
        cells, present: rows of single pictures to be measured, and those that are there already.
        pictures, noises: of the audit.
        trainings: (kind, trainings, steps of each) of imitators, at most.
        seconds: estimated, for the model's networks alone.
    """

    model: str
    edits: int
    purified: int
    cells: int
    present: int
    pictures: int
    noises: int
    trainings: tuple[tuple[str, int, int], ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The same for machines."""
        return dataclasses.asdict(self)

    @property
    def words(self) -> str:
        """For a person, in one or two lines."""
        lines = []
        if self.cells + self.present:
            lines.append(
                f"{self.edits} edits by {self.model} to make ({self.edits - self.purified} plain, "
                f"{self.purified} behind purifiers; {self.pictures} pictures x {self.noises} "
                f"noises); {self.present} of {self.cells + self.present} measurements are there."
            )
        for kind, trainings, steps in self.trainings:
            lines.append(f"{kind}: at most {trainings} trainings of {steps} steps.")
        lines.append(
            f"estimate: {in_time(self.seconds)} for the networks of {self.model}; measuring and "
            "purifiers come on top."
        )
        return "\n".join(lines)


def plan_edits(
    request: AuditRequest,
    audit: Audit,
    model: LatentDiffusion,
    pending: Sequence[Cells],
    present: int,
    kinds: Sequence[str],
) -> Plan:
    """Count what is pending.

    Arguments:
        pending: cells to be measured.
        present: how many are there already.
        kinds: of imitators.
    """
    noises = len(audit.seeds)
    trainings = tuple(
        (kind, 3 + len(request.mimicry.partial), request.mimicry.steps or RECIPES[kind].steps)
        for kind in kinds
    )
    seconds = 0.0
    if pending or trainings:
        count_of = _Counted(model, measure_rates(request.device, model.dtype))
        for (strength, steps, guidance, size), number in _rows(pending).items():
            run = round(strength * steps) * (1 if guidance == 1 else 2)
            seconds += number * noises * count_of.edit(size, run)
        for kind, number, steps in trainings:
            seconds += number * count_of.imitator(kind, steps, request.mimicry.samples)
    return Plan(
        public_name(model.source),
        noises * sum(cells.versions for cells in pending),
        noises * sum(cells.versions for cells in pending if cells.purified),
        len(pending),
        present,
        len(audit.pictures),
        noises,
        trainings,
        seconds,
    )


def _rows(pending: Sequence[Cells]) -> Counter[tuple[float, int, float, tuple[int, int]]]:
    found: Counter[tuple[float, int, float, tuple[int, int]]] = Counter()
    for cells in pending:
        known = cells.threat.parameters
        key = (known["strength"], known["steps"], known["guidance"], cells.size)
        found[key] += cells.versions
    return found


class _Counted:
    """Seconds of calls of one model, each size counted once."""

    def __init__(self, model: LatentDiffusion, rates: Rates) -> None:
        self.model, self.rates = model, rates
        self.net = skeleton_of(model)
        self.costs = cache(self._costs)

    def _costs(self, height: int, width: int) -> tuple[Cost, Cost, Cost]:
        """Of the encoder, the denoiser and the decoder for one view."""
        net = self.net
        picture = torch.zeros(1, 3, height, width, device="meta")
        latents = torch.zeros(1, *net.codec.latent_shape(height, width), device="meta")
        z = torch.zeros(1, net.denoiser.geometry.channels, *latents.shape[-2:], device="meta")
        t = torch.ones(1, device="meta")
        cond = net.conditioner.encode([net.conditioner.example], (height, width))
        told = t if net.family.takes_guidance else None
        return (
            count(lambda: net.codec.encode_moments(picture)),
            count(lambda: net.denoiser(z, t, cond, told)),
            count(lambda: net.codec.decode(latents)),
        )

    def edit(self, size: tuple[int, int], calls: int) -> float:
        """Seconds of one edit of a picture, with so many calls of the denoiser."""
        total = 0.0
        for view in working_views(self.model, *size):
            encoder, denoiser, decoder = self.costs(*view.size)
            total += self.rates.seconds(encoder, decoder)
            total += calls * self.rates.seconds(denoiser)
        return total

    def imitator(self, kind: str, steps: int, samples: int) -> float:
        """Seconds of one training and of what it draws."""
        _, denoiser, _ = self.costs(self.model.default_size, self.model.default_size)
        calls = _BACKWARD * steps * RECIPES[kind].batch_size + 2 * SAMPLE_STEPS * samples
        return calls * self.rates.seconds(denoiser)
