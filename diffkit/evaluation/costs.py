"""The costs of one or two models side by side: time, throughput, memory, parameters, MACs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffkit.console import say
from diffkit.evaluation.cost import ModelCost, model_cost
from diffkit.evaluation.latency import (
    STAGES,
    Subject,
    Timing,
    median_interval,
    stages_of,
    time_rounds,
)
from diffkit.evaluation.memory import peak_memory
from diffkit.models.cost import parameter_count

__all__ = ["measure_costs"]

_ROUNDS = 9
_SECONDS = 30.0


def measure_costs(subjects: Mapping[str, Subject], batch_size: int) -> dict[str, Any]:
    """The report's "cost": what one picture costs each model, measured in turn in one run.

    Seconds are medians with 95 % intervals, of one picture alone: "text" and "decode" of all their
    calls, "denoiser" of one call, "picture" of everything. `pictures_per_second` and
    `peak_memory_bytes` are of a batch. A stage that a model does not have has no entry. MACs of
    "denoiser" are those of one call for one picture, both halves of guidance included. With two
    models "speedup" is seconds of the second over those of the first, with the interval of the
    rounds' ratios.

    Args:
        subjects: one or two models on their device, the recipes of at least one picture each.
        batch_size: pictures at once for throughput and memory, as far as there are recipes.
    """
    say("measuring time and memory")
    names = list(subjects)
    single = [Subject(s.model, s.recipes[:1]) for s in subjects.values()]
    batch = [Subject(s.model, s.recipes[:batch_size]) for s in subjects.values()]
    alone = time_rounds(single, _ROUNDS, _SECONDS)
    together = alone if batch_size == 1 else time_rounds(batch, 3, _SECONDS, least=1)
    costs = {name: _costs(batch[i], alone[i], together[i]) for i, name in enumerate(names)}
    if len(names) == 2:
        ratios = [theirs.picture / ours.picture for ours, theirs in zip(*alone, strict=True)]
        costs[names[0]]["speedup"] = median_interval(ratios)
    return costs


def _costs(subject: Subject, alone: Sequence[Timing], together: Sequence[Timing]) -> dict[str, Any]:
    model, first = subject.model, subject.recipes[0]
    counted = model_cost(model, first.width, first.height)
    batch_seconds = median_interval([timing.picture for timing in together])["value"]
    networks = model.networks.items()
    return {
        "device": _device_name(subject),
        "dtype": first.dtype,
        "size": [first.width, first.height],
        "batch_size": len(subject.recipes),
        "steps": first.steps,
        "guided": alone[0].rows["denoiser"] > alone[0].calls["denoiser"],
        "calls": alone[0].calls["denoiser"],
        "rounds": len(alone),
        "parameters": {name: parameter_count(part) for name, part in networks},
        "macs": _macs(subject, counted, alone[0]),
        "seconds": _seconds(alone),
        "pictures_per_second": len(subject.recipes) / batch_seconds,
        "peak_memory_bytes": peak_memory(subject),
    }


def _seconds(timings: Sequence[Timing]) -> dict[str, dict[str, float]]:
    found = {}
    for stage in STAGES:
        if stage in timings[0].seconds:
            calls = timings[0].calls[stage] if stage == "denoiser" else 1
            found[stage] = median_interval([t.seconds[stage] / calls for t in timings])
    return found | {"picture": median_interval([timing.picture for timing in timings])}


def _macs(subject: Subject, counted: ModelCost, timing: Timing) -> dict[str, int]:
    """From the calls that were seen: a sampler may call the network more often than its steps."""
    costs = {"text": counted.text, "denoiser": counted.denoiser, "decode": counted.decode}
    parts = stages_of(subject.model)
    # `counted` has one prompt through all encoders, one row through the others.
    total = {stage: costs[stage].macs * timing.rows[stage] // len(parts[stage]) for stage in parts}
    picture = sum(total.values())
    total["denoiser"] //= timing.calls["denoiser"]
    return {**total, "picture": picture}


def _device_name(subject: Subject) -> str:
    import torch

    device = subject.model.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' * (threads > 1)}"
