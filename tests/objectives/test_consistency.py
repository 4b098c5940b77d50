"""Latent consistency distillation as an objective: teacher, target, gradients, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffkit.errors import UserError
from diffkit.models.consistency import Interval, lcm_guidance, pseudo_huber
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import add_lora, lora_parameters
from diffkit.objectives.consistency import ConsistencyObjective, prepare_student
from diffkit.objectives.consistency_config import ConsistencyConfig
from diffkit.objectives.consistency_player import Point
from diffkit.perceptual.latent_lpips import LatentLpips, LatentLpipsConfig, e_latentlpips
from diffkit.perceptual.latent_lpips_io import load_latent_lpips, save_latent_lpips
from diffkit.training.consistency import ConsistencyTraining
from tests.objectives.test_denoising import make_batch
from tests.tiny import build_sd


def objective(folder: Path, lora: bool = False, **config: Any) -> ConsistencyObjective:
    """On the model in `folder`, all weights of its denoiser or a LoRA in training."""
    settings = ConsistencyConfig(**config)
    model = prepare_student(LatentDiffusion.load(folder), settings, lora)
    for network in model.networks.values():
        network.requires_grad_(False)
    if lora:
        add_lora(model, 2, name="default")
        for name, parameter in lora_parameters(model).items():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter)
    else:
        model.denoiser.model.requires_grad_(True)
    made = ConsistencyObjective(model, settings, "default" if lora else None)
    made.meet(["a fox", "a tree"])
    made.place(torch.device("cpu"))
    return made


def material(method: ConsistencyObjective, n: int = 4) -> tuple[Any, Any]:
    draws = method.draw(make_batch(n), 0)
    with torch.no_grad():
        return draws, method.shared(draws)


def terms(method: ConsistencyObjective, n: int = 4) -> dict[str, Any]:
    draws, shared = material(method, n)
    return method.players()["student"]("lcd", draws, shared)


# -- teacher and target -------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
@torch.no_grad()
def test_the_teacher_is_the_start_model_with_guidance(tiny_sd: Path, lora: bool) -> None:
    """Both branches as from the plain model, whatever the student has become."""
    method = objective(tiny_sd, lora, guidance_min=1.5, guidance_max=9.0)
    if not lora:
        for parameter in method.model.denoiser.parameters():
            parameter.mul_(1.1)
    draws, shared = material(method)
    start: Point = shared.start
    plain = LatentDiffusion.load(tiny_sd)
    cond = plain.conditioner.encode([f"picture {i}" for i in range(4)])
    null = plain.conditioner.null(1).expand(4)
    given, without = (plain.denoiser(start.z, start.t, c) for c in (cond, null))
    want = lcm_guidance(given, without, draws.guidance - 1)
    found = method.teacher_output(start, draws.guidance)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert draws.guidance.min() >= 1.5 and draws.guidance.unique().numel() == 4


@torch.no_grad()
def test_the_target_of_the_first_interval_is_the_solvers_step(tiny_sd: Path) -> None:
    """Bit for bit, whatever finite value the network returns there."""
    method = objective(tiny_sd)
    draws, _ = material(method)
    first = Interval(torch.full((4,), 19), torch.zeros(4).long(), torch.zeros(4).long())
    draws = replace(draws, interval=first, t=first.start)
    shared = method.shared(draws)
    schedule = method.model.schedule
    output = method.teacher_output(shared.start, draws.guidance)
    step = schedule.step(schedule.prediction(output, shared.start.z, first.start), first.end)
    assert torch.equal(shared.target, step)
    for parameter in method.model.denoiser.parameters():
        parameter.mul_(3)
    assert torch.equal(
        method.target(Point(step, first.end, first.edge, *shared_cond(shared))), step
    )


def shared_cond(shared: Any) -> tuple[Any, Any]:
    return shared.start.cond, shared.start.guidance


def test_the_target_is_told_the_same_scale(tiny_sd: Path) -> None:
    method = objective(tiny_sd, embedding_init="default", target="online")
    draws, shared = material(method)
    assert torch.equal(shared.start.guidance, draws.guidance)
    wrong = replace(draws, guidance=draws.guidance.flip(0))
    with torch.no_grad():
        other = method.shared(wrong)
    assert not torch.equal(shared.target, other.target)


def test_loss_by_hand_and_what_has_a_gradient(tiny_sd: Path) -> None:
    method = objective(tiny_sd)
    draws, shared = material(method)
    found = method.players()["student"]("lcd", draws, shared)
    estimate = method._student.end(shared.start)
    assert torch.equal(found["loss"], pseudo_huber(estimate, shared.target, 1e-3))
    assert not shared.target.requires_grad and found["loss"].shape == (4,)
    assert torch.equal(found["time"], draws.t / 1000) and found["loss"].dtype == torch.float32
    found["loss"].mean().backward()
    student = dict(method.model.denoiser.model.named_parameters())
    new = student.pop("time_embedding.cond_proj.weight")
    assert new.grad is not None and new.grad.abs().sum() > 0
    assert all(p.grad is not None for p in student.values())
    assert sum(float(p.grad.abs().sum()) for p in student.values() if p.grad is not None) > 0
    assert method._teacher is not None
    others = [*method.model.networks.values(), method._teacher]
    others.remove(method.model.denoiser.model)
    assert all(p.grad is None for network in others for p in network.parameters())
    names = {name for name, _ in method.players()["student"].named_parameters()}
    assert names == {
        f"denoiser.model.{name}" for name in (*student, "time_embedding.cond_proj.weight")
    }


def test_only_the_lora_has_a_gradient(tiny_sd: Path) -> None:
    method = objective(tiny_sd, lora=True)
    terms(method)["loss"].mean().backward()
    adapter = {id(p) for p in lora_parameters(method.model).values()}
    for parameter in method.model.denoiser.parameters():
        assert (parameter.grad is not None) == (id(parameter) in adapter)
    assert method.state().keys() == {"diversity"}  # the target is the student itself


@torch.no_grad()
def test_the_target_is_the_moving_average_in_closed_form(tiny_sd: Path) -> None:
    """theta_k = theta_0 + k d: the average after n steps, mu = 0.9, is

    theta_0 + d (n - mu (1 - mu^n) / (1 - mu)).
    """
    method = objective(tiny_sd, decay=0.9)
    weights = method.state()["target"]
    start = {name: weight.clone() for name, weight in weights.items()}
    assert any(name.endswith("cond_proj.weight") for name in start)
    for _ in range(7):
        for parameter in method.model.denoiser.parameters():
            parameter.add_(0.01)
        method.stepped("lcd", {})
    moved = 0.01 * (7 - 0.9 * (1 - 0.9**7) / 0.1)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, start[name] + moved, rtol=1e-4, atol=1e-5)


def test_targets_differ(tiny_sd: Path) -> None:
    """The average lags behind; the online target is what the student says now."""
    for target in ("ema", "online"):
        method = objective(tiny_sd, target=target)
        with torch.no_grad():
            for parameter in method.model.denoiser.parameters():
                parameter.mul_(1.05)
            _, shared = material(method)
            now = method._student.end(shared.start)
            said = method.target(shared.start)
        assert torch.equal(said, now) == (target == "online")


def test_distances(tiny_sd: Path) -> None:
    found = {}
    for distance in ("huber", "l2"):
        method = objective(tiny_sd, distance=distance)
        draws, shared = material(method)
        gap = method._student.end(shared.start) - shared.target
        found[distance] = method.players()["student"]("lcd", draws, shared)["loss"]
        if distance == "l2":
            torch.testing.assert_close(found["l2"], gap.square().flatten(1).mean(1))
    assert not torch.equal(found["huber"], found["l2"])


def test_e_latentlpips_as_the_distance(tiny_sd: Path, tmp_path: Path) -> None:
    """One addressed draw a sample; its network stays in float32 and gets no gradient."""
    torch.manual_seed(0)
    for channels in (4, 8):
        network = LatentLpips(LatentLpipsConfig(channels, width=2, layout="pre_pool"))
        save_latent_lpips(network, tmp_path / str(channels))
    words: dict[str, Any] = {"distance": "e_latentlpips", "latent_lpips": str(tmp_path / "4")}
    method = objective(tiny_sd, **words)
    draws, shared = material(method)
    found = method.players()["student"]("lcd", draws, shared)["loss"]
    estimate = method._student.end(shared.start)
    loaded = load_latent_lpips(tmp_path / "4")
    want = e_latentlpips(loaded, estimate, shared.target, draws.augmentation)
    torch.testing.assert_close(found, want)
    found.mean().backward()
    assert isinstance(method._perceptual, LatentLpips)
    assert all(p.grad is None for p in method._perceptual.parameters())
    assert method.model.denoiser.model.get_submodule("conv_in").weight.grad is not None
    assert not any("lpips" in name for name, _ in method.players()["student"].named_parameters())
    with pytest.raises(UserError, match="latents of 8 channels"):
        objective(tiny_sd, **words | {"latent_lpips": str(tmp_path / "8")})


def test_maps_are_those_that_the_network_is_meant_for(tiny_sd: Path, tmp_path: Path) -> None:
    """Every network was used with the embedded one's kinds, also one for latents without maps."""
    batch = make_batch(4)
    found: dict[str, Any] = {}
    for kinds in ("", "bg", "bgc"):
        network = LatentLpips(LatentLpipsConfig(4, width=2, augmentation=kinds))
        save_latent_lpips(network, tmp_path / f"net{kinds}")
        words: dict[str, Any] = {"distance": "e_latentlpips"}
        method = objective(tiny_sd, latent_lpips=str(tmp_path / f"net{kinds}"), **words)
        draws = method.draw(batch, 0)
        found[kinds] = draws.augmentation
        assert method.players()["student"].distance(draws.eps, -draws.eps, draws).isfinite().all()
    assert found[""] is None
    assert (found["bg"].kinds, found["bgc"].kinds) == ("bg", "bgc")


