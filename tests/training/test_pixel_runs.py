"""`diffkit train pixel` on tiny true models: results that stock diffusers loads, logged numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import load_lora
from tests.training.test_denoising_runs import picture, rows


@pytest.fixture
def pixel(pictures: Any, tmp_path: Any, tiny_folder: Any) -> Any:
    """`pixel(*words)` trains six steps of two samples."""
    from diffkit.cli import main

    def run(*words: Any, model: str = "sd-v", output: Any = None) -> int:
        flags = ["--model", str(tiny_folder(model)), "--data", str(pictures), "--tracker", "none"]
        flags += ["--output", str(output or tmp_path / "out"), "--checkpoint-every", "3"]
        flags += ["--max-steps", "6", "--batch-size", "2", "--learning-rate", "1e-3"]
        flags += ["--cache-latents", "--cache-embeddings", "--pixel.calibration", "4"]
        return main(["train", "pixel", *flags, *map(str, words)])

    return run


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "model", ["sd-v", pytest.param("sd", marks=SLOW), pytest.param("sd3", marks=SLOW)]
)
def test_the_result_is_a_plain_model_and_the_run_resumes(
    model: str, pixel: Any, tmp_path: Any
) -> None:
    """Broken off in the middle of the calibration too: lambda goes on from its sums."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    crop = ("--pixel.crop-latent", 8, "--pixel.memory", "low")
    assert pixel(*crop, model=model, output=whole) == 0
    for steps in (2, 6):
        assert pixel(*crop, "--max-steps", steps, model=model, output=parts) == 0
    assert rows(whole) == rows(parts)
    found = rows(whole)
    for row in found:
        assert row["loss"] == pytest.approx(
            row["latent_loss"] + row["pixel_weight"] * row["pixel_loss"], rel=1e-4
        )
        ratio = row["pixel_weight"] * row["pixel_loss"] / row["latent_loss"]
        assert row["pixel_ratio"] == pytest.approx(ratio, rel=1e-4)
        assert row["decoder_gain"] == pytest.approx(row["pixel_loss"] / row["weighted_error"], 1e-4)
    weights = [row["pixel_weight"] for row in found]
    assert weights[0] == 0 and weights[4] == weights[5]
    pipe = DiffusionPipeline.from_pretrained(whole / "model")
    ours = LatentDiffusion.load(whole / "model")
    network = getattr(pipe, ours.family.denoiser)
    left, right = network.state_dict(), ours.denoiser.model.state_dict()
    assert all(torch.equal(left[k], right[k]) for k in left)


def test_a_lora_loads_in_stock_diffusers(pixel: Any, tmp_path: Any, tiny_folder: Any) -> None:
    assert pixel("--lora-rank", 2, "--learning-rate", "0.1", "--ema", "None") == 0
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


@SLOW
def test_the_control_and_skipped_steps_have_their_columns(pixel: Any, tmp_path: Any) -> None:
    """The control is decoded four times, every second step three times."""
    assert pixel("--pixel.control", output=tmp_path / "control") == 0
    decoded = ["pixel_loss" in row for row in rows(tmp_path / "control")]
    assert decoded == [True] * 4 + [False] * 2
    assert rows(tmp_path / "control")[-1]["pixel_ratio"] > 0
    assert pixel("--pixel.every", 2, output=tmp_path / "every") == 0
    found = rows(tmp_path / "every")
    assert ["pixel_loss" in row for row in found] == [True, False] * 3
    assert [row["pixel_ratio"] > 0 for row in found] == [False, False, True, False, True, False]


@SLOW
def test_accumulation_changes_nothing(pixel: Any, tmp_path: Any) -> None:
    """lambda is found from the global batch, so micro-batches of one have the same run."""
    assert pixel(output=tmp_path / "a") == 0
    assert pixel("--accumulation", 2, output=tmp_path / "b") == 0
    for a, b in zip(rows(tmp_path / "a"), rows(tmp_path / "b"), strict=True):
        for name in ("loss", "pixel_loss", "pixel_weight", "pixel_ratio"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_bf16_trains(pixel: Any, tmp_path: Any) -> None:
    assert pixel("--mixed-precision", "bf16", "--max-steps", 2, "--gradient-checkpointing") == 0
    assert all(row["pixel_loss"] > 0 for row in rows(tmp_path / "out"))


def test_the_dry_run_measures_a_decoding_step(pixel: Any, capsys: Any, tmp_path: Any) -> None:
    assert pixel("--dry-run") == 0
    assert "one step, measured" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
