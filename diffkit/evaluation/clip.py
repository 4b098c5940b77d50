"""CLIP models of open_clip as extractor and as scorer; see `extractors` for their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

__all__ = ["Clip", "load_clip"]


@dataclass(frozen=True)
class Clip:
    """Both towers of a CLIP model with its own preprocessing.

    `embed_images` takes images (B, 3, H, W) in [-1, 1], `embed_texts` a list of texts; both give
    unit vectors (B, d), float32, on `device`. A text longer than the model's context is cut.
    """

    name: str
    label: str
    dim: int
    resize: str
    key: str
    embed_images: Callable[[Tensor], Tensor]
    embed_texts: Callable[[list[str]], Tensor]
    device: torch.device


def load_clip(spec: str, device: torch.device) -> Clip:
    """The model of "clip:ARCH:TAG", "clip:ARCH:PATH" or "clip:ARCH:TAG=PATH".

    A tag is fetched by open_clip, which keeps it in the hub's cache; a path needs no network.
    Raises `UserError` for an unknown architecture or tag, a missing package, and weights that
    cannot be had or do not fit.
    """
    open_clip = optional_module("open_clip", "evaluate", spec)
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
    model = model.to(device).eval().requires_grad_(False)
    return _wrapped(open_clip, arch, model, device)


def _fetched(open_clip: Any, arch: str, tag: str) -> Any:
    source = open_clip.get_pretrained_cfg(arch, tag)
    say(f"open_clip: weights {tag} of {arch} from {source.get('hf_hub') or source.get('url')}")
    try:
        return open_clip.create_model(arch, pretrained=tag, require_pretrained=True)
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
    state = load_named_weights(path)
    try:
        model.load_state_dict(open_clip.convert.convert_state_dict(model, dict(state)))
    except RuntimeError as error:
        raise UserError(f"{path}: are not weights of {arch} ({_first_line(error)}).") from error
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _wrapped(open_clip: Any, arch: str, model: Any, device: torch.device) -> Clip:
    rule = dict(model.visual.preprocess_cfg)
    size = rule["size"] if isinstance(rule["size"], tuple | list) else (rule["size"],) * 2
    tokenizer = open_clip.get_tokenizer(arch)

    def embed_images(images: Tensor) -> Tensor:
        with torch.no_grad():
            pixels = prepare(images.to(device), (int(size[0]), int(size[1])), rule)
            return F.normalize(model.encode_image(pixels).float(), dim=-1)

    def embed_texts(texts: list[str]) -> Tensor:
        with torch.no_grad():
            return F.normalize(model.encode_text(tokenizer(texts).to(device)).float(), dim=-1)

    with torch.no_grad():
        dim = embed_images(torch.zeros(1, 3, 32, 32)).shape[-1]
    squash = rule["resize_mode"] == "squash"
    crop = "whole" if squash else "shortest side, middle cropped"
    return Clip(
        name=f"clip:{arch}",
        label=f"open_clip {arch}",
        dim=dim,
        resize=f"resized to {size[1]}x{size[0]} ({rule['interpolation']}, antialiased; {crop})",
        key=fingerprint_module(model, str(sorted(rule.items()))),
        embed_images=embed_images,
        embed_texts=embed_texts,
        device=device,
    )


def prepare(images: Tensor, size: tuple[int, int], rule: Mapping[str, Any]) -> Tensor:
    """open_clip's evaluation preprocessing on tensors: [-1, 1] in, normalised (B, 3, *size) out."""
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