def test_segments_stop_at_their_edges(tiny_sd: Path) -> None:
    method = objective(tiny_sd, segments=2)
    draws, shared = material(method, 16)
    interval = draws.interval
    assert set(interval.edge.tolist()) == {0, 499} and (interval.end >= interval.edge).all()
    assert method.model.schedule.sampling_timesteps(2).tolist() == [999, 499, -1]
    assert method.consistency.sampling(method.model) == {"guidance_scale": 7.5, "steps": 2}
    assert method.players()["student"]("lcd", draws, shared)["loss"].isfinite().all()


def test_draws_do_not_depend_on_the_split(tiny_sd: Path) -> None:
    from tests.objectives.test_denoising import rows

    method, batch = objective(tiny_sd), make_batch(4)
    whole, part = method.draw(batch, 0), method.draw(rows(batch, slice(2, 4)), 0)
    assert torch.equal(whole.t[2:], part.t) and torch.equal(whole.guidance[2:], part.guidance)
    assert not torch.equal(method.draw(batch, 1).t, whole.t)


def test_diversity_is_measured_when_due(tiny_sd: Path) -> None:
    method = objective(tiny_sd, diversity_every=3)
    method.begin(1)
    assert terms(method)["diversity"].tolist() == [0.0] * 4
    method.begin(3)
    assert (terms(method)["diversity"] > 0).all()
    assert method.state()["diversity"]["value"].item() > 0


