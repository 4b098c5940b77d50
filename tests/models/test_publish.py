"""Pushing to the hub, against a server on this machine that speaks its protocol."""

from __future__ import annotations

import os
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import constants

from diffkit.cli import main
from diffkit.errors import RunFailed, UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.publish import check_destination, push_folder
from tests.hub_server import serve


@pytest.fixture
def hub(monkeypatch):
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()
        yield hub
    huggingface_hub.close_session()


@pytest.fixture
def saved(tiny_folder, tmp_path):
    return LatentDiffusion.load(tiny_folder("sd")).save(tmp_path / "saved")


def test_every_file_arrives_as_it_was(hub, saved):
    (saved / ".hidden").write_text("not part of the model")
    check_destination("someone/model", online=True)
    address = push_folder(saved, "someone/model", private=True)
    assert address == f"{hub.url}/someone/model"
    assert hub.repositories[0]["visibility"] == "private"
    here = {str(p.relative_to(saved)): p.read_bytes() for p in saved.rglob("*") if p.is_file()}
    assert here.pop(".hidden")
    assert hub.files == here


def test_the_command_writes_scores_first(hub, saved, tmp_path):
    from diffkit.files import write_json
    from tests.models.test_model_card import REPORT

    write_json(tmp_path / "report.json", REPORT)
    words = ["push", str(saved), "someone/model", "--report", str(tmp_path / "report.json")]
    assert main(words) == 0
    assert b"Frechet distance" in hub.files["README.md"]


@pytest.mark.parametrize(
    ("repo", "says"),
    [("model", "owner"), ("a/b/c", "no name"), ("someone/mo del", "no name")],
)
def test_wrong_names(hub, repo, says):
    with pytest.raises(UserError, match=says):
        check_destination(repo)


def test_a_missing_token_is_named(hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="hf auth login"):
        check_destination("someone/model")


def test_a_refusal_leaves_the_folder_and_says_how_to_go_on(hub, saved):
    hub.refuse = True
    with pytest.raises(UserError, match="does not accept"):
        check_destination("someone/model", online=True)
    with pytest.raises(RunFailed, match=f"diffkit push {saved} someone/model"):
        push_folder(saved, "someone/model")
    assert (saved / "README.md").exists()


def test_a_folder_without_a_model(hub, tmp_path):
    with pytest.raises(UserError, match="no saved model"):
        push_folder(tmp_path, "someone/model")
    assert main(["push", str(tmp_path / "missing"), "someone/model"]) == 2
    assert not hub.repositories


def test_offline_is_found_out_before_training(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        check_destination("someone/model", online=True)


def test_training_pushes_its_result_once(hub, tiny_folder, tmp_path):
    """In a process of its own: huggingface_hub reads its variables when it is imported."""
    from tests.data.pictures import picture_folder

    data = picture_folder(tmp_path / "cats", 4)
    words = ["train", "denoising", "--model", tiny_folder("sd-v"), "--data", data]
    words += ["--output", tmp_path / "out", "--tracker", "none", "--max-steps", "2"]
    words += ["--batch-size", "2", "--lora-rank", "2", "--push-to-hub", "someone/cats"]
    env = {**os.environ, "HF_HUB_OFFLINE": "0"}
    code = f"import sys; from diffkit.cli import main; sys.exit(main({[*map(str, words)]!r}))"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(hub.repositories) == 1
    assert set(hub.files) == {"README.md", "pytorch_lora_weights.safetensors"}
    card = hub.files["README.md"].decode()
    assert "# out" in card
    assert "| lora_rank | 2 |" in card
    assert "mean of the last 2 steps" in card
    assert "2 steps of 2 samples" in card
    assert str(tmp_path) not in card
