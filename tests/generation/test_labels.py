"""`diffkit generate` and `diffkit info` for models without text, and samplers of EDM models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffkit.cli import main
from diffkit.errors import UserError
from diffkit.generation.engine import render, size_rule, weights_digest
from diffkit.generation.plan import Request, plan
from diffkit.generation.recipe import Recipe, read_recipe
from diffkit.generation.schedulers import scheduler_names, swap_scheduler
from diffkit.models.latent_diffusion import LatentDiffusion

Folder = Callable[[str], Path]


@cache
def load(folder: Path) -> LatentDiffusion:
    return LatentDiffusion.load(folder)


def recipes(folder: Path, *prompts: str, **values: object) -> list[Recipe]:
    request = Request(prompts=prompts, model=str(folder), steps=3)
    return plan(dataclasses.replace(request, **values), load(folder))


def pictures(folder: Path, made: list[Recipe]) -> torch.Tensor:
    return torch.stack(render(load(folder), made, "pt"))


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


@pytest.mark.parametrize("name", ["pixel", "pixel-ddim", "latent"])
def test_unconditional_pictures_are_those_of_the_stock_pipeline(
    tiny_folder: Folder, name: str
) -> None:
    """With each model's own sampler; that of "pixel" draws noise at every step."""
    folder = tiny_folder(name)
    made = recipes(folder, num=2)
    assert [recipe.prompt for recipe in made] == ["", ""] and made[0].guidance == 1
    pipeline = LatentDiffusion.load(folder).pipeline()
    pipeline.set_progress_bar_config(disable=True)
    options = {"generator": generators(2), "num_inference_steps": 3, "output_type": "np"}
    stock = torch.as_tensor(pipeline(batch_size=2, **options).images).permute(0, 3, 1, 2)
    assert (pictures(folder, made) - stock).abs().max() < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_dit_pictures_are_those_of_the_stock_pipeline(tiny_folder: Folder, guidance: float) -> None:
    folder = tiny_folder("dit")
    made = recipes(folder, "golden retriever", "207", guidance=guidance)
    pipeline = LatentDiffusion.load(folder).pipeline()
    pipeline.set_progress_bar_config(disable=True)
    options = {"generator": generators(2), "num_inference_steps": 3, "output_type": "pt"}
    stock = pipeline(class_labels=[1, 207], guidance_scale=guidance, **options).images
    assert (pictures(folder, made) - stock).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("pixel-class", None), ("pixel-class", "euler-a"), ("latent-class", "dpm++"), ("dit", None)]
    + [("pixel-class-edm", name) for name in scheduler_names("edm")],
)
def test_the_batch_split_changes_nothing(
    tiny_folder: Folder, name: str, scheduler: str | None
) -> None:
    folder = tiny_folder(name)
    made = recipes(folder, "0", "red fox", "snow owl", guidance=2.0, scheduler=scheduler)
    together = pictures(folder, made)
    assert together.std() > 0.01 and not torch.equal(together[0], together[1])
    assert (together[1:2] - pictures(folder, made[1:2])).abs().max() < 1e-4


@pytest.mark.parametrize(
    "scheduler",
    [pytest.param(None, marks=pytest.mark.slow), *scheduler_names("edm")],  # None is the second
)
def test_edm_samplers_of_a_text_model(tiny_folder: Folder, scheduler: str | None) -> None:
    folder = tiny_folder("sdxl-edm")
    made = recipes(folder, "a cat", "a dog", scheduler=scheduler)
    together = pictures(folder, made)
    assert together.isfinite().all()
    assert (together[1:] - pictures(folder, made[1:])).abs().max() < 1e-4


def test_an_edm_model_starts_from_pictures_too(tiny_folder: Folder, tmp_path: Path) -> None:
    image, mask = tmp_path / "in.png", tmp_path / "mask.png"
    Image.effect_noise((32, 32), 80).convert("RGB").save(image)
    Image.linear_gradient("L").save(mask)
    folder = tiny_folder("sdxl-edm")
    for values in ({}, {"mask": mask}, {"mask": mask, "strength": 0.7}):
        made = recipes(folder, "a cat", image=image, steps=4, **values)
        assert pictures(folder, made).isfinite().all()


def test_samplers_of_another_kind_are_refused(tiny_folder: Folder) -> None:
    with pytest.raises(UserError, match="ddim: not for an EDM model. For this one: edm-euler"):
        recipes(tiny_folder("pixel-edm"), scheduler="ddim")
    with pytest.raises(UserError, match="edm-euler: not for a DDPM-type model"):
        recipes(tiny_folder("pixel"), scheduler="edm-euler")
    own = load(tiny_folder("sdxl-edm-v")).pipeline().scheduler
    new = swap_scheduler(own, "edm-euler", "edm", "edm_v")
    kept = ("prediction_type", "sigma_data", "sigma_schedule", "sigma_max")
    assert [new.config[key] for key in kept] == [own.config[key] for key in kept]