# -- other models -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd-v", "sdxl", "sd3", "flux", "flux-schnell", "pixart-alpha"])
def test_every_kind_of_teacher(tiny_folder: Callable[[str], Path], name: str) -> None:
    method = objective(tiny_folder(name))
    told = name in ("sd-v", "sdxl", "flux")
    config = method.consistency
    assert config.embedding == told and (config.guidance_min != config.guidance_max) == told
    found = terms(method)
    assert found["loss"].isfinite().all() and (found["loss"] > 0).all()
    found["loss"].mean().backward()
    assert any(p.grad is not None for p in method.model.denoiser.parameters())
    flow = method.model.schedule.kind == "flow"
    scheduler = type(method.model.scheduler).__name__
    assert scheduler == ("FlowMatchLCMScheduler" if flow else "LCMScheduler")
    guidance = (config.guidance_max - 1) / 2 + 1 if told else 1
    assert config.sampling(method.model)["guidance_scale"] == guidance


def test_a_teacher_that_predicts_x0(tmp_path: Path) -> None:
    method = objective(build_sd(tmp_path / "sd", "sample"))
    draws, shared = material(method)
    found = method.players()["student"]("lcd", draws, shared)["loss"]
    start = shared.start
    output = method.model.denoiser(start.z, start.t, start.cond, start.guidance)
    torch.testing.assert_close(output, method._student.end(shared.start), rtol=1e-3, atol=1e-4)
    assert found.isfinite().all()


@torch.no_grad()
def test_flux_dev_is_asked_once_and_told_the_scale(tiny_folder: Callable[[str], Path]) -> None:
    method = objective(tiny_folder("flux"), guidance_min=2.0, guidance_max=5.0)
    draws, shared = material(method)
    plain = LatentDiffusion.load(tiny_folder("flux"))
    start = shared.start
    want = plain.denoiser(start.z, start.t, start.cond, draws.guidance)
    assert torch.equal(method.teacher_output(start, draws.guidance), want)


