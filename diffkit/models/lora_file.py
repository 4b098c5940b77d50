"""LoRA files: finding, reading, describing and writing them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from diffkit.errors import UserError
from diffkit.models.lora_keys import (
    DENOISER,
    Architecture,
    LoraWeights,
    name_denoiser,
    parse_keys,
    to_diffusers,
    to_kohya,
    with_alphas,
)
from diffkit.models.weights import (
    Header,
    load_safetensors,
    read_header,
    refuse_pickles,
    save_safetensors,
)

__all__ = ["LORA_FILE", "Layout", "describe_file", "find_lora", "read_lora", "write_lora"]

Layout = Literal["diffusers", "kohya"]
LORA_FILE = "pytorch_lora_weights.safetensors"
_PEFT_FILE = "adapter_model.safetensors"
_PEFT_CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/.+\.safetensors)?")

# What a file is, by a part of one of its keys; the first that fits.
_KINDS = (
    (("hada_",), "a LoHa (LyCORIS)"),
    (("lokr_",), "a LoKr (LyCORIS)"),
    (("dora_scale", "lora_magnitude_vector"), "a DoRA"),
    (("lora_unet_", "lora_te"), "a LoRA with kohya's keys"),
    (("lora_A", "lora_B", ".lora.", "_lora.", "lora_linear_layer"), "a LoRA with diffusers' keys"),
    (("model.diffusion_model.",), "a whole checkpoint in one file"),
    (("control_model.", "controlnet_"), "a ControlNet"),
    (("emb_params", "string_to_param", "clip_l", "clip_g"), "a textual-inversion embedding"),
    (("encoder.down_blocks.", "decoder.up_blocks."), "a VAE"),
    (("down_blocks.", "transformer_blocks."), "a whole denoiser"),
    (("text_model.", "encoder.layers."), "a text encoder"),
)


def find_lora(source: str | os.PathLike[str]) -> Path:
    """The one safetensors file of a LoRA: a file, a folder, or a hub id.

    In a folder or a hub repository it is `pytorch_lora_weights.safetensors`, peft's
    `adapter_model.safetensors`, or the only `.safetensors`; "owner/name/file.safetensors" names one
    in a hub repository.

    Raises:
        UserError: nothing there, several files, or pickles only.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_dir():
        return path / _choose(path, [f.name for f in path.glob("*.safetensors")])
    if path.is_file():
        return path
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"{name}: no such LoRA; give a .safetensors file, a folder or a hub id")
    return _download(name)


def read_lora(
    source: str | os.PathLike[str], denoiser: str = "unet", layers_per_block: int = 2
) -> LoraWeights:
    """Layers of a LoRA file by component and module path, with the alphas of its metadata.

    Arguments:
        source: see `find_lora`.
        denoiser: component of layers that do not say to which they belong.
        layers_per_block: of the U-Net, see `parse_keys`.

    Raises:
        UserError: no LoRA file, or one of a kind that is not supported; the message says what it
            looks like.
    """
    path = find_lora(source)
    header = read_header(path)
    if not any("lora" in key for key in header.shapes):
        raise UserError(f"{path}: is no LoRA; it looks like {describe_file(header)}")
    try:
        weights = parse_keys(load_safetensors(path), layers_per_block)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    weights = with_alphas(weights, _metadata_alphas(path, header, weights))
    return name_denoiser(weights, denoiser)


def write_lora(
    path: str | os.PathLike[str],
    weights: LoraWeights,
    layout: Layout = "diffusers",
    architecture: Architecture = "sd",
    layers_per_block: int = 2,
) -> None:
    """Write a LoRA file atomically.

    Arguments:
        path: of the file.
        weights: what to write.
        layout: whose keys.
        architecture, layers_per_block: of the U-Net, for kohya's keys.
    """
    if layout == "kohya":
        tensors = to_kohya(weights, architecture, layers_per_block)
    else:
        tensors = to_diffusers(weights)
    save_safetensors(path, tensors)


def describe_file(header: Header) -> str:
    """What a safetensors file looks like, for people: its kind and its first key."""
    keys = sorted(header.shapes)
    if not keys:
        return "an empty file"
    for marks, kind in _KINDS:
        if any(mark in key for key in keys for mark in marks):
            return f"{kind} ({len(keys)} tensors, first {keys[0]})"
    return f"something unknown ({len(keys)} tensors, first {keys[0]})"


def _choose(place: Path | str, names: Sequence[str]) -> str:
    for usual in (LORA_FILE, _PEFT_FILE):
        if usual in names:
            return usual
    if len(names) == 1:
        return names[0]
    if names:
        raise UserError(f"{place}: holds several files, name one of: {', '.join(sorted(names))}")
    if isinstance(place, Path):
        refuse_pickles(place)
    raise UserError(f"{place}: holds no .safetensors file, so no LoRA that can be loaded")


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    owner, repository, *rest = name.split("/", 2)
    repo = f"{owner}/{repository}"
    try:
        try:
            return Path(hf_hub_download(repo, rest[0] if rest else LORA_FILE))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            if rest:
                raise
        files = [file for file in list_repo_files(repo) if file.endswith(".safetensors")]
        return Path(hf_hub_download(repo, _choose(repo, files)))
    except OSError as error:  # all of the hub's errors are
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name}: is no local path and cannot be had from the hub: {first}"
        ) from error


def _metadata_alphas(
    path: Path, header: Header, weights: LoraWeights
) -> dict[tuple[str, str], float]:
    """Alphas that peft's config gives: inside the file (diffusers) or beside it (peft)."""
    if _METADATA in header.metadata:
        config = json.loads(header.metadata[_METADATA])
    elif path.name == _PEFT_FILE and (path.parent / _PEFT_CONFIG).is_file():
        config = json.loads((path.parent / _PEFT_CONFIG).read_text())
    else:
        return {}
    alphas = {}
    for component, layers in weights.items():
        prefix = "" if component == DENOISER else f"{component}."
        own = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)}
        if "lora_alpha" in own:
            for name, layer in layers.items():
                alphas[component, name] = _alpha(own, name, layer.rank)
    return alphas


def _alpha(config: Mapping[str, Any], path: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    pattern = config.get("alpha_pattern") or {}
    alpha = float(pattern.get(get_pattern_key(list(pattern), path), config["lora_alpha"]))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
