"""`diffkit train lcd` on tiny true models: its results in plain diffusers and in `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchLCMScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
)
from PIL import Image

from diffkit.cli import main
from diffkit.errors import UserError
from diffkit.generation.card import read_card
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import load_lora
from diffkit.objectives.consistency_config import ConsistencyConfig
from diffkit.training.consistency import ConsistencyTraining
from tests.training.test_denoising_runs import rows
from tests.training.test_label_runs import FOLDERS

LORA = ("--lora-rank", 2)


@pytest.fixture
def train(pictures, tmp_path, tiny_folder):
    """`train(*words)` runs `diffkit train lcd`; returns the run's folder."""

    def run(*words, name="out", model="sd-v"):
        flags = ["--model", tiny_folder(model), "--data", pictures, "--output", tmp_path / name]
        flags += ["--tracker", "none", "--max-steps", 4, "--batch-size", 4]
        flags += ["--learning-rate", "1e-3", *words]
        assert main(["train", "lcd", *map(str, flags)]) == 0
        return tmp_path / name

    return run


def stock_picture(pipe: Any, steps: int = 2, guidance: float = 3.0) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    images = pipe("a picture", height=32, width=32, generator=generator, **options).images
    return torch.as_tensor(images)


def test_the_result_is_a_stock_few_step_pipeline(train, tmp_path):
    folder = train("--cache-embeddings", "--cache-latents") / "model"
    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert isinstance(stock.scheduler, LCMScheduler)
    assert stock.scheduler.config.original_inference_steps == 50
    assert stock.scheduler.config.rescale_betas_zero_snr
    assert stock.unet.config.time_cond_proj_dim == 256
    assert stock.unet.time_embedding.cond_proj.weight.abs().max() > 0
    ours = LatentDiffusion.load(folder)
    assert torch.equal(stock_picture(stock), stock_picture(ours.pipeline()))
    told = [stock_picture(stock, guidance=g) for g in (3.0, 9.0)]
    assert not torch.equal(*told)
    card = read_card(str(folder))
    assert (card.guidance_scale, card.steps) == (7.5, 4)
    said = 'pipeline("...", num_inference_steps=4, guidance_scale=7.5)'
    assert said in (folder / "README.md").read_text()
    out = tmp_path / "pictures"
    words = ["generate", "a tree", "--model", folder, "--output", out, "--num", 2]
    assert main(list(map(str, words))) == 0
    assert len(list(out.glob("0*.png"))) == 2
    assert main(["info", str(folder)]) == 0


@pytest.mark.slow
def test_what_is_logged_and_validation_pictures(train, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a tree\na house\n")
    words = ("--validation-prompts", prompts, "--validation-every", 2, "--accumulation", 2)
    run = train(*words, "--lcd.diversity-every", 2)
    found = rows(run)
    assert all(row["loss"] > 0 and row["diversity"] > 0 for row in found)
    assert found[0]["diversity"] == found[1]["diversity"] != found[2]["diversity"]
    sheets = sorted((run / "samples").glob("step-*.png"))
    assert len(sheets) == 2 and Image.open(sheets[0]).size == (64, 32)


def test_a_lora_loads_in_stock_loaders(train, tiny_folder):
    """With convolutions and time projections, as LCM-LoRA; sampled without guidance."""
    folder = train("--lora-rank", 2, "--learning-rate", "0.05") / "lora"
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder("sd-v"), safety_checker=None)
    config = stock.scheduler.config
    stock.scheduler = LCMScheduler.from_config(
        config, original_inference_steps=50, clip_sample=False
    )
    before = stock_picture(stock, guidance=1.0)
    stock.load_lora_weights(folder)
    after = stock_picture(stock, guidance=1.0)
    assert (after - before).abs().max() > 1e-4
    model = LatentDiffusion.load(tiny_folder("sd-v"))
    model.set_scheduler(stock.scheduler)
    load_lora(model, folder)
    torch.testing.assert_close(stock_picture(model.pipeline(), guidance=1.0), after)
    text = (folder / "README.md").read_text()
    assert "LCMScheduler.from_config" in text and "guidance_scale=1.0" in text
    assert any("conv1" in name for name in _lora_keys(folder))


def _lora_keys(folder) -> list[str]:
    from safetensors.torch import load_file

    return list(load_file(folder / "pytorch_lora_weights.safetensors"))


@pytest.mark.slow
def test_a_flow_student_and_its_pictures_by_seed(train, tmp_path):
    """A picture is its seed's, whichever batch it is made in; stock pipelines draw the noise of
    `FlowMatchLCMScheduler` from the global generator."""
    folder = train("--max-steps", 2, "--batch-size", 2, model="sd3") / "model"
    stock = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(stock.scheduler, FlowMatchLCMScheduler)
    assert "sigmas=[1 - i / 4 for i in range(4)]" in (folder / "README.md").read_text()
    words = ["generate", "a tree", "--model", folder, "--num", 3, "--size", "32x32"]
    for size in (1, 3):
        more = ["--output", tmp_path / f"{size}", "--batch-size", size, "--steps", 2]
        assert main(list(map(str, [*words, *more]))) == 0
    first, second = (sorted((tmp_path / n).glob("0*.png")) for n in ("1", "3"))
    for a, b in zip(first, second, strict=True):
        gap = torch.tensor(list(Image.open(a).tobytes())) - torch.tensor(
            list(Image.open(b).tobytes())
        )
        assert gap.abs().max() <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [(), ("--lora-rank", 2), ("--lora-rank", 2, "--lcd.target", "ema")]
)
def test_bf16_is_near_float32(train, words):
    """Teacher and base weights in bf16; latents, times, targets and losses stay in float32."""
    plain = rows(train(*words, name="plain"))
    half = rows(train(*words, "--mixed-precision", "bf16", name="half"))
    assert half[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.1)


@pytest.mark.slow
def test_segments_are_sampled_from_edge_to_edge(train, tmp_path):
    folder = train("--lcd.segments", 2, "--max-steps", 2) / "model"
    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    stock.scheduler.set_timesteps(2)
    assert stock.scheduler.timesteps.tolist() == [999, 499]
    assert read_card(str(folder)).steps == 2


def test_validation_steps_between_edges_are_refused(tmp_path):
    config = ConsistencyTraining("x", tmp_path, lcd=ConsistencyConfig(segments=2))
    config.check()
    config.validation_prompts = tmp_path / "prompts.txt"
    with pytest.raises(UserError, match="use --validation-steps 2"):
        config.check()


@pytest.mark.slow
def test_a_class_conditional_student_keeps_its_names(tmp_path, tiny_folder):
    for name in FOLDERS:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "data" / name / "0.png")
    flags = ["--model", tiny_folder("pixel-class"), "--data", tmp_path / "data"]
    flags += ["--tracker", "none"]
    flags += ["--output", tmp_path / "out", "--max-steps", 2, "--batch-size", 4]
    assert main(["train", "lcd", *map(str, flags)]) == 0
    before = LatentDiffusion.load(tiny_folder("pixel-class")).conditioner.classes
    model = LatentDiffusion.load(tmp_path / "out" / "model")
    assert model.conditioner.classes.names == before.names
    assert read_card(str(tmp_path / "out" / "model")).steps == 4