@torch.no_grad()
def test_sdxl_drops_prompt_and_pooled_text_but_no_sizes(tiny_sdxl: Path) -> None:
    method = objective(tiny_sdxl)
    draws, shared = material(method)
    plain = LatentDiffusion.load(tiny_sdxl)
    start = shared.start
    nothing = replace(
        start.cond,
        tokens=torch.zeros_like(start.cond.tokens),
        pooled=torch.zeros_like(start.cond.pooled),
    )
    given, without = (plain.denoiser(start.z, start.t, c) for c in (start.cond, nothing))
    want = lcm_guidance(given, without, draws.guidance - 1)
    found = method.teacher_output(start, draws.guidance)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"segments": 3}, "not equal"),
        ({"solver_steps": 0}, "above 0"),
        ({"guidance_min": 2.0}, "give both"),
        ({"guidance_min": 3.0, "guidance_max": 2.0}, "no range"),
        ({"target": "online", "decay": 0.9}, "no effect without --lcd.target ema"),
        ({"distance": "l2", "huber": 0.1}, "no effect without --lcd.distance huber"),
        ({"latent_lpips": "x"}, "no effect without --lcd.distance e_latentlpips"),
        ({"embedding": False, "embedding_dim": 64}, "no effect without --lcd.embedding true"),
        ({"segments": 2, "distance": "e_latentlpips"}, "clean latents"),
        ({"embedding_dim": 5}, "even"),
        ({"decay": 1.0}, "not in"),
        ({"diversity_every": -1}, "negative"),
        ({"huber": float("nan")}, "finite"),
    ],
)
def test_values_that_cannot_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ConsistencyConfig(**values).check()


@pytest.mark.parametrize(
    ("name", "lora", "values", "message"),
    [
        ("sd", True, {"embedding": True}, "no place for the new input"),
        ("sd", True, {"decay": 0.9}, "no effect without"),
        ("sd", True, {"embedding_dim": 64}, "no new input"),
        ("sd3", False, {"embedding": True}, "no input for the guidance"),
        ("flux", False, {"embedding": False}, "always told"),
        ("sd", False, {"solver_steps": 2000}, "1000 training times"),
        ("sd", False, {"solver_steps": 30, "segments": 2}, "do not divide"),
        ("sd3", False, {"segments": 2}, "does not stop at the edges"),
        ("sdxl-edm", False, {}, "EDM"),
    ],
)
def test_models_that_cannot_be_distilled_so(
    tiny_folder: Callable[[str], Path],
    name: str,
    lora: bool,
    values: dict[str, Any],
    message: str,
) -> None:
    model = LatentDiffusion.load(tiny_folder(name))
    with pytest.raises(UserError, match=message):
        prepare_student(model, ConsistencyConfig(**values), lora)


def test_a_student_is_no_teacher(tiny_sd: Path) -> None:
    model = prepare_student(LatentDiffusion.load(tiny_sd), ConsistencyConfig(), False)
    with pytest.raises(UserError, match="distilled to few steps already"):
        prepare_student(model, ConsistencyConfig(), False)


def test_eps_at_pure_noise_is_refused(tmp_path: Path) -> None:
    model = LatentDiffusion.load(build_sd(tmp_path / "sd", "epsilon", zero_snr=True))
    with pytest.raises(UserError, match="pure noise"):
        prepare_student(model, ConsistencyConfig(), False)


def test_the_card_and_validation_keep_to_what_was_trained(tiny_folder: Any, tmp_path: Path) -> None:
    """Validation pictures had the model's usual guidance, trained or not; a grid of two solver
    steps had a card of four, which no scheduler samples in."""
    lcd = ConsistencyConfig(guidance_min=1.1, guidance_max=1.4, solver_steps=2)
    config = ConsistencyTraining("x", tmp_path, lcd=lcd)
    model = config.prepared(LatentDiffusion.load(tiny_folder("sd-v")))
    assert lcd.resolve(model, False).sampling(model) == {"guidance_scale": 1.4, "steps": 2}
    assert config.sampling_guidance(model) == 1.4
    several = replace(config, validation_prompts=tmp_path / "prompts.txt")
    with pytest.raises(UserError, match="use --validation-steps 2"):
        several.prepared(LatentDiffusion.load(tiny_folder("sd-v")))
