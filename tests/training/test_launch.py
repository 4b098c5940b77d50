"""What a run is built from: data with captions, the wanted variant, frozen parts in its dtype."""

from __future__ import annotations

import json
import shutil

import datasets
import pytest
import torch
from safetensors.torch import load_file

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.training.denoising import DenoisingTraining
from diffkit.training.launch import build_model
from tests.data.pictures import encoded, noise


def without_captions(pictures, folder, *names):
    """A copy of the fixture's folder in which some pictures have no caption."""
    shutil.copytree(pictures, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        if row["file_name"] in names:
            row["text"] = []
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_pictures_without_captions_do_not_train_silently(command, pictures, tmp_path, capsys):
    """A run on text used to take "" for a caption that was forgotten; now it names the pictures.

    Only a run that drops all captions anyway goes without.
    """
    bare = without_captions(pictures, tmp_path / "set", "3.png", "8.png")
    assert command(data=bare) == 2
    assert "2 of 14 pictures have no caption: 3.png, 8.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    everything = ("--denoising.condition-dropout", 1)
    assert command(*everything, "--max-steps", 1, data=bare) == 0


def test_a_stream_without_captions_is_refused(command, tmp_path, capsys):
    """A stream shows its columns before the first row; a row without a caption shows when read."""
    datasets.disable_progress_bars()
    pictures = [{"bytes": encoded(noise(32, 32, n)), "path": None} for n in range(6)]
    shards = tmp_path / "shards"
    shards.mkdir()

    def write(columns):
        table = datasets.Dataset.from_dict({"image": pictures, **columns})
        table.cast_column("image", datasets.Image(decode=False)).to_parquet(shards / "0.parquet")

    write({})
    assert command("--streaming", data=shards) == 2
    assert "no column of captions" in capsys.readouterr().err
    write({"text": ["a", "b", "", "d", "e", "f"]})
    assert command("--streaming", "--max-steps", 1, data=shards) == 0
    assert "row 2: left out (no caption)" in capsys.readouterr().err


CACHED = ("--cache-latents", "--cache-embeddings")


@pytest.mark.parametrize("flags", [(), CACHED])
def test_frozen_parts_run_in_low_precision_and_are_saved_as_they_were(
    flags, command, tmp_path, tiny_folder
):
    """Text encoders stayed in float32 under bf16, 19 GB for T5-XXL, and were never let go.

    They now run in bf16 and are dropped after caching; the result must still hold the source's.
    """
    precision = ("--mixed-precision", "bf16", "--max-steps", 1)
    assert command(*flags, *precision, model="sd3") == 0
    for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        source, result = (
            [load_file(file) for file in sorted((folder / part).glob("*.safetensors"))]
            for folder in (tiny_folder("sd3"), tmp_path / "out" / "model")
        )
        for before, after in zip(source, result, strict=True):
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert before.keys() == after.keys()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_encoders_take_the_precision_of_the_run(precision, tmp_path, tiny_sd3):
    """All but the layers of T5 that overflow in float16, and the VAE."""
    config = DenoisingTraining("data", tmp_path, str(tiny_sd3), mixed_precision=precision)
    model = build_model(config)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    for name, encoder in model.conditioner.encoders.items():
        for key, value in encoder.named_parameters():
            wide = precision == "fp16" and name == "text_encoder_3" and ".wo." in key
            assert value.dtype == (torch.float32 if wide else dtype), key
    assert model.codec.dtype == model.denoiser.dtype == torch.float32


def test_a_lora_run_lets_its_encoders_go(command, tmp_path):
    """The LoRA is saved from a model without them."""
    assert command(*CACHED, "--lora-rank", 2, "--max-steps", 1) == 0
    assert list((tmp_path / "out" / "lora").iterdir())


def test_a_variant_can_be_trained(command, tmp_path, tiny_sd, capsys):
    """Many models come as *.fp16.safetensors, with or without plain files; no flag said which."""
    model = LatentDiffusion.load(tiny_sd)
    model.to(dtype=torch.float16).pipeline().save_pretrained(tmp_path / "half", variant="fp16")
    words = ("--model", tmp_path / "half", "--max-steps", 1)
    assert command("--variant", "bf16", *words) == 2
    assert "bf16" in capsys.readouterr().err
    assert command("--variant", "fp16", *words) == 0
    assert "variant: fp16" in (tmp_path / "out" / "config.yaml").read_text()
