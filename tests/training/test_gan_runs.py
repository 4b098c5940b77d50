"""`diffkit train gan` on tiny true models: results in plain diffusers, every kind of loss.

(Stopping, killing and splitting: test_objective_runs.py.)
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    LCMScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file

from diffkit.cli import main
from diffkit.data.trajectory_store import latent_space
from diffkit.errors import UserError
from diffkit.generation.card import read_card
from diffkit.models.few_step import one_step
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import load_lora
from diffkit.objectives.diffusion_gan_config import GanConfig
from diffkit.perceptual.latent_lpips import LatentLpips, LatentLpipsConfig
from diffkit.perceptual.latent_lpips_io import save_latent_lpips
from diffkit.randomness import normal
from diffkit.training.diffusion_gan import GanTraining, build_gan
from tests.data.trajectory_folder import build
from tests.training.test_denoising_runs import rows

SLOW = pytest.mark.slow
MSE = ("--gan.regression", "mse")
GAN = (*MSE, "--gan.warmup", 1, "--gan.r1-every", 2)


@pytest.fixture
def train(tmp_path, tiny_folder):
    """`train(*words)` runs `diffkit train gan` on ten pairs; returns the run's folder."""

    def run(*words, model="sd-v", name="out", code=0, data=None):
        if data is None:
            data = tmp_path / f"pairs-{model}"
            if not data.exists():
                teacher = LatentDiffusion.load(tiny_folder(model))
                shape = teacher.latent_shape(32, 32)
                build(data, shape=shape, space=latent_space(teacher))
        flags = ["--model", tiny_folder(model), "--data", data, "--output", tmp_path / name]
        flags += ["--tracker", "none", "--max-steps", 4, "--batch-size", 4, "--ema", "None"]
        flags += ["--learning-rate", "1e-3", *words]
        assert main(["train", "gan", *map(str, flags)]) == code
        return tmp_path / name

    return run


def noises(channels: int = 4) -> torch.Tensor:
    return normal((2, channels, 16, 16), "noise of a picture")


def stock(pipe: Any, latents: torch.Tensor, **more: Any) -> torch.Tensor:
    """Latents of a stock pipeline's single step."""
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"} | more
    found = pipe(["a cat"] * 2, height=32, width=32, latents=latents, **options).images
    return torch.as_tensor(found)


def generator(model: LatentDiffusion, z: torch.Tensor, t: float, guidance: Any = None) -> Any:
    """G's own forward pass."""
    cond = model.conditioner.encode(["a cat"] * 2, (32, 32))
    time = torch.full((2,), t)
    told = None if guidance is None else torch.full((2,), guidance)
    with torch.no_grad():
        return one_step(model.denoiser, z, cond, time.long() if t < 1000 else time, told)


def check_rows(found: list[dict[str, Any]]) -> None:
    """What four steps of the generator and the discriminator log."""
    assert "generator/adversarial" not in found[0]
    assert found[1]["generator/adversarial_weight"] == 0  # nothing was measured yet
    assert found[3]["generator/adversarial_weight"] > 0
    assert [row["discriminator/r1"] is None for row in found] == [False, True, False, True]
    for row in found:
        assert 0 <= row["discriminator/accuracy"] <= 1
        assert row["generator/loss"] > 0 and row["generator/diversity"] > 0
        assert {"discriminator/real_logit", "discriminator/fake_logit"} <= row.keys()


def test_the_result_is_a_stock_pipeline_of_one_step(train, tiny_folder, tmp_path):
    """One step of `LCMScheduler` in plain diffusers is the generator; nothing else has changed."""
    run = train(*GAN)
    check_rows(rows(run))
    folder = run / "model"
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert isinstance(pipe.scheduler, LCMScheduler)
    z = noises()
    ours = LatentDiffusion.load(folder)
    torch.testing.assert_close(stock(pipe, z), generator(ours, z, 999), rtol=1e-6, atol=1e-6)
    for part in ("vae", "text_encoder", "unet"):
        (before,), (after,) = (
            list((f / part).glob("*.safetensors")) for f in (tiny_folder("sd-v"), folder)
        )
        old, new = load_file(before), load_file(after)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[k], new[k]) for k in old) == (part != "unet")
    card = read_card(str(folder))
    assert (card.guidance_scale, card.steps) == (1.0, 1)
    said = 'pipeline("...", num_inference_steps=1, guidance_scale=1.0)'
    assert said in (folder / "README.md").read_text()
    out = tmp_path / "pictures"
    words = ["generate", "a tree", "--model", folder, "--output", out, "--num", 1]
    assert main(list(map(str, words))) == 0
    assert len(list(out.glob("0*.png"))) == 1


@SLOW
def test_a_lora_of_one_step(train, tiny_folder):
    run = train(*GAN, "--lora-rank", 2, "--learning-rate", "0.1")
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder("sd-v"), safety_checker=None)
    more = {"original_inference_steps": 50, "clip_sample": False}
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, **more)
    z = noises()
    before = stock(pipe, z)
    pipe.load_lora_weights(run / "lora")
    model = LatentDiffusion.load(tiny_folder("sd-v"))
    load_lora(model, run / "lora")
    torch.testing.assert_close(stock(pipe, z), generator(model, z, 999), rtol=1e-4, atol=1e-5)
    assert (stock(pipe, z) - before).abs().max() > 1e-3
    said = (run / "lora" / "README.md").read_text()
    assert "LCMScheduler.from_config" in said and "num_inference_steps=1" in said


