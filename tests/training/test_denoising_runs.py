"""`diffkit train denoising` on tiny true models: results load in plain diffusers, runs resume."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import load_lora
from diffkit.objectives.denoising import DenoisingConfig, DenoisingObjective
from tests.objectives.test_denoising import losses, make_batch


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def picture(pipe):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 2, "output_type": "pt", "latents": noise}
    return pipe("a picture", height=32, width=32, **options).images


CACHED = ("--cache-latents", "--cache-embeddings")


@pytest.mark.parametrize("options", [("--ema", "0.9"), (*CACHED, "--accumulation", "2")])
def test_resume_and_a_result_that_stock_diffusers_loads(options, command, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(*options, "--max-steps", 8, "--flip", output=whole) == 0
    for steps in (5, 8):
        assert command(*options, "--max-steps", steps, "--flip", output=parts) == 0
    assert rows(whole) == rows(parts)
    result = "unet/diffusion_pytorch_model.safetensors"
    left, right = (load_file(f / "model" / result) for f in (whole, parts))
    assert all(torch.equal(left[k], right[k]) for k in left)
    stock = StableDiffusionPipeline.from_pretrained(whole / "model", safety_checker=None)
    ours = LatentDiffusion.load(whole / "model").pipeline()
    assert torch.equal(torch.as_tensor(picture(stock)), torch.as_tensor(picture(ours)))


def test_caches_change_nothing(command, tmp_path):
    assert command(output=tmp_path / "a") == 0
    assert command(*CACHED, output=tmp_path / "b") == 0
    for a, b in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_ema_is_the_result(command, tmp_path):
    assert command("--ema", "0.5", "--max-steps", 3) == 0
    last = tmp_path / "out" / "checkpoints" / "step-00000003"
    average, live = (load_file(last / f"denoiser{x}.safetensors") for x in (".ema", ""))
    saved = load_file(tmp_path / "out" / "model/unet/diffusion_pytorch_model.safetensors")
    name = "conv_in.weight"
    assert torch.equal(saved[name], average[f"denoiser.model.{name}"])
    assert not torch.equal(saved[name], live[f"denoiser.model.{name}"])


def test_a_lora_loads_in_stock_diffusers(command, tmp_path, tiny_folder):
    assert command("--lora-rank", 2, "--learning-rate", "0.1") == 0
    result = tmp_path / "out" / "lora"
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder("sd-v"), safety_checker=None)
    before = picture(stock)
    stock.load_lora_weights(result)
    ours = LatentDiffusion.load(tiny_folder("sd-v"))
    load_lora(ours, result)
    after = torch.as_tensor(picture(stock))
    torch.testing.assert_close(after, torch.as_tensor(picture(ours.pipeline())))
    assert (after - torch.as_tensor(before)).abs().max() > 1e-4
    checkpoint = load_file(tmp_path / "out/checkpoints/step-00000006/denoiser.safetensors")
    assert all("lora" in name for name in checkpoint)


def test_a_lora_run_resumes(command, tmp_path):
    assert command("--lora-rank", 2, "--max-steps", 6, output=tmp_path / "a") == 0
    for steps in (4, 6):
        assert command("--lora-rank", 2, "--max-steps", steps, output=tmp_path / "b") == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


@pytest.mark.parametrize("model", ["sdxl", "sd3"])
def test_the_other_families(model, command, tmp_path):
    assert command(*CACHED, "--max-steps", 2, model=model) == 0
    DiffusionPipeline.from_pretrained(tmp_path / "out" / "model")


def test_options_of_the_computation(command, tmp_path):
    assert command("--gradient-checkpointing", output=tmp_path / "a") == 0
    assert command("--attention", "classic", output=tmp_path / "b") == 0
    for a, b in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert command("--mixed-precision", "bf16", "--max-steps", 1, output=tmp_path / "c") == 0
    weights = load_file(tmp_path / "c/model/unet/diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


def fixed_loss(folder):
    """The mean loss on always the same samples, times and noises."""
    objective = DenoisingObjective(LatentDiffusion.load(folder), DenoisingConfig())
    objective.place(torch.device("cpu"))
    with torch.no_grad():
        return losses(objective, make_batch(32))["loss"].mean()


def test_it_learns(command, tmp_path, tiny_folder):
    assert command("--max-steps", 30, "--learning-rate", "5e-3", *CACHED) == 0
    before, after = (fixed_loss(f) for f in (tiny_folder("sd-v"), tmp_path / "out" / "model"))
    assert after < 0.9 * before


def test_metrics_say_what_is_asked(command, tmp_path):
    assert command("--warmup-steps", 4) == 0
    found = rows(tmp_path / "out")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row["samples"] for row in found] == [2, 4, 6, 8, 10, 12]
    assert [row["lr"] for row in found][:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    for row in found:
        assert sum(row["count_by_time"]) == 2
        pairs = zip(row["loss_by_time"], row["count_by_time"], strict=True)
        assert row["loss"] == pytest.approx(sum((m or 0) * n for m, n in pairs) / 2, rel=1e-5)


def test_validation_pictures_and_tensorboard(command, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a picture\nan image\n")
    flags = ("--validation-prompts", prompts, "--validation-every", 3, "--validation-steps", 2)
    assert command(*flags, "--tracker", "tensorboard", "--ema", "0.9", output=tmp_path / "a") == 0
    names = sorted(path.name for path in (tmp_path / "a" / "samples").iterdir())
    assert names == ["step-00000003.png", "step-00000006.png"]
    assert list((tmp_path / "a" / "tensorboard").iterdir())
    assert command("--ema", "0.9", output=tmp_path / "b") == 0
    assert rows(tmp_path / "a") == rows(tmp_path / "b")  # looking does not disturb


def test_a_finished_run_is_left_alone(command, tmp_path, capsys):
    assert command() == 0
    before = (tmp_path / "out" / "finished.json").stat().st_mtime_ns
    assert command() == 0
    assert "finished already" in capsys.readouterr().err
    assert (tmp_path / "out" / "finished.json").stat().st_mtime_ns == before


def test_dry_run_writes_nothing(command, tmp_path, capsys):
    assert command("--dry-run", "--ema", "0.9") == 0
    told = capsys.readouterr().out
    assert "max_steps: 6" in told and "parameters are trained" in told and "GiB" in told
    assert not (tmp_path / "out").exists()
