"""`diffkit info`: what it says of tiny models of every family, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from diffkit.cli import main
from diffkit.commands.info import _si

Folder = Callable[[str], Path]


def info(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert main(["info", *map(str, words), "--json", "--device", "cpu"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "family", "schedule"),
    [
        ("sd", "Stable Diffusion", ("ddpm", "epsilon", False)),
        ("sd-v", "Stable Diffusion", ("ddpm", "v_prediction", True)),
        ("sdxl", "Stable Diffusion XL", ("ddpm", "epsilon", False)),
        ("sd3", "Stable Diffusion 3", ("flow", "velocity", True)),
    ],
)
def test_every_family(
    tiny_folder: Folder,
    capsys: pytest.CaptureFixture[str],
    name: str,
    family: str,
    schedule: tuple[str, str, bool],
) -> None:
    report = info(capsys, tiny_folder(name))
    assert report["family"] == family
    found = report["schedule"]
    assert (found["kind"], found["prediction_type"], found["zero_terminal_snr"]) == schedule
    parts = {part["name"]: part["parameters"] for part in report["components"]}
    assert parts["vae"] > 40_000
    assert parts["scheduler"] is None
    assert report["parameters"] == sum(filter(None, parts.values()))
    assert "lora" in report["capabilities"]
    assert report["size"] == "32x32"
    assert report["estimate"]["picture_seconds"] > 0


def test_an_old_folder_is_counted_as_it_is_loaded(
    tiny_folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    """The index of every stock SD 1 names "stable_diffusion", which is no module of its own, and
    CLIPFeatureExtractor, which transformers 5 has no more: diffusers loads both, info did not."""
    from diffkit.models.latent_diffusion import LatentDiffusion

    report = info(capsys, tiny_folder("sd-old"))
    loaded = LatentDiffusion.load(tiny_folder("sd-old")).networks
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in loaded.items()}
    assert counts["safety_checker"] > 1000
    listed = {part["name"]: part["parameters"] for part in report["components"]}
    assert {name: count for name, count in listed.items() if count is not None} == counts


def test_a_revision_is_for_hub_ids(tiny_sd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tiny_sd), "--revision", "main"]) == 2
    assert "revision is for hub ids" in capsys.readouterr().err


def test_size_batch_and_steps_move_the_numbers(
    tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = info(capsys, tiny_sd, "--steps", 10)
    large = info(capsys, tiny_sd, "--size", "64x32", "--batch-size", 4, "--steps", 20)
    decode = "VAE decoder, a picture"
    # Twice the pixels: convolutions double, attention grows faster.
    convs = [report["macs"][decode]["convolutions"] for report in (small, large)]
    assert convs[1] == 2 * convs[0]
    weights = small["parameters"] * 4
    growth = [report["estimate"]["memory_bytes"] - weights for report in (small, large)]
    assert growth[1] == pytest.approx(8 * growth[0], rel=0.01)
    assert large["estimate"]["picture_macs"] > 3.9 * small["estimate"]["picture_macs"]
    half = info(capsys, tiny_sd, "--dtype", "bf16", "--steps", 10)
    assert half["estimate"]["memory_bytes"] * 2 == small["estimate"]["memory_bytes"]


def test_the_text_names_everything(tiny_sdxl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tiny_sdxl), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for word in (
        "Stable Diffusion XL",
        "text_encoder_2",
        "UNet2DConditionModel",
        "predicts epsilon",
        "micro_conditioning",
        "denoiser, a call",
        "memory",
        "time",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1234567, "1.23 MB"), (2.5e15, "2.5e+03 TB")],
)
def test_si_prefixes(value: float, text: str) -> None:
    assert _si(value, "B") == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{tmp}/absent",), "no such model"),
        (("{tmp}",), "not a diffusers model folder"),
        (("{tmp}/broken",), "not a diffusers model index"),
        (("{tmp}/other",), "FluxWhateverPipeline: diffkit does not know"),
        (("{tmp}/half",), "unet"),
        (("{tmp}/model.bin",), "model.bin"),
        (("{sd}", "--size", "33"), "nearest sizes are 32x32 or 40x40"),
        (("{sd}", "--batch-size", "0"), "--batch-size 0"),
        (("{sd}", "--dtype", "fp16", "--device", "cpu"), "not on a CPU"),
        (("{sd}", "--device", "tpu"), "--device tpu"),
    ],
)
def test_bad_input(
    tiny_sd: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x04.")
    indices = {
        "broken": "{",
        "other": '{"_class_name": "FluxWhateverPipeline"}',
        "half": '{"_class_name": "StableDiffusionPipeline", '
        '"unet": ["diffusers", "UNet2DConditionModel"]}',
    }
    for name, text in indices.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model_index.json").write_text(text)
    assert main(["info", *(word.format(tmp=tmp_path, sd=tiny_sd) for word in words)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
