"""Weights from outside: safetensors only.

A pickle (.ckpt, .pt, .pth, .bin) runs code when it is opened, so none is opened here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.files import atomic_write

__all__ = [
    "Header",
    "load_safetensors",
    "only_pickles",
    "read_header",
    "refuse_pickles",
    "save_safetensors",
]

PICKLES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl"})
# Trainers leave these beside the weights; no model is made of them.
_NOT_WEIGHTS = ("optimizer", "scheduler", "random_states", "training_args", "scaler")
_LFS_MARK = b"version https://git-lfs"


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        shapes: shape of every tensor by name.
        metadata: the text entries beside them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


def refuse_pickles(path: str | os.PathLike[str]) -> None:
    """Raise `UserError` where weights could only be had from a pickle.

    For a file: when it is one. For a folder: when it, or a folder directly inside it, holds
    pickled weights and no `.safetensors` (a component that has both is loaded from safetensors).
    Of a pipeline folder, with a model_index.json, only the components that it names are loaded, so
    that only they count. The error names the file and gives a command that converts it.
    """
    place = Path(path)
    if place.is_dir():
        for folder in _loaded_folders(place):
            _refuse_folder(folder, place)
    elif place.suffix.lower() in PICKLES:
        raise UserError(_refusal(place, _file_recipe(place)))


def read_header(path: str | os.PathLike[str]) -> Header:
    """Names, shapes and metadata of a safetensors file, without reading its tensors.

    Raises what `load_safetensors` raises.
    """
    place = _existing(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(place, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return Header(shapes, file.metadata() or {})
    except SafetensorError as error:
        raise UserError(_damaged(place, error)) from error


def load_safetensors(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name, in the dtype in which they lie there.

    Raises:
        UserError: no such file, a pickle, an undownloaded Git LFS pointer, or a damaged file
            (header not readable, or fewer bytes than it announces).
    """
    place = _existing(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(place, device=str(device))
    except SafetensorError as error:
        raise UserError(_damaged(place, error)) from error


def save_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors atomically, marked as `format: pt` as diffusers and transformers expect.

    Raises what `diffkit.files.atomic_write` raises.
    """
    from safetensors.torch import save

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as file:
        file.write(save(whole, {"format": "pt", **(metadata or {})}))


def _existing(path: str | os.PathLike[str]) -> Path:
    place = Path(path)
    if not place.is_file():
        raise UserError(f"{place}: no such file; a .safetensors file is needed here")
    refuse_pickles(place)
    return place


def _loaded_folders(place: Path) -> list[Path]:
    index = place / "model_index.json"
    if not index.is_file():
        return [place, *sorted(child for child in place.iterdir() if child.is_dir())]
    values = json.loads(index.read_text(encoding="utf-8"))
    named = [place / name for name, value in values.items() if isinstance(value, list) and value[0]]
    # A component without a folder of its own lies beside the index.
    return sorted({folder if folder.is_dir() else place for folder in named})


def _refuse_folder(folder: Path, root: Path) -> None:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    if any(file.suffix == ".safetensors" for file in files):
        return
    for file in files:
        if file.suffix in PICKLES and not file.name.startswith(_NOT_WEIGHTS):
            recipe = _folder_recipe(root) if folder != root else _file_recipe(file)
            raise UserError(_refusal(file, recipe))


def only_pickles(repository: str) -> UserError:
    """The refusal of a hub repository (or its copy in the cache) without safetensors weights."""
    return UserError(_refusal(repository, _folder_recipe(repository)))


def _refusal(file: Path | str, recipe: str) -> str:
    return (
        f"{file}: the weights are a pickle, which can run any code when it is opened; diffkit "
        f'loads safetensors only. Convert it once: python -c "{recipe}"'
    )


def _file_recipe(file: Path) -> str:
    return (
        "import torch; from safetensors.torch import save_file; "
        f"d = torch.load('{file}', weights_only=True, map_location='cpu'); "
        f"save_file(d.get('state_dict', d), '{file.with_suffix('.safetensors')}')"
    )


def _folder_recipe(folder: Path | str) -> str:
    return (
        "from diffusers import DiffusionPipeline as P; "
        f"P.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')"
    )


def _damaged(place: Path, error: Exception) -> str:
    with place.open("rb") as file:
        start = file.read(len(_LFS_MARK))
    if start == _LFS_MARK:
        return f"{place}: is a Git LFS pointer, not the weights; run `git lfs pull` there"
    return (
        f"{place}: is not a whole safetensors file ({error}); {place.stat().st_size} bytes are "
        "there. Download or copy it again"
    )
