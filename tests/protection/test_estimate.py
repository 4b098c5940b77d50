"""Estimates of a step: arithmetic on published models, and what a real step does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from real_sizes import REAL_SIZES, conditioning

from diffkit.models.cost import Cost, Rates, count, parameter_count
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.skeleton import skeleton
from diffkit.protection.estimate import (
    Estimate,
    StepCost,
    StepShape,
    estimate_step,
    in_bytes,
    in_time,
)
from diffkit.protection.protect import Attack, plan_for, prepared
from diffkit.protection.settings import Settings

TERA = 1e12


def _slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


# Encoder forward and back; denoiser forward, back; TFLOP without the products of attention.
PUBLISHED = [
    ("SD1.5", 2.16, 0.68, 0.67),
    ("SDXL", 8.66, 5.98, 5.92),
    ("SD3-medium", 8.66, 6.01, 6.00),
]


def test_a_published_model_in_its_parts() -> None:
    """The slow test beside this one counts all kinds of steps of all three."""
    name, *expected = PUBLISHED[0]
    shape = REAL_SIZES[str(name)]
    model, cond = shape.skeleton(), conditioning(shape)
    passes = StepShape("backward")
    step = estimate_step(model, shape.size, shape.size, passes, dtype=torch.bfloat16, cond=cond)
    up, down, *denoiser = [cost.flops_without_attention / TERA for _, cost in step.passes]
    assert [up + down, *denoiser] == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "encoder", "forward", "backward"), PUBLISHED)
def test_published_models(name: str, encoder: float, forward: float, backward: float) -> None:
    shape = REAL_SIZES[name]
    model, cond = shape.skeleton(), conditioning(shape)

    def step(passes: StepShape) -> StepCost:
        return estimate_step(model, shape.size, shape.size, passes, dtype=torch.bfloat16, cond=cond)

    texture, sds = step(StepShape("none")), step(StepShape("forward"))
    advdm, lean = step(StepShape("backward")), step(StepShape("backward", lean=True))
    assert texture.flops / TERA == pytest.approx(encoder, rel=0.05)
    assert sds.flops / TERA == pytest.approx(encoder + forward, rel=0.05)
    assert advdm.flops / TERA == pytest.approx(encoder + forward + backward, rel=0.05)
    # two passes: the encoder forward once more; besides, most of the denoiser is computed again
    again = lean.passes[-1][1].flops_without_attention - advdm.passes[-1][1].flops_without_attention
    two_passes = encoder / 2 + encoder + forward + backward
    assert (lean.flops - again) / TERA == pytest.approx(two_passes, rel=0.05)
    assert 0.6 * forward * TERA < again < 1.01 * forward * TERA
    assert texture.memory_bytes < sds.memory_bytes < advdm.memory_bytes
    assert lean.memory_bytes < advdm.memory_bytes
    assert lean.saved_bytes < advdm.saved_bytes / 2


@pytest.mark.parametrize("name", ["pixel", *map(_slow, ("sd3", "sdxl", "flux", "dit"))])
def test_every_family(tiny_folder: Callable[[str], Path], name: str) -> None:
    bones = skeleton(str(tiny_folder(name)))
    for passes in ("none", "forward", "backward"):
        for lean in (False, True):
            cost = estimate_step(bones, 32, 32, StepShape(passes, lean))
            assert cost.memory_bytes >= cost.weight_bytes + cost.saved_bytes
            assert cost.flops > 0 or (passes == "none" and bones.family.codec is None)


@pytest.mark.parametrize(
    ("method", "lean"),
    [
        ("texture", False),
        ("sds-", True),
        pytest.param("advdm", False, marks=pytest.mark.slow),
        ("advdm", True),
        pytest.param("photoguard-diffusion", False, marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_what_a_step_does(tiny_sd: Path, method: str, lean: bool) -> None:
    model = LatentDiffusion.load(tiny_sd)
    settings = Settings(method, draws=None if method == "texture" else 2)
    pixels = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    with prepared(model, settings, lean=lean) as surrogates:
        plan = plan_for(model, settings, 32, 32)
        attack = Attack.prepare(pixels, surrogates, settings, seeds=[0], plan=plan, lean=lean)
        gradient, x = attack.gradient, attack.pictures.clean
        assert gradient is not None
        gradient(x, 0)  # encodes the target, once
        real = count(lambda: gradient(x, 0))
        real_score = count(lambda: gradient.score(x))
    cost = estimate_step(skeleton(str(tiny_sd)), 32, 32, StepShape.of(settings, lean=lean))
    assert cost.flops_with_attention == real.flops
    assert cost.flops == real.flops_without_attention
    if method != "texture":
        assert sum(n * part.flops for n, part in cost.score) == real_score.flops


def test_how_the_shape_enters(tiny_sd: Path) -> None:
    bones = skeleton(str(tiny_sd))

    def step(**options: object) -> StepCost:
        return estimate_step(bones, 32, 32, StepShape("forward", **options))  # type: ignore[arg-type]

    one, encoder = step(), estimate_step(bones, 32, 32, StepShape())
    draw = one.flops - encoder.flops
    many = step(draws=3, batch=2)
    assert many.flops == 2 * (encoder.flops + 3 * draw)
    assert many.memory_bytes - many.weight_bytes == 2 * (one.memory_bytes - one.weight_bytes)
    assert step(draws=3, transformed=True).flops == 3 * one.flops
    half = estimate_step(bones, 32, 32, StepShape(), dtype=torch.bfloat16)
    assert 2 * half.memory_bytes == encoder.memory_bytes


@pytest.mark.slow
def test_an_unrolled_sampler_calls_and_calls_again(tiny_sd: Path) -> None:
    """Three guided steps: six calls forward, the same again with their backward pass, and the
    picture."""
    bones = skeleton(str(tiny_sd))
    encoder, one = (estimate_step(bones, 32, 32, StepShape(p)) for p in ("none", "backward"))
    unrolled = estimate_step(bones, 32, 32, StepShape("backward", unrolled=3, guided=True))
    assert unrolled.flops > encoder.flops + 6 * (one.flops - encoder.flops)


def test_autoencoders_that_overflow_float16_are_counted_in_float32(
    tiny_sd: Path,
) -> None:
    """They compute on a float32 copy, and were counted as if in float16."""
    bones = skeleton(str(tiny_sd))
    found = {}
    for upcast in (False, True):
        bones.codec.vae.register_to_config(force_upcast=upcast)
        found[upcast] = estimate_step(bones, 32, 32, StepShape(), dtype=torch.float16)
    count = parameter_count(bones.codec.vae)
    assert (found[False].weight_bytes, found[True].weight_bytes) == (2 * count, 6 * count)
    live = [found[k].memory_bytes - found[k].weight_bytes for k in (False, True)]
    assert live[1] == 2 * live[0] and found[True].saved_bytes == 2 * found[False].saved_bytes
    both = estimate_step(bones, 32, 32, StepShape("forward"), dtype=torch.float16)
    network = both.weight_bytes - found[True].weight_bytes
    assert network == 2 * parameter_count(bones.denoiser)


def test_a_job_is_its_steps(tiny_sd: Path) -> None:
    cost = estimate_step(skeleton(str(tiny_sd)), 32, 32, StepShape("forward", batch=2))
    one = Rates(matmul=1.0, conv=1.0)
    job = Estimate(cost, steps=10, views=3, pictures=4, rates=one, scores=0)
    assert job.flops == cost.flops * 10 * 3 * 2
    assert job.seconds == pytest.approx(cost.flops_with_attention / 2 * 10 * 3 * 2)
    judged = Estimate(cost, steps=10, views=3, pictures=4, rates=one)
    assert judged.seconds == pytest.approx(job.seconds + 2 * cost.score_seconds(one) * 3 * 2)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "under a second"),
        (42.4, "about 42 s"),
        (240.0, "about 4 min"),
        (9000.0, "about 2.5 h"),
    ],
)
def test_time_in_words(seconds: float, words: str) -> None:
    assert in_time(seconds) == words


def test_words() -> None:
    assert (in_bytes(350_000_000), in_bytes(2_340_000_000)) == ("350 MB", "2.3 GB")
    step = StepCost(((1, Cost(100, 0, 0)),), (), 1, 0, 0, 2_340_000_000)
    assert Estimate(step, steps=24).words() == "2.3 GB"
    rates = Rates(matmul=10.0, conv=1.0)
    assert Estimate(step, steps=24, rates=rates).words() == "about 4 min, 2.3 GB"
