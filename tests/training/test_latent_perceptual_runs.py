"""`diffkit train lpl` on tiny true models: its control, its results in plain diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from diffkit.cli import main
from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import load_lora
from diffkit.objectives.latent_perceptual_config import LatentPerceptualConfig
from diffkit.training.latent_perceptual import LatentPerceptualTraining
from tests.training.test_denoising_runs import picture, rows

RESULT = "model/unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def train(pictures, tmp_path, tiny_folder):
    """`train(method, *words)` on the tiny v-prediction model; returns the run's folder."""

    def run(method, *words, name="out"):
        flags = ["--model", tiny_folder("sd-v"), "--data", pictures, "--output", tmp_path / name]
        flags += ["--tracker", "none", "--max-steps", 5, "--batch-size", 4]
        flags += ["--learning-rate", "1e-3", *words]
        flags += ["--ema", "None"] if method == "lpl" and "--ema" not in words else []
        assert main(["train", method, *map(str, flags)]) == 0
        return tmp_path / name

    return run


def test_weight_zero_is_plain_denoising_to_the_bit(train):
    """The control: the loss is computed and logged, and the weights are those without it."""
    plain = train("denoising", name="plain")
    control = train("lpl", "--lpl.weight", 0, name="control")
    with_it = train("lpl", "--lpl.threshold", "0.1", name="lpl")
    weights = [load_file(folder / RESULT) for folder in (plain, control, with_it)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])
    for a, b in zip(rows(plain), rows(control), strict=True):
        assert a["loss"] == b["loss"] == b["denoising_loss"] and b["lpl_weight"] == 0
        assert (b["lpl"] > 0) == (b["lpl_gated"] > 0) and b["grad_norm"] == a["grad_norm"]
    assert any(row["lpl_gated"] for row in rows(control))


def test_what_is_logged(train):
    found = rows(train("lpl", "--lpl.threshold", "0.1", "--lpl.start", 2, "--accumulation", 2))
    assert all(row["lpl"] == row["lpl_weight"] == row["lpl_share"] == 0 for row in found[:2])
    assert found[0]["lpl_variance_mid"] is None and found[2]["lpl_weight"] == 3
    assert found[-1]["lpl_weight"] != 3  # the share has found its own by now
    for row in found:
        assert row["loss"] == pytest.approx(
            row["denoising_loss"] + row["lpl_weight"] * row["lpl"], rel=1e-5
        )
        share = row["lpl_weight"] * row["lpl"] / row["loss"]
        assert row["lpl_share"] == pytest.approx(share, rel=1e-5)
    assert any(row["lpl_gated"] > 0 and 0 < row["lpl_variance_up_1"] < 9 for row in found[2:])


def test_full_and_lora_results_load_in_stock_diffusers(train, tiny_folder):
    words = ("--lpl.threshold", "0.1", "--lpl.memory", "low")
    full = train("lpl", *words, "--ema", "0.9", name="full")
    stock = StableDiffusionPipeline.from_pretrained(full / "model", safety_checker=None)
    ours = LatentDiffusion.load(full / "model").pipeline()
    assert torch.equal(torch.as_tensor(picture(stock)), torch.as_tensor(picture(ours)))
    lora = train("lpl", *words, "--lora-rank", 2, "--learning-rate", "0.1", name="lora")
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder("sd-v"), safety_checker=None)
    before = torch.as_tensor(picture(stock))
    stock.load_lora_weights(lora / "lora")
    model = LatentDiffusion.load(tiny_folder("sd-v"))
    load_lora(model, lora / "lora")
    after = torch.as_tensor(picture(stock))
    torch.testing.assert_close(after, torch.as_tensor(picture(model.pipeline())))
    assert (after - before).abs().max() > 1e-4


@pytest.mark.slow
def test_bf16_and_cached_latents(train):
    """The decoder goes to the run's device even where the codec has nothing to encode."""
    words = ("--lpl.threshold", "0.1", "--cache-latents", "--max-steps", 2)
    plain = rows(train("lpl", *words, name="plain"))
    half = rows(train("lpl", *words, "--mixed-precision", "bf16", name="half"))
    assert half[0]["lpl"] == pytest.approx(plain[0]["lpl"], rel=0.1)


def test_a_start_that_never_comes_is_refused(tmp_path):
    config = LatentPerceptualTraining("x", tmp_path, max_steps=5)
    config.lpl = LatentPerceptualConfig(start=5)
    with pytest.raises(UserError, match="never come in"):
        config.check()
