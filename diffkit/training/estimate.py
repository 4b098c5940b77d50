"""`--dry-run`: the resolved configuration and what the run will cost, without writing anything."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from torch import nn

from diffkit.data.folder import ImageFolder
from diffkit.data.loader import TrainingData
from diffkit.data.paired import PairedData
from diffkit.data.preference_columns import left_out
from diffkit.data.preferences import PreferenceData
from diffkit.data.stream import StreamedData
from diffkit.data.trajectories import TrajectoryData
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.base import Objective, reduce_loss
from diffkit.training.config import TrainConfig
from diffkit.training.configfile import dump
from diffkit.training.devices import make_accelerator, release_accelerator
from diffkit.training.folder import RunFolder
from diffkit.training.launch import build_companions, build_data, build_model, build_objective
from diffkit.training.players import Player
from diffkit.training.report import duration

__all__ = ["dry_run", "state_bytes"]

Data = TrainingData | StreamedData | PairedData | PreferenceData | TrajectoryData

_GIB = 1024**3
_MEASURED = 4
"""Micro-batches that a dry run measures, after one that does not count."""


def state_bytes(module: nn.Module, ema: bool) -> int:
    """Bytes of weights, gradients, Adam's two moments and the moving average, before sharding.

    A trainable parameter counts 4 float32 numbers, 5 with `ema`; a frozen one its own size.
    """
    total = 0
    for parameter in module.parameters():
        own = parameter.numel() * parameter.element_size()
        total += parameter.numel() * 4 * (5 if ema else 4) if parameter.requires_grad else own
    return total


def dry_run(config: TrainConfig) -> int:
    """Print the report. Every check of a real start is made; nothing is written.

    Raises `UserError` for what would stop the real run.
    """
    config.check()
    RunFolder(config).check(config)
    accelerator = make_accelerator(config)
    try:
        config.check_processes(accelerator.num_processes)
        model = build_model(config)
        data = _paired(config, model, build_data(config, model))
        objective = build_objective(config, model)
        lines = [dump(config), *_costs(config, accelerator, data, objective)]
    finally:
        release_accelerator(accelerator)
    if accelerator.is_main_process:
        print("\n".join(lines))
    return 0


def _paired(config: TrainConfig, model: LatentDiffusion, data: Data) -> Data:
    """With the second set of the run; where that has to be made, the first one stands in for it."""
    wanted = config.companions()
    if wanted is None or not isinstance(data, TrainingData):
        return data
    source = data.source if wanted.folder is None else ImageFolder(wanted.folder)
    return PairedData(data, build_companions(config, model, source))


def _costs(config: TrainConfig, accelerator: Any, data: Data, objective: Objective) -> list[str]:
    averaged = set(objective.averaged())
    lines = ["pictures: a stream of unknown length"]
    if not isinstance(data, StreamedData):
        noun = "pairs" if isinstance(data, PreferenceData | TrajectoryData) else "pictures"
        lines = [f"{noun}: {len(data)} ({data.steps_per_epoch:.1f} steps an epoch)"]
    if isinstance(data, PreferenceData):
        lines.append(f"left out of {data.source.rows} rows: {left_out(data.source)}")
    wanted = config.companions()
    if wanted is not None:
        made = f"{wanted.count} are made first" if wanted.folder is None else f"{wanted.folder}"
        lines.append(f"class pictures: {made}")
    memory = 0
    for name, module in objective.players().items():
        average = name in averaged and config.ema is not None
        trainable, total = Player(name, module, config, average).count()
        memory += state_bytes(module, average)
        lines.append(f"{name}: {trainable:,} of {total:,} parameters are trained")
    seconds = _measure(config, accelerator, data, objective)
    if accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [
        *lines,
        f"processes: {accelerator.num_processes} on {accelerator.device.type}",
        f"weights, gradients, optimizer and average: {memory / _GIB:.2f} GiB",
        f"peak memory of one micro-batch, measured: {peak / _GIB:.2f} GiB",
        f"one step, measured without caches: {seconds:.3g} s",
        f"{config.max_steps} steps: about {duration(seconds * config.max_steps)}",
    ]


def _measure(config: TrainConfig, accelerator: Any, data: Data, objective: Objective) -> float:
    """Seconds of one training step on this process: the mean of some micro-batches after the first.

    Several, since what a step does may hang on its times; as of the run's last steps, by when what
    starts later has started and what calibrates at first has ended.
    """
    players = objective.players()
    for module in players.values():
        module.to(accelerator.device)
    objective.place(accelerator.device)
    world, rank = accelerator.num_processes, accelerator.process_index
    costs = []
    for number in range(1 + _MEASURED):
        objective.begin(max(0, config.max_steps - number) if number else 0)
        began = time.perf_counter()
        batch = next(iter(data.batches(number, number + 1, rank, world, config.accumulation)))
        with accelerator.autocast():
            draws = objective.draw(batch, 0)
            with torch.no_grad():
                shared = objective.shared(draws)
        cost = time.perf_counter() - began
        for phase in objective.phases():
            began = time.perf_counter()
            with accelerator.autocast():
                terms = players[phase.player](phase.name, draws, shared)
            reduce_loss(terms["loss"], config.batch_size, world).backward()
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            cost += (time.perf_counter() - began) * phase.repeats / phase.every
        costs.append(cost * config.accumulation)
    return sum(costs[1:]) / _MEASURED
