"""`diffkit lora`, called as from the shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffkit.cli import main
from diffkit.models import lora
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora_file import read_lora
from diffkit.models.weights import load_safetensors


@pytest.fixture
def adapter(tiny_sd: Path, tmp_path: Path) -> Path:
    model = LatentDiffusion.load(tiny_sd)
    parameters = lora.add_lora(model, rank=2, alpha=4.0)
    with torch.no_grad():
        for key, parameter in parameters.items():
            if key.endswith("lora_B"):
                parameter.fill_(0.1)
    return lora.save_lora(model, tmp_path / "adapter").parent


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any, str]:
    code = main(["lora", *map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out.strip() else None, err


def test_merge_loads_in_stock_diffusers(
    tiny_sd: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    words = ("merge", "--model", tiny_sd, "--lora", f"{adapter}:0.5", "--output", output)
    code, report, _ = run(capsys, *words)
    assert code == 0 and report["loras"] == [[str(adapter), 0.5]]
    base = StableDiffusionPipeline.from_pretrained(tiny_sd).unet.state_dict()
    merged = StableDiffusionPipeline.from_pretrained(output).unet.state_dict()
    assert merged.keys() == base.keys()
    layers = read_lora(adapter)["unet"]
    for key, weight in base.items():
        layer = layers.get(key.removesuffix(".weight"))
        update = 0.0 if layer is None else 0.5 * layer.alpha / layer.rank * layer.up @ layer.down
        assert torch.allclose(merged[key], weight + update, atol=1e-6), key
    code, _, err = run(capsys, *words)
    assert code == 2 and "exists already" in err
    assert run(capsys, *words, "--overwrite", "--dtype", "bf16")[0] == 0
    tensors = load_safetensors(output / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_merge_needs_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "merge", "--output", tmp_path / "x")
    assert code == 2 and "at least one --lora" in err


def test_convert_there_and_back(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, back = tmp_path / "kohya.safetensors", tmp_path / "back"
    code, report, _ = run(capsys, "convert", adapter, "--to", "kohya", "--output", there)
    assert code == 0 and report["architecture"] == "sd" and report["layers"] > 0
    assert "kohya" in run(capsys, "info", there)[1]["kind"]
    code, report, _ = run(capsys, "convert", there, "--output", back)
    assert code == 0 and report["output"].endswith("back/pytorch_lora_weights.safetensors")
    first, second = read_lora(adapter)["unet"], read_lora(back)["unet"]
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key].up, second[key].up) and first[key].alpha == second[key].alpha
    assert run(capsys, "convert", there, "--output", back)[0] == 2
    assert run(capsys, "convert", there, "--output", back, "--overwrite")[0] == 0
    code, _, err = run(capsys, "convert", there, "--output", tmp_path / "y", "--architecture", "sd")
    assert code == 2 and "--architecture is for --to kohya" in err


def test_info_for_people_and_machines(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report, _ = run(capsys, "info", adapter)
    assert code == 0 and report["components"]["unet"]["ranks"] == {
        "2": report["components"]["unet"]["layers"]
    }
    assert main(["lora", "info", str(adapter)]) == 0
    text = capsys.readouterr().out
    assert "diffusers' keys" in text and "rank 2; alpha 2" in text
    code, _, err = run(capsys, "info", adapter / "gone")
    assert code == 2 and "no such LoRA" in err


def test_a_model_with_adapters_is_not_saved_as_a_folder(tiny_sd: Path, tmp_path: Path) -> None:
    """Its U-Net would hold peft's names, from which plain diffusers loads random weights."""
    model = LatentDiffusion.load(tiny_sd)
    lora.add_lora(model, rank=2)
    with pytest.raises(ValueError, match="carries LoRA adapters"):
        model.save(tmp_path / "x")
    lora.merge_lora(model)
    model.save(tmp_path / "x")
