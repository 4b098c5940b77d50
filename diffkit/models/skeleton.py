"""A model without its weights: the same classes on torch's meta device, built from the configs.

Counting needs shapes only, so that a model of any size is counted in no memory.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.families import family_of
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.loading import read_index, resolve

__all__ = ["skeleton", "skeleton_of"]


def skeleton(source: str, revision: str | None = None) -> LatentDiffusion:
    """`source` as `LatentDiffusion.load` takes it, every network on the meta device.

    A folder is read without its weights and a hub id is fetched without them; a single
    `.safetensors` file carries no config and is loaded whole first. `revision` is for hub ids.

    Raises:
        UserError: as `LatentDiffusion.load`.
    """
    path = Path(resolve(source)).expanduser()
    if revision is None and path.is_dir():
        return _from_folder(path, source, None)
    if path.exists() or source.count("/") != 1:
        return LatentDiffusion.load(source, revision=revision).to("meta")
    return _from_folder(_fetch_configs(source, revision), source, revision)


def skeleton_of(model: LatentDiffusion) -> LatentDiffusion:
    """A loaded model's twin on the meta device; nothing is read, and no weight is copied."""
    weights = [t for net in model.networks.values() for t in (*net.parameters(), *net.buffers())]
    # What a deep copy has made already is looked up here by the address of the original.
    made = {id(tensor): _on_meta(tensor) for tensor in weights}
    twin = LatentDiffusion(copy.deepcopy(model.pipeline(), made), model.source)
    for network in twin.networks.values():
        if not hasattr(network, "load_config"):  # transformers'
            network.register_forward_pre_hook(_without_mask, with_kwargs=True)
    return twin


def _on_meta(tensor: Tensor) -> Tensor:
    moved = tensor.detach().to("meta")
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(moved, tensor.requires_grad)
    return moved


def _from_folder(path: Path, source: str, revision: str | None) -> LatentDiffusion:
    index = read_index(path)
    cls = family_of(index["_class_name"]).loader(index["_class_name"])
    accepted = inspect.signature(cls.__init__).parameters
    parts: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for name, value in index.items():
        if isinstance(value, list):
            try:
                # The oldest repositories (google/ddpm-cifar10-32) have no subfolders.
                folder = path / name if (path / name).is_dir() else path
                parts[name] = None if value[0] is None else _component(folder, *value)
            except (OSError, ValueError, AttributeError, ImportError) as error:
                raise UserError(f"{folder}: cannot be read as {value[1]}: {error}") from error
        elif name in accepted:
            settings[name] = value
    return LatentDiffusion(cls(**parts, **settings), source, revision=revision)


def _component(folder: Path, library: str, class_name: str) -> Any:
    from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

    # An index may name diffusers' own pipeline folders, and classes by their former names.
    cls = simple_get_class_obj(library, class_name)
    if not issubclass(cls, torch.nn.Module):
        return cls.from_pretrained(folder)
    with torch.device("meta"):
        if library == "diffusers":
            return cls.from_config(cls.load_config(folder)).eval()
        encoder = cls(cls.config_class.from_pretrained(folder)).eval()
    # transformers looks at the values of a mask, which has none here; shapes do not depend on it.
    encoder.register_forward_pre_hook(_without_mask, with_kwargs=True)
    return encoder


def _without_mask(module: torch.nn.Module, args: Any, named: dict[str, Any]) -> Any:
    return args, {name: value for name, value in named.items() if name != "attention_mask"}


def _fetch_configs(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*/*.json", "*/*.txt", "*/*.model"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{name}: neither a path nor on the hub ({first})") from error
