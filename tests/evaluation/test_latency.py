"""Times, calls and MACs of a pipeline's stages, seen inside its own call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffkit.evaluation.cost import model_cost
from diffkit.evaluation.costs import measure_costs
from diffkit.evaluation.latency import Subject, median_interval, time_once, time_rounds
from diffkit.evaluation.memory import peak_memory
from diffkit.generation.plan import Request, open_model, plan
from diffkit.models.latent_diffusion import LatentDiffusion


@pytest.fixture(scope="module")
def model(tiny_sd: Path) -> LatentDiffusion:
    return open_model(str(tiny_sd), (), torch.float32, "cpu")


def subject(model: LatentDiffusion, num: int = 1, **options: object) -> Subject:
    request = Request(prompts=("a cat",), model=model.source, num=num, **options)
    return Subject(model, tuple(plan(request, model)))


def test_calls_and_rows_of_the_stages(model: LatentDiffusion) -> None:
    guided = time_once(subject(model, num=2, steps=3, guidance=5.0))
    assert guided.calls["denoiser"] == 3
    assert guided.rows["denoiser"] == 3 * 2 * 2
    assert guided.calls["decode"] == 1
    assert guided.rows["decode"] == 2
    plain = time_once(subject(model, num=2, steps=3, guidance=1.0))
    assert plain.rows["denoiser"] == 3 * 2
    assert plain.rows["text"] == 2


def test_a_second_order_sampler_calls_twice(model: LatentDiffusion) -> None:
    timing = time_once(subject(model, steps=3, scheduler="heun"))
    assert timing.calls["denoiser"] == 2 * 3 - 1


def test_stages_are_parts_of_the_whole(model: LatentDiffusion) -> None:
    timing = time_once(subject(model, steps=4))
    assert set(timing.seconds) == {"text", "denoiser", "decode"}
    assert all(seconds > 0 for seconds in timing.seconds.values())
    assert sum(timing.seconds.values()) < timing.picture
    hooked = [part for part in model.networks.values() if part._forward_pre_hooks]
    assert not hooked


def test_rounds_time_every_subject_as_often(model: LatentDiffusion) -> None:
    short, long = subject(model, steps=1), subject(model, steps=8)
    timings = time_rounds([short, long], rounds=4, seconds=60)
    assert [len(found) for found in timings] == [4, 4]
    assert len(time_rounds([short], rounds=9, seconds=0)[0]) == 3


def test_median_interval() -> None:
    assert median_interval([2.0] * 5) == {"value": 2.0, "low": 2.0, "high": 2.0}
    found = median_interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found["value"] == 3
    assert found["low"] == 1
    assert found["high"] == 100


@pytest.mark.slow
def test_costs_of_two_step_counts(model: LatentDiffusion) -> None:
    pair = {"model": subject(model, num=2, steps=2), "against": subject(model, num=2, steps=20)}
    costs = measure_costs(pair, batch_size=2)
    counted = model_cost(model, 32, 32)
    for name, steps in (("model", 2), ("against", 20)):
        cost = costs[name]
        assert cost["macs"]["picture"] == counted.macs(steps)
        assert cost["macs"]["denoiser"] == 2 * counted.denoiser.macs
        assert cost["parameters"] == counted.parameters
        assert (cost["steps"], cost["calls"], cost["guided"]) == (steps, steps, True)
        seconds = cost["seconds"]["picture"]
        assert 0 < seconds["low"] <= seconds["value"] <= seconds["high"]
        assert cost["peak_memory_bytes"] > 10**8  # torch alone takes more
    assert costs["model"]["speedup"]["low"] > 1
    assert "speedup" not in costs["against"]


@pytest.mark.slow
def test_peak_memory_is_that_of_a_process_of_its_own(model: LatentDiffusion) -> None:
    """What this process held before must not count."""
    ballast = torch.ones(300_000_000)
    before = peak_memory(subject(model, steps=1))
    assert before is not None
    assert before < 4 * len(ballast)


@pytest.mark.parametrize("name", ["pixel", "dit"])
def test_costs_of_models_without_text_or_without_a_codec(
    name: str, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffkit.evaluation.costs._SECONDS", 0)
    model = open_model(str(tiny_folder(name)), (), torch.float32, "cpu")
    prompts = ("",) if name == "pixel" else ("red fox",)
    scheduler = None if name == "pixel" else "ddim"
    request = Request(prompts, model.source, num=2, steps=2, scheduler=scheduler)
    cost = measure_costs({"model": Subject(model, tuple(plan(request, model)))}, 4)["model"]
    stages = {"denoiser"} if name == "pixel" else {"denoiser", "decode"}
    assert set(cost["macs"]) - {"picture"} == set(cost["seconds"]) - {"picture"} == stages
    assert min(cost["macs"].values()) > 0
    assert cost["batch_size"] == 2  # there are no more recipes
