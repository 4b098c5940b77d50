"""CLIP models of open_clip: extractor, scorer and reward."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from diffkit.console import say
from diffkit.errors import UserError
from diffkit.models.fingerprint import fingerprint_module
from diffkit.models.named_weights import load_named_weights, optional_module

__all__ = ["CLIP_RULE", "Clip", "clip_of_weights", "load_clip", "prepare"]


CLIP_RULE: Mapping[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
"""OpenAI's preprocessing, see `prepare`, which most scorers keep to."""


class Clip:
    """Both towers of a CLIP model of open_clip with its own preprocessing, frozen.

    Arguments:
        name, label: of reports, without paths.
        model, tokenizer: open_clip's own; the model's dtype computes.
    """

    def __init__(self, name: str, label: str, model: Any, tokenizer: Any) -> None:
        self.name, self.label = name, label
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._rule = dict(model.visual.preprocess_cfg)
        size = self._rule["size"]
        height, width = size if isinstance(size, tuple | list) else (size, size)
        self._size = int(height), int(width)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.model.parameters()).device

    @cached_property
    def dim(self) -> int:
        """Length d of a vector."""
        with torch.no_grad():
            return int(self.embed_images(torch.zeros(1, 3, 32, 32)).shape[-1])

    @property
    def logit_scale(self) -> float:
        """The inverse temperature of its training."""
        return float(self.model.logit_scale.exp())

    @property
    def resize(self) -> str:
        """How it brings pictures to its own size."""
        squash = self._rule["resize_mode"] == "squash"
        crop = "whole" if squash else "shortest side, middle cropped"
        height, width = self._size
        how = self._rule["interpolation"]
        return f"resized to {width}x{height} ({how}, antialiased; {crop})"

    @cached_property
    def key(self) -> str:
        """Digest of its weights, its preprocessing, and of its GELU where that is not torch's."""
        quick = any(type(part).__name__ == "QuickGELU" for part in self.model.modules())
        told = str(sorted(self._rule.items())) + (" QuickGELU" if quick else "")
        return fingerprint_module(self.model, told)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, d), float32, of images (B, 3, H, W) in [-1, 1]; differentiable."""
        pixels = prepare(images.to(self.device), self._size, self._rule)
        dtype = next(self.model.parameters()).dtype
        return F.normalize(self.model.encode_image(pixels.to(dtype)).float(), dim=-1)

    def embed_texts(self, texts: list[str]) -> Tensor:
        """Unit vectors (B, d), float32, without gradient; a text longer than its context is cut."""
        with torch.no_grad():
            tokens = self.tokenizer(texts).to(self.device)
            return F.normalize(self.model.encode_text(tokens).float(), dim=-1)


def load_clip(spec: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Clip:
    """The model of "clip:ARCH:TAG", "clip:ARCH:PATH" or "clip:ARCH:TAG=PATH".

    A tag is fetched by open_clip, which keeps it in the hub's cache; a path needs no network. The
    tag says which GELU and preprocessing weights were trained with; a path alone is taken for the
    architecture's own, which OpenAI's weights are not.
    Raises `UserError` for an unknown architecture or tag, a missing package, and weights that
    cannot be had or do not fit.
    """
    open_clip = optional_module("open_clip", "rewards", spec)
    parts = spec.split(":", 2)
    if len(parts) < 3 or not parts[2]:
        raise UserError(
            f"{spec!r}: name the architecture and its weights, such as clip:ViT-B-32:openai (which "
            "is downloaded) or clip:ViT-B-32:openai=/path/weights.safetensors."
        )
    _, arch, weights = parts
    if arch not in open_clip.list_models():
        raise UserError(f"{spec!r}: open_clip knows no {arch!r}; see open_clip.list_models().")
    if weights in open_clip.list_pretrained_tags_by_model(arch):
        model = _fetched(open_clip, arch, weights)
    else:
        tag, _, path = weights.rpartition("=")
        model = _from_file(open_clip, arch, tag, path)
    name, label = f"clip:{arch}", f"open_clip {arch}"
    return Clip(name, label, model.to(device, dtype), open_clip.get_tokenizer(arch))


def _fetched(open_clip: Any, arch: str, tag: str) -> Any:
    source = open_clip.get_pretrained_cfg(arch, tag)
    say(f"open_clip: weights {tag} of {arch} from {source.get('hf_hub') or source.get('url')}")
    # open_clip only warns of weights that were trained with another GELU than it builds.
    quick = bool(source.get("quick_gelu", False))
    try:
        return open_clip.create_model(
            arch, pretrained=tag, require_pretrained=True, force_quick_gelu=quick
        )
    except Exception as error:  # hub, network and file errors of several libraries
        raise UserError(
            f"clip:{arch}:{tag}: its weights could not be fetched ({_first_line(error)}). "
            f"Give them as a file: clip:{arch}:{tag}=PATH."
        ) from error


def _from_file(open_clip: Any, arch: str, tag: str, path: str) -> Any:
    config = open_clip.get_pretrained_cfg(arch, tag) if tag else {}
    if tag and not config:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(arch))
        raise UserError(f"clip:{arch}: no weights tagged {tag!r}. Known: {known}.")
    if not Path(path).expanduser().is_file():
        known = ", ".join(open_clip.list_pretrained_tags_by_model(arch))
        raise UserError(f"clip:{arch}: {path!r} is neither a file nor a tag; tags: {known}.")
    keys = ("mean", "std", "interpolation", "resize_mode")
    model = open_clip.create_model(
        arch,
        load_weights=False,
        force_quick_gelu=bool(config.get("quick_gelu", False)),
        force_preprocess_cfg={key: config[key] for key in keys if key in config},
        pretrained_text=False,
    )
    _fill(open_clip, arch, model, path)
    return model


def clip_of_weights(arch: str, path: str | os.PathLike[str], purpose: str) -> Any:
    """open_clip's model of an architecture with OpenAI's normalisation and weights of a file.

    Raises `UserError` for a missing package, and weights that cannot be read or do not fit.
    """
    open_clip = optional_module("open_clip", "rewards", purpose)
    model = open_clip.create_model(arch, load_weights=False, pretrained_text=False)
    _fill(open_clip, arch, model, path)
    return model


def _fill(open_clip: Any, arch: str, model: Any, path: str | os.PathLike[str]) -> None:
    state = load_named_weights(path)
    try:
        model.load_state_dict(open_clip.convert.convert_state_dict(model, dict(state)))
    except RuntimeError as error:
        raise UserError(f"{path}: are not weights of {arch} ({_first_line(error)}).") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def prepare(images: Tensor, size: tuple[int, int], rule: Mapping[str, Any]) -> Tensor:
    """open_clip's evaluation preprocessing: images (B, 3, H, W) in [-1, 1] -> pixels (B, 3, *size).

    Resized with antialiasing: "squash" to the size, else the shorter side to it and the middle cut
    out; limited to [0, 1], then (x - mean) / std.
    """
    pixels = (images.float() + 1) / 2
    method = InterpolationMode(rule["interpolation"])
    if rule["resize_mode"] == "squash":
        pixels = vision.resize(pixels, list(size), method, antialias=True)
    else:
        height, width = images.shape[-2:]
        scale = max(size[0] / height, size[1] / width)
        cover = [max(size[0], round(height * scale)), max(size[1], round(width * scale))]
        pixels = vision.resize(pixels, cover, method, antialias=True)
        pixels = vision.center_crop(pixels, list(size))
    # Bicubic weights overshoot; 8-bit pictures, which CLIP was trained on, cannot.
    return vision.normalize(pixels.clamp(0, 1), list(rule["mean"]), list(rule["std"]))
