"""A whole job over one process or several: units are shared out, results gathered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffkit.console import progress
from diffkit.generation.run import Processes
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.companions import class_pictures, read_folder
from diffkit.protection.inputs import Skipped
from diffkit.protection.job import Job, Request, Unit
from diffkit.protection.record import Extra
from diffkit.protection.rounds import work_of
from diffkit.protection.settings import Settings
from diffkit.protection.worker import Worker

__all__ = ["Outcome", "run_job"]


@dataclass(frozen=True)
class Outcome:
    """What a job left, over all processes.

    Attributes:
        made: results written now.
        kept: pictures that were done before.
        skipped: files that are no pictures, with reasons.
        failed: pictures that could not be done: path -> reason.
    """

    made: tuple[Path, ...]
    kept: int
    skipped: Sequence[Skipped] = ()
    failed: dict[str, str] = field(default_factory=dict)


def run_job(
    job: Job,
    request: Request,
    model: LatentDiffusion | None,
    *,
    ensemble: Sequence[LatentDiffusion] = (),
    extras: Sequence[Extra] = (),
    perceptual: Any = None,
    weights: Sequence[str] = (),
    processes: Processes | None = None,
) -> Outcome:
    """Do what is pending, this process's share of it, and gather what came of all shares.

    Arguments:
        job: from `plan_job`, the same in every process.
        request: what was asked for.
        model, ensemble: loaded models; None for the random control.
        extras: what else is measured of each finished picture.
        perceptual: an LPIPS network, or None.
        weights: digests of the weights of model and ensemble, for the records.
        processes: this one among the others.
    """
    processes = processes or Processes()
    # All must have looked at the folder before one of them changes it, or their shares overlap.
    processes.wait()
    mine = job.pending[processes.rank :: processes.count]
    clean = of_class = None
    if model is not None and job.pending:
        output = request.output
        if request.clean is not None:
            clean = read_folder(request.clean, output, "--clean")
        given = request.class_images
        of_class = class_pictures(request.settings, model, given, output, processes)
    with_bar = _Ticks(sum(_work(unit, request.settings) for unit in mine))
    worker = Worker(
        request,
        model,
        ensemble,
        extras,
        with_bar.tick,
        perceptual=perceptual,
        weights=weights,
        clean=clean,
        class_images=of_class,
    )
    worker.run(mine)
    with_bar.close()
    made, failed = _gathered(worker.made, worker.failed, processes)
    kept = sum(item.done for item in job.items)
    return Outcome(made, kept, job.skipped, failed)


def _work(unit: Unit, settings: Settings) -> int:
    """Ticks of the progress bar for a unit."""
    if settings.row.joint is not None:
        return work_of(settings, len(unit.items))
    return len(unit.items) * max(1, settings.rule().steps)


class _Ticks:
    """A progress bar that is told of finished work instead of being iterated."""

    def __init__(self, total: int) -> None:
        self._bar: Iterator[int] = iter(progress(range(total), "protecting"))
        next(self._bar, None)

    def tick(self, count: int) -> None:
        for _ in range(count):
            next(self._bar, None)

    def close(self) -> None:
        for _ in self._bar:
            pass


def _gathered(
    made: Sequence[Path], failed: dict[str, str], processes: Processes
) -> tuple[tuple[Path, ...], dict[str, str]]:
    """Sums over all processes; every process gets them, so that all end with one exit code."""
    processes.wait()
    if processes.count == 1:
        return tuple(made), failed
    rows: list[Any] = [None] * processes.count
    torch.distributed.all_gather_object(rows, (made, failed))
    every = {path: reason for _, reasons in rows for path, reason in reasons.items()}
    return tuple(sorted(path for paths, _ in rows for path in paths)), dict(sorted(every.items()))
