"""Model cards: a header that the hub accepts, and text that says what the folder is."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard as HubCard

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import add_lora, save_lora
from diffkit.models.model_card import (
    ModelCard,
    licence_of,
    public_name,
    with_scores,
    write_model_card,
)

REPORT = {
    "seed": 0,
    "reference": {"source": "/somewhere/pictures", "n": 40},
    "metrics": [
        {
            "name": "frechet",
            "label": "Frechet distance",
            "extractor": "diffkit feature network",
            "resize": "none",
            "n": 64,
            "values": {"model": {"value": 1.25, "low": 1.0, "high": 1.5}},
        },
        {"name": "psnr", "label": "PSNR", "n": 64, "values": {"against": {"value": 20.0}}},
    ],
}


def test_the_header_is_one_that_the_hub_reads(tmp_path):
    card = ModelCard(
        base_model="owner/base",
        relation="adapter",
        licence="mit",
        data=("hub:owner/pictures", "/somewhere/private/cats"),
        objective="Denoising.",
        settings={"learning_rate": 1e-4},
        metrics={"loss": 0.25},
    )
    path = write_model_card(tmp_path / "run", card)
    read = HubCard.load(path)
    assert read.data.base_model == "owner/base"
    assert read.data.base_model_relation == "adapter"
    assert read.data.license == "mit"
    assert read.data.datasets == ["owner/pictures"]
    assert read.data.pipeline_tag == "text-to-image"
    assert "lora" in read.data.tags
    assert "# run" in read.text
    assert 'load_lora_weights("THIS")' in read.text
    assert "| learning_rate | 0.0001 |" in read.text
    assert "| loss | 0.25 |" in read.text


def test_folders_of_this_machine_are_not_published():
    text = ModelCard(base_model="/somewhere/base", data=("/somewhere/cats",)).render("x")
    assert "somewhere" not in text
    assert "base" in text
    assert "cats" in text


def test_a_saved_model_tells_no_folder_of_this_machine(tiny_folder, tmp_path):
    """diffusers writes where each part was read from into its config; a push published that."""
    saved = LatentDiffusion.load(tiny_folder("sd")).save(tmp_path / "saved")
    told = [path for path in saved.rglob("*.json") if str(tiny_folder("sd")) in path.read_text()]
    assert not told


def test_an_unknown_licence_is_said_to_be_unknown():
    text = ModelCard(base_model="owner/base").render("x")
    assert "license:" not in text
    assert "could not be read" in text


def test_a_saved_model_carries_its_card_and_licence_on(tiny_folder, tmp_path):
    model = LatentDiffusion.load(tiny_folder("sd"))
    first = model.save(tmp_path / "first")
    assert licence_of(str(first)) is None
    write_model_card(first, ModelCard.of(model, licence="openrail"))
    second = LatentDiffusion.load(first).save(tmp_path / "second")
    assert licence_of(str(second)) == "openrail"
    assert "made from first" in (second / "README.md").read_text()


def test_a_saved_lora_names_its_base(tiny_folder, tmp_path):
    model = LatentDiffusion.load(tiny_folder("sd"))
    add_lora(model, 2)
    save_lora(model, tmp_path / "lora")
    text = (tmp_path / "lora" / "README.md").read_text()
    assert 'from_pretrained("sd")' in text
    assert "LoRA adapter for sd" in text


def test_scores_of_an_evaluation_enter_the_card_once():
    text = ModelCard(base_model="owner/base", licence="mit").render("x")
    once = with_scores(text, REPORT, "x")
    assert with_scores(once, REPORT, "x") == once
    read = HubCard(once)
    (result,) = read.data.eval_results
    assert (result.metric_type, result.metric_value) == ("frechet", 1.25)
    assert read.data.license == "mit"
    assert "| Frechet distance | 1.25 | 1 to 1.5 | 64 | diffkit feature network, none |" in once
    assert "PSNR" not in once
    assert "somewhere" not in once


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("embedded", "diffkit's embedded model"),
        ("owner/name", "owner/name"),
        ("hub:owner/name", "owner/name"),
        ("/a/b/c", "c"),
        ("", ""),
    ],
)
def test_public_names(source, shown):
    assert public_name(source) == shown
