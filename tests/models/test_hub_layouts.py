"""Repositories as they lie on the hub: without subfolders, as pickles, with cards and revisions."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, PNDMScheduler
from safetensors.torch import load_file

from diffkit.cli import main
from diffkit.errors import UserError
from diffkit.generation.card import Card, read_card
from diffkit.generation.plan import Request, plan
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.schedule import Schedule
from diffkit.models.skeleton import skeleton


def flatten(source, folder):
    """google/ddpm-cifar10-32 and its siblings: everything beside the index."""
    folder.mkdir(parents=True)
    shutil.copy(source / "model_index.json", folder)
    for part in (source / "unet", source / "scheduler"):
        for file in part.iterdir():
            shutil.copy(file, folder)
    return folder


def pickled(folder):
    for file in folder.rglob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    return folder


def snapshot(cache, digit="0", revision="main"):
    root = cache / "models--owner--name"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(digit * 40)
    return root / "snapshots" / (digit * 40)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_model_without_subfolders(tiny_folder, tmp_path, capsys):
    """info and evaluate looked for the configs in subfolders and failed on the oldest models."""
    flat = flatten(tiny_folder("pixel"), tmp_path / "flat")
    assert isinstance(LatentDiffusion.load(flat).pipeline(), DDPMPipeline)
    assert skeleton(str(flat)).denoiser.geometry.sample == (32, 32)
    assert main(["info", str(flat), "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "unconditional pixel U-Net"


def test_pickles_beside_the_index_are_refused_by_name(tiny_folder, tmp_path):
    flat = pickled(flatten(tiny_folder("pixel"), tmp_path / "flat"))
    with pytest.raises(UserError, match=r"diffusion_pytorch_model.bin: the weights are a pickle"):
        LatentDiffusion.load(flat)


def test_pickles_on_the_hub_are_named_and_can_be_converted(tiny_folder, cache):
    """ "cannot be fetched from the hub, nor is it a path" was said of facebook/DiT-XL-2-256, whose
    only weights are pickles."""
    pickled(shutil.copytree(tiny_folder("dit"), snapshot(cache)))
    message = r"owner/name: the weights are a pickle.* Convert .*from_pretrained\('owner/name'\)"
    with pytest.raises(UserError, match=message):
        LatentDiffusion.load("owner/name")


def test_cards_and_classes_of_a_hub_id(tiny_folder, cache):
    """The card of a hub id was never read, and info took the class names of the main revision."""
    for digit, revision, steps, name in (("0", "main", 7, "cat"), ("1", "v", 9, "dog")):
        folder = shutil.copytree(tiny_folder("pixel-class"), snapshot(cache, digit, revision))
        stored = json.loads((folder / "diffkit.json").read_text())
        card = {**stored, "steps": steps, "id2label": {"0": name}}
        (folder / "diffkit.json").write_text(json.dumps(card))
    assert read_card("owner/name").steps == 7
    assert read_card("owner/name", "v").steps == 9
    assert skeleton("owner/name", "v").conditioner.classes.name(0) == "dog"
    model = LatentDiffusion.load("owner/name", revision="v")
    assert plan(Request(("dog",), model="owner/name"), model)[0].steps == 9
    assert read_card("owner/other") == Card()


def test_an_unconditional_hub_id_needs_no_prompts(tiny_folder, cache):
    shutil.copytree(tiny_folder("pixel"), snapshot(cache))
    (recipe,) = plan(Request(model="owner/name"), LatentDiffusion.load("owner/name"))
    assert recipe.prompt == ""
    shutil.copytree(tiny_folder("sd"), snapshot(cache, "1", "main"))
    with pytest.raises(UserError, match="no prompts"):
        Request(model="owner/name").check()


def test_a_clipped_range_may_be_left_to_its_default():
    """A PNDM config may carry DDIM's clip_sample, but not its range, from before there was one."""
    scheduler = PNDMScheduler.from_config({**PNDMScheduler().config, "clip_sample": True})
    assert "clip_sample_range" not in scheduler.config
    assert Schedule.from_scheduler(scheduler).clip == 1.0
