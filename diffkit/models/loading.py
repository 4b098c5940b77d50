"""Where models come from: the embedded one, diffusers folders, single files, hub ids."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffkit.errors import UserError
from diffkit.models.families import family_of
from diffkit.models.weights import only_pickles, read_header, refuse_pickles

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["EMBEDDED", "is_hub_id", "load_pipeline", "quiet_libraries", "resolve"]

EMBEDDED = "embedded"
_WEIGHT_FILE = re.compile(
    r"(diffusion_pytorch_model|model)(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5})?\.safetensors"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Key endings that only the original single-file layout of a family has.
_SINGLE_FILE_MARKS = {
    "conditioner.embedders.1.model.ln_final.weight": "StableDiffusionXLPipeline",
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (
        "StableDiffusionXLPipeline"
    ),
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "StableDiffusion3Pipeline",
    "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": "FluxPipeline",
    "double_blocks.0.img_attn.norm.key_norm.scale": "FluxPipeline",
    "model.diffusion_model.input_blocks.0.0.weight": "StableDiffusionPipeline",
}


def is_hub_id(name: str) -> bool:
    """True for `owner/name` where no such folder or file lies here."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the libraries' own progress bars over files that take milliseconds."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = of_transformers.is_progress_bar_enabled(), of_diffusers.is_progress_bar_enabled()
    of_transformers.disable_progress_bar()
    of_diffusers.disable_progress_bar()
    try:
        yield
    finally:
        if shown[0]:
            of_transformers.enable_progress_bar()
        if shown[1]:
            of_diffusers.enable_progress_bar()


def resolve(source: str) -> str:
    """The folder of the embedded model for "embedded"; any other name unchanged.

    Raises `UserError` when this installation carries no embedded model.
    """
    if source != EMBEDDED:
        return source
    from diffkit.assets import path

    folder = path("model")
    if not (folder / "model_index.json").is_file():
        raise UserError("this installation has no embedded model; give --model FOLDER or a hub id.")
    return str(folder)


def load_pipeline(
    source: str,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    revision: str | None = None,
    config: str | os.PathLike[str] | None = None,
    parts: Mapping[str, Any] | None = None,
) -> DiffusionPipeline:
    """A stock pipeline in memory, on the CPU. See `LatentDiffusion.load`.

    `parts` are components by name that are taken as they are instead of being read.
    """
    parts = parts or {}
    name = resolve(source)
    path = Path(name).expanduser()
    if path.is_file():
        if variant or revision:
            raise UserError(f"{path}: variant and revision are for folders and hub ids.")
        return _from_file(path, dtype, config, parts)
    if config is not None:
        raise UserError(f"{name}: config is for a single .safetensors file.")
    if path.is_dir():
        if revision:
            raise UserError(f"{path}: revision is for hub ids; this is a folder.")
        return _from_folder(path, dtype, variant, parts)
    if not is_hub_id(name):
        raise UserError(
            f"{name}: no such model. Give 'embedded', a diffusers folder (with model_index.json), "
            "a .safetensors file, or a hub id such as 'owner/name'."
        )
    return _from_hub(name, dtype, variant, revision, parts)