@SLOW
@pytest.mark.parametrize(("name", "time"), [("sd", None), ("sd", 399), ("sdxl", 399)])
def test_eps_models_and_earlier_times(name, time, train):
    words = () if time is None else ("--gan.time", time)
    folder = train(*GAN, *words, model=name) / "model"
    options = {} if name == "sdxl" else {"safety_checker": None}
    pipe = DiffusionPipeline.from_pretrained(folder, **options)
    z, ours = noises(), LatentDiffusion.load(folder)
    expected = generator(ours, z, time or 999)
    torch.testing.assert_close(stock(pipe, z), expected, rtol=1e-4, atol=1e-4)


@SLOW
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_transformers_with_heads_on_frozen_features(name, train):
    folder = train(*GAN, model=name) / "model"
    kind = StableDiffusion3Pipeline if name == "sd3" else FluxPipeline
    pipe, ours, z = kind.from_pretrained(folder), LatentDiffusion.load(folder), noises(16)
    guidance = 3.5 if name == "flux" else None
    expected = generator(ours, z, 1000.0, guidance)
    more = {"guidance_scale": 3.5} if name == "flux" else {}
    found = stock(pipe, ours.family.pack(z), **more)
    torch.testing.assert_close(found, ours.family.pack(expected), rtol=1e-4, atol=1e-4)
    assert read_card(str(folder)).guidance_scale == (3.5 if name == "flux" else 1.0)


@SLOW
@pytest.mark.parametrize("kind", ["mse", "huber", "lpl", "latentlpips", "e_latentlpips"])
def test_every_regression_alone(kind, train, tmp_path):
    """Twenty steps towards the same pairs lower the loss."""
    words = ["--gan.regression", kind, "--gan.discriminator", "none", "--max-steps", 20]
    if kind.endswith("lpips"):
        torch.manual_seed(0)
        save_latent_lpips(LatentLpips(LatentLpipsConfig(4, width=4)), tmp_path / "metric")
        words += ["--gan.latent-lpips", tmp_path / "metric"]
    losses = [row["loss"] for row in rows(train(*words, "--batch-size", 10))]
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])


@SLOW
@pytest.mark.parametrize(
    "words",
    [
        ("--gan.discriminator", "ladd", "--gan.r1", "approximate"),
        ("--gan.no-multiscale", "--gan.noise-input", "False", "--gan.mismatch", 0),
        ("--gan.weight", 0.1, "--gan.r1", "none", "--gan.start", 1),
        ("--gan.dmd", "--dmd.updates", 2, "--gan.rate", 0.5),
        ("--gan.dmd", "--gan.discriminator", "none", "--dmd.weight", 0.5),
    ],
    ids=lambda words: "".join(map(str, words[:2])),
)
def test_every_kind_of_adversary(words, train):
    found = rows(train(*MSE, "--gan.warmup", 1, *words, "--mixed-precision", "bf16"))
    values = [v for row in found for k, v in row.items() if k.endswith("loss")]
    assert len(values) >= 7 and all(value == value and abs(value) < 1e4 for value in values)


@SLOW
def test_distribution_matching_on_pictures(train, pictures):
    words = ("--gan.regression", "none", "--gan.dmd", "--gan.pictures", "--gan.warmup", 1)
    found = rows(train(*words, "--cache-latents", data=pictures))
    assert "generator/dmd" not in found[0] and found[3]["generator/dmd"] > 0
    assert found[0]["fake_score/loss"] > 0 and found[0]["discriminator/r1"] is not None


@SLOW
def test_a_second_stage_with_the_first_ones_teacher(train, tiny_folder, tmp_path):
    first = train(*MSE, "--gan.discriminator", "none", name="first")
    words = ("--gan.teacher", tiny_folder("sd-v"), "--model", first / "model")
    found = rows(train(*GAN, *words, name="second"))
    check_rows(found)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "second" / "model")
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert pipe.scheduler.config.original_inference_steps == 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gan.warmup", 4), "gan.start, warmup: 0 and 4 steps are not below"),
        (("--validation-steps", 4), "validation_steps: the generator"),
        (("--compile", "--gan.warmup", 0), "compile: networks are asked"),
        (
            ("--attention", "xformers", "--gan.discriminator", "unet", "--gan.warmup", 0),
            "attention: xformers has no second",
        ),
        (("--flip", "--gan.warmup", 0), "flip: is about pictures"),
        (("--dmd.updates", 3, "--gan.warmup", 0), "dmd.updates: would do nothing"),
    ],
)
def test_what_cannot_be_combined(words, message, train, capsys, tmp_path):
    train(*MSE, *words, code=2, data=tmp_path / "nowhere")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_copied_of_a_named_teacher_spares_memory_too(tiny_folder, tmp_path):
    """--gradient-checkpointing was forgotten for the discriminator of a second stage."""
    folder = tiny_folder("sd-v")
    gan = GanConfig("mse", teacher=str(folder), dmd=True)
    config = GanTraining("x", tmp_path, model=str(folder), gan=gan, gradient_checkpointing=True)
    players = build_gan(LatentDiffusion.load(folder), config, None).players()
    for network in (players["discriminator"].network.denoiser, players["fake_score"].denoiser):
        assert network.model.is_gradient_checkpointing


def test_a_penalty_that_goes_by_the_model_is_known_when_that_is_there(
    tiny_folder, tmp_path, monkeypatch
):
    """Under FSDP all transformers were refused for a penalty that is of U-Nets alone."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, refused in (("sd-v", True), ("sd3", False)):
        folder = tiny_folder(name)
        config = GanTraining("x", tmp_path, model=str(folder), gan=GanConfig("mse", warmup=0))
        config.check()
        config.check_sharded()
        with pytest.raises(UserError, match="one process") if refused else nullcontext():
            build_gan(LatentDiffusion.load(folder), config, None)
    with pytest.raises(UserError, match="one process"):
        GanTraining("x", tmp_path, gan=GanConfig("mse", r1="exact")).check_sharded()