def test_a_learned_variance_is_read_by_no_sampler(tiny_folder: Folder) -> None:
    folder = tiny_folder("dit")
    made = recipes(folder, "0", scheduler="ddpm")
    model = LatentDiffusion.load(folder)
    model.pipeline().scheduler.register_to_config(variance_type="learned_range")
    with pytest.raises(UserError, match="try|use --scheduler ddim"):
        render(model, made)


@pytest.mark.parametrize(
    ("name", "prompts", "values", "message"),
    [
        ("pixel", ("a cat",), {}, "this model is unconditional"),
        ("pixel", (), {"guidance": 3.0}, "--guidance 3: unconditional pixel U-Net models"),
        ("pixel-class-no-null", ("0",), {"guidance": 3.0}, "without a null class"),
        ("pixel-class", (), {}, "this model has 4: black cat, golden"),
        ("pixel-class", ("red fax",), {}, "Nearest: 2 .red fox."),
        ("dit", ("1000",), {}, "numbers from 0 to 999"),
        ("dit", ("0",), {"negative": "x"}, "--negative: .* read no text"),
        ("dit", ("0",), {"size": "32x64"}, "square"),
        ("latent", (), {"size": "18"}, "nearest"),
    ],
)
def test_what_cannot_be_asked_for(
    tiny_folder: Folder,
    name: str,
    prompts: tuple[str, ...],
    values: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        recipes(tiny_folder(name), *prompts, **values)


def test_a_start_picture_is_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    image = tmp_path / "in.png"
    Image.new("RGB", (32, 32)).save(image)
    with pytest.raises(UserError, match="unconditional pixel U-Net models have no image2image"):
        recipes(tiny_folder("pixel"), image=image)


def test_guidance_and_sizes_of_their_own(tiny_folder: Folder) -> None:
    assert recipes(tiny_folder("dit"), "0")[0].guidance == 4.0
    assert recipes(tiny_folder("pixel-class"), "0")[0].guidance == 2.0
    assert recipes(tiny_folder("pixel-class-no-null"), "0")[0].guidance == 1.0
    assert size_rule(load(tiny_folder("pixel"))).multiple == 2
    assert recipes(tiny_folder("pixel"), size="18x22")[0].height == 22


def test_names_of_classes_belong_to_the_digest(tiny_folder: Folder) -> None:
    model = LatentDiffusion.load(tiny_folder("pixel-class"))
    before = weights_digest(model)
    assert model.conditioner.classes is not None
    model.conditioner.classes = model.conditioner.classes.named(("a", "b", "c", "d"))
    assert weights_digest(model) != before


def test_the_command_line(
    tiny_folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(*words: object) -> int:
        return main(["generate", *map(str, words), "--steps", "2", "--device", "cpu"])

    out, model = tmp_path / "out", ("--model", tiny_folder("latent-class"))
    assert generate("red fox", "2", *model, "--output", out, "--seed", 5) == 0
    assert read_recipe(out / "00000.png").prompt == "red fox"
    first = np.asarray(Image.open(out / "00000.png"))
    assert (
        main(["generate", "--from", str(out / "00000.png"), "--output", str(tmp_path / "b")]) == 0
    )
    assert (np.asarray(Image.open(tmp_path / "b" / "00000.png")) == first).all()
    assert generate(*model, "--output", out) == 2
    assert "no prompts: give names or numbers of classes" in capsys.readouterr().err
    assert generate("--model", tiny_folder("pixel"), "--num", 3, "--output", tmp_path / "c") == 0
    assert len(list((tmp_path / "c").glob("0*.png"))) == 3


@pytest.mark.parametrize(
    ("name", "classes", "kind"),
    [
        ("dit", (1000, 1000), "ddpm"),
        pytest.param("pixel-class-edm", (4, 4), "edm", marks=pytest.mark.slow),
        pytest.param("pixel-class-no-null", (4, None), "ddpm", marks=pytest.mark.slow),
        ("latent", (0, None), "ddpm"),
    ],
)
def test_info(
    tiny_folder: Folder,
    capsys: pytest.CaptureFixture[str],
    name: str,
    classes: tuple[int, int | None],
    kind: str,
) -> None:
    words = ["info", str(tiny_folder(name)), "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    told = report["classes"]
    assert (told["count"], told.get("null_class")) == classes
    assert report["schedule"]["kind"] == kind
    assert report["macs"]["denoiser, a call"]["total"] > 0
    assert report["macs"]["text encoders, a prompt"]["total"] == 0
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "classes: none, unconditional" in text if name == "latent" else "red fox" in text