def read_index(path: Path) -> dict[str, Any]:
    """The model_index.json of a diffusers folder of a known family, without any pickled weights.

    Raises `UserError` saying what the folder is instead.
    """
    index = path / "model_index.json"
    if not index.is_file():
        raise UserError(f"{path}: is not a diffusers model folder. {_what_is(path)}")
    try:
        values: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        family_of(values["_class_name"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{index}: is not a diffusers model index ({error}).") from error
    refuse_pickles(path)
    return values


def _from_folder(
    path: Path, dtype: torch.dtype, variant: str | None, parts: Mapping[str, Any]
) -> DiffusionPipeline:
    index = read_index(path)
    class_name = index["_class_name"]
    cls = family_of(class_name).loader(class_name)
    variant = variant or _lone_variant(path, index)
    options = {"dtype": dtype, "use_safetensors": True, "variant": variant, **parts}
    try:
        return cls.from_pretrained(path, local_files_only=True, **options)
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be loaded as {class_name}: {error}") from error
    except Exception as error:  # safetensors raises its own class for a damaged header
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"{path}: a weight file is damaged ({error}).") from error


def _lone_variant(path: Path, index: Mapping[str, Any]) -> str | None:
    """The one variant of the components that have no plain weights; None when all have them."""
    choices = []
    for name, value in index.items():
        folder = path / name
        if isinstance(value, list) and value[0] and folder.is_dir():
            found = [_WEIGHT_FILE.fullmatch(file.name) for file in folder.iterdir()]
            variants = {match["variant"] for match in found if match}
            if variants and None not in variants:
                choices.append(variants)
    if not choices:
        return None
    common = set.intersection(*choices)
    if len(common) != 1:
        every = ", ".join(sorted(set.union(*choices)))
        raise UserError(f"{path}: has no plain weights; say with variant which of {every} to load.")
    return common.pop()


def _what_is(path: Path) -> str:
    if (path / "config.json").is_file():
        return f"It holds a single component; give the pipeline folder, perhaps {path.parent}."
    if (path / "adapter_config.json").is_file() or list(path.glob("pytorch_lora_weights.*")):
        return "It holds a LoRA; give the base model with --model and this with --lora."
    inner = sorted(child.name for child in path.iterdir() if (child / "model_index.json").is_file())
    if inner:
        return f"There is a model inside it: {path / inner[0]}."
    return "There is no model_index.json in it."


def _from_hub(
    name: str,
    dtype: torch.dtype,
    variant: str | None,
    revision: str | None,
    parts: Mapping[str, Any],
) -> DiffusionPipeline:
    from diffusers import DiffusionPipeline

    options = {"variant": variant, "revision": revision, "use_safetensors": True, **parts}
    try:
        index = DiffusionPipeline.load_config(name, revision=revision)
        cls = family_of(index["_class_name"]).loader(index["_class_name"])
        return cls.from_pretrained(name, dtype=dtype, **options)
    except UserError:
        raise
    except ValueError as error:  # diffusers' word for a variant that is not there
        raise UserError(f"{name}: cannot be loaded: {error}") from error
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        if "safetensors" in first:  # diffusers' word for weights that are pickles alone
            raise only_pickles(name) from error
        raise UserError(
            f"{name}: cannot be fetched from the hub, nor is it a path ({first})"
        ) from error


def _name_of(class_name: str) -> str:
    return family_of(class_name).name


def _from_file(
    path: Path,
    dtype: torch.dtype,
    config: str | os.PathLike[str] | None,
    parts: Mapping[str, Any],
) -> DiffusionPipeline:
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    refuse_pickles(path)
    keys = read_header(path).shapes
    class_name = next((cls for mark, cls in _SINGLE_FILE_MARKS.items() if mark in keys), None)
    if class_name is None:
        known = ", ".join(dict.fromkeys(map(_name_of, _SINGLE_FILE_MARKS.values())))
        raise UserError(
            f"{path}: holds no single-file checkpoint of {known} (its first key is "
            f"{next(iter(keys), 'missing')!r}). A LoRA goes to --lora, a component into its folder."
        )
    cls: Any = family_of(class_name).pipeline_class("text2image")
    options = {} if config is None else {"config": os.fspath(config)}
    try:
        return cls.from_single_file(str(path), dtype=dtype, **options, **parts)
    except SingleFileComponentError as error:
        raise UserError(
            f"{path}: lacks a part of {class_name}: {str(error).strip().splitlines()[0]} Give a "
            "diffusers folder or a file of the whole model, text encoders included."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        hint = "" if config else " Without the hub, give config=FOLDER of the same architecture."
        raise UserError(f"{path}: cannot be loaded as {class_name}: {error}.{hint}") from error
