"""Weights from outside: what is loaded, and what is refused and how it is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from diffkit.errors import UserError
from diffkit.models.weights import (
    load_safetensors,
    read_header,
    refuse_pickles,
    save_safetensors,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(4, dtype=torch.bfloat16)}
    save_safetensors(path, tensors, {"who": "me"})
    return path


def test_round_trip_and_header(file: Path) -> None:
    tensors, header = load_safetensors(file), read_header(file)
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3).T)
    assert tensors["b"].dtype == torch.bfloat16
    assert header.shapes == {"a": (3, 2), "b": (4,)}
    assert header.metadata == {"format": "pt", "who": "me"}


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_truncated_file_is_named(file: Path, kept: int) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    for read in (load_safetensors, read_header):
        with pytest.raises(
            UserError, match=f"weights.safetensors: is not a whole.*{kept % len(whole)} b"
        ):
            read(file)


def test_corrupt_header_pointer_and_missing_file_are_named(file: Path) -> None:
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load_safetensors(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(UserError, match="Git LFS pointer.*git lfs pull"):
        load_safetensors(file)
    with pytest.raises(UserError, match="gone.safetensors: no such file"):
        load_safetensors(file.parent / "gone.safetensors")


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickles_are_refused_unopened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    for refuse in (refuse_pickles, load_safetensors, read_header):
        with pytest.raises(
            UserError, match=rf"model\{suffix}: the weights are a pickle.*Convert it once"
        ):
            refuse(path)


def test_the_conversion_that_a_refusal_gives_works(tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}}, path)
    with pytest.raises(UserError) as refusal:
        refuse_pickles(path)
    exec(str(refusal.value).partition('python -c "')[2].rstrip('"'), {})
    assert torch.equal(load_safetensors(tmp_path / "old.safetensors")["a"], torch.ones(2))


def test_a_pickle_that_the_index_does_not_name_is_no_obstacle(tmp_path: Path, file: Path) -> None:
    """A full clone of a hub repository has the single-file .ckpt beside the component folders, and
    perhaps folders of other formats: none of them is opened, so none is refused."""
    for name in ("unet", "onnx", "safety_checker"):
        (tmp_path / name).mkdir()
    index = {"_class_name": "X", "unet": ["diffusers", "U"], "safety_checker": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    file.rename(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    for name in ("v1-5-pruned.ckpt", "onnx/weights.pb.bin", "safety_checker/pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"")
    refuse_pickles(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"unet/diffusion_pytorch_model\.bin: the weights are a"):
        refuse_pickles(tmp_path)


def test_folder_with_pickled_component_is_refused_by_file(tmp_path: Path, file: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "vae").mkdir()
    pickled = tmp_path / "unet" / "diffusion_pytorch_model.bin"
    pickled.write_bytes(b"")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="unet/diffusion_pytorch_model.bin.*save_pretrained"):
        refuse_pickles(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    refuse_pickles(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "optimizer.bin").write_bytes(b"")
    refuse_pickles(tmp_path)
