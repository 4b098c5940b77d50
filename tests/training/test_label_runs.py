"""`diffkit train denoising` on models without text: class folders, dropped labels, resuming."""

from __future__ import annotations

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.denoising import DenoisingConfig, DenoisingObjective
from tests.objectives.test_denoising import losses, make_batch
from tests.tiny_labels import CLASSES, NAMES
from tests.training.test_resume import rows

slow = partial(pytest.param, marks=pytest.mark.slow)
DROPOUT = ("--denoising.condition-dropout", "0.5")
GUIDED = ("--validation-prompts", "PROMPTS", "--validation-guidance", 3)
FOLDERS = ("black cat", "retriever", "red fox", "snow owl")


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Three pictures of each class in a folder of its own, no captions."""
    folder, draw = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for name in FOLDERS:
        (folder / name).mkdir()
        for i in range(3):
            pixels = draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("dit", ("--gradient-checkpointing",)),
        slow("pixel-class", ("--ema", "0.9")),
        slow("latent-class", ("--cache-latents",)),
        slow("pixel-class-edm", ("--mixed-precision", "bf16")),
    ],
)
def test_class_conditional_runs_resume_and_load(command, classes, tmp_path, model, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = {"model": model, "data": classes}
    assert command(*options, "--max-steps", 4, output=whole, **run) == 0
    for steps in (2, 4):
        assert command(*options, "--max-steps", steps, output=parts, **run) == 0
    assert rows(whole) == rows(parts)
    name = "transformer" if model == "dit" else "unet"
    result = f"model/{name}/diffusion_pytorch_model.safetensors"
    left, right = load_file(whole / result), load_file(parts / result)
    assert all(torch.equal(left[key], right[key]) for key in left)
    DiffusionPipeline.from_pretrained(whole / "model")
    saved = LatentDiffusion.load(whole / "model").conditioner.classes
    assert list(saved.names.values())[:CLASSES] == list(NAMES) and saved.null is not None


@pytest.mark.slow
@pytest.mark.parametrize("model", ["pixel-class-no-null", "pixel", "latent", "pixel-edm"])
def test_the_others_train_too(command, classes, tmp_path, model):
    assert command("--max-steps", 2, model=model, data=classes) == 0
    DiffusionPipeline.from_pretrained(tmp_path / "out" / "model")


def test_labels_follow_names_and_are_dropped_by_address(command, classes, tiny_folder):
    from diffkit.training.denoising import DenoisingTraining
    from diffkit.training.launch import build_data, build_model

    config = DenoisingTraining(str(classes), classes / "unused", model=str(tiny_folder("dit")))
    model = build_model(config)
    batch = next(build_data(config, model).batches(0, 1))
    number = {name: i for i, name in enumerate(FOLDERS)}
    assert batch.labels.tolist() == [number[name.split("/")[0]] for name in batch.names]
    kept, gone = (
        DenoisingObjective(model, DenoisingConfig(condition_dropout=rate)) for rate in (0.0, 1.0)
    )
    for objective, expected in ((kept, batch.labels.tolist()), (gone, [1000] * len(batch))):
        objective.place(torch.device("cpu"))
        shared = objective.shared(objective.draw(batch, 0))
        assert shared.cond.labels.tolist() == expected


def test_a_class_learns_from_its_labels_and_the_variance_head_does_not(tiny_folder):
    model = LatentDiffusion.load(tiny_folder("dit"))
    objective = DenoisingObjective(model, DenoisingConfig(condition_dropout=0.0))
    objective.place(torch.device("cpu"))
    model.denoiser.train()
    losses(objective, make_batch(2, labels=torch.tensor([1, 3])))["loss"].mean().backward()
    for block in model.denoiser.model.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table.weight.grad
        assert table.abs().sum(1).nonzero().flatten().tolist() == [1, 3]
    out = model.denoiser.model.proj_out_2.weight.grad.reshape(4, 8, -1).abs().sum((0, 2))
    assert (out[:4] > 0).all() and (out[4:] == 0).all()


def test_validation_pictures_of_classes(command, classes, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red fox\n0\n")
    flags = ("--validation-prompts", prompts, "--validation-steps", 2, "--max-steps", 1)
    assert command(*flags, model="pixel-class", data=classes) == 0
    assert (tmp_path / "out" / "samples" / "step-00000001.png").is_file()


@pytest.mark.parametrize(
    ("flags", "model", "data", "message"),
    [
        (DROPOUT, "pixel-class-no-null", "classes", "no null class"),
        ((), "pixel-class", "pictures", "the pictures have no classes"),
        slow(
            ("--lora-rank", 2), "pixel-class", "classes", "class-conditional pixel U-Net .*'lora'"
        ),
        slow(("--cache-embeddings",), "pixel-class", "classes", "read no captions"),
        slow(("--max-aspect", 2), "dit", "classes", "max_aspect: class-conditional DiT"),
        slow(GUIDED, "pixel-class-no-null", "classes", "guidance scale is 1"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    command, tmp_path, capsys, request, flags, model, data, message
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("0\n")
    words = [prompts if flag == "PROMPTS" else flag for flag in flags]
    assert command(*words, model=model, data=request.getfixturevalue(data)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_dry_run(command, classes, capsys):
    assert command("--dry-run", model="latent-class", data=classes) == 0
    assert "parameters are trained" in capsys.readouterr().out


def test_metrics_have_places_on_the_schedule(command, classes, tmp_path):
    assert command("--max-steps", 1, model="pixel-edm", data=classes) == 0
    (row,) = [json.loads(x) for x in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert sum(row["count_by_time"]) == 2
