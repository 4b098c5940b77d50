"""Names of LoRA weights: the diffusers, peft and kohya layouts, in and out.

A LoRA file is read into one form, component -> module path -> `LoraLayer`:

    unet.mid_block.attentions.0.proj_in.lora_A.weight         diffusers (also .lora.down.weight)
    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight kohya, SD 1 and 2
    lora_unet_middle_block_1_proj_in.lora_down.weight         kohya, SDXL: original block names
    base_model.model.mid_block.attentions.0.proj_in.lora_A... peft, the denoiser alone

kohya's text encoders are lora_te (SD) or lora_te1 and lora_te2 (SDXL), and every module has an
`alpha`; the layer adds (alpha / rank) up down.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.lora_names import dotted, kohya_path, unet_path

__all__ = [
    "Architecture",
    "LoraLayer",
    "LoraWeights",
    "diffusers_to_kohya",
    "guess_architecture",
    "kohya_to_diffusers",
    "name_denoiser",
    "parse_keys",
    "to_diffusers",
    "to_kohya",
    "with_alphas",
]

Architecture = Literal["sd", "sdxl"]
DENOISER = ""
"""Component of layers whose file does not say "unet" or "transformer"."""

_KOHYA = re.compile(r"lora_(unet|te|te1|te2)_(\w+)\.(lora_down\.weight|lora_up\.weight|alpha)")
_KOHYA_COMPONENTS = {
    "unet": "unet",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
}
_DIFFUSERS = re.compile(
    r"(?:(unet|transformer|text_encoder(?:_[23])?|base_model\.model)\.)?(.+?)"
    r"(?:(?:\.lora_A|\.lora_B|(?:\.lora|\.lora_linear_layer|_lora)\.(?:down|up))\.weight|\.alpha)"
)


@dataclass(frozen=True)
class LoraLayer:
    """One adapted module: its weight becomes W + (alpha / rank) up down.

    Attributes:
        down: (rank, in) or (rank, in, kh, kw).
        up: (out, rank) or (out, rank, 1, 1).
        alpha: the scale's numerator.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Inner dimension of the update."""
        return int(self.down.shape[0])


LoraWeights = dict[str, dict[str, LoraLayer]]
Parts = dict[tuple[str, str], dict[str, Tensor]]


def parse_keys(tensors: Mapping[str, Tensor], layers_per_block: int = 2) -> LoraWeights:
    """Sort the tensors of a LoRA file of any layout by component and module path.

    Without an alpha in the file, alpha = rank.

    Arguments:
        tensors: as they lie in the file.
        layers_per_block: of the U-Net; only the original block names of kohya's SDXL files need it.

    Raises:
        UserError: keys that belong to no LoRA (they are named), or a half layer.
    """
    parts: Parts = {}
    unknown = []
    for key, tensor in tensors.items():
        place = _place(key, layers_per_block)
        if place is None:
            unknown.append(key)
        else:
            component, path, role = place
            parts.setdefault((component, path), {})[role] = tensor
    if unknown:
        raise UserError(_unknown(unknown, len(tensors)))
    weights: LoraWeights = {}
    for (component, path), part in parts.items():
        weights.setdefault(component, {})[path] = _layer(path, part)
    return weights


def to_diffusers(weights: LoraWeights) -> dict[str, Tensor]:
    """Keys that stock `load_lora_weights` reads; up is multiplied by alpha / rank.

    diffusers keeps alpha beside the weights, where other programs do not look; an up that holds
    the scale means the same to all of them.
    """
    tensors = {}
    for component, layers in weights.items():
        text = component.startswith("text_encoder")
        down, up = (
            ("lora_linear_layer.down", "lora_linear_layer.up") if text else ("lora_A", "lora_B")
        )
        for path, layer in layers.items():
            name = f"{component}.{path}"
            tensors[f"{name}.{down}.weight"] = layer.down
            scale = layer.alpha / layer.rank
            tensors[f"{name}.{up}.weight"] = layer.up if scale == 1 else layer.up * scale
    return tensors


def to_kohya(
    weights: LoraWeights, architecture: Architecture, layers_per_block: int = 2
) -> dict[str, Tensor]:
    """Keys of kohya's trainers: SDXL with the original U-Net's names, SD with those of diffusers.

    Raises:
        UserError: a component that kohya's SD and SDXL files do not have.
    """
    text = {"sd": "lora_te", "sdxl": "lora_te1"}[architecture]
    prefixes = {"unet": "lora_unet", "text_encoder": text, "text_encoder_2": "lora_te2"}
    tensors = {}
    for component, layers in weights.items():
        if component not in prefixes:
            raise UserError(f"kohya's {architecture} files have no {component!r} component")
        for path, layer in layers.items():
            flat = path.replace(".", "_")
            if component == "unet" and architecture == "sdxl":
                flat = kohya_path(path, layers_per_block)
            name = f"{prefixes[component]}_{flat}"
            tensors[f"{name}.lora_down.weight"] = layer.down
            tensors[f"{name}.lora_up.weight"] = layer.up
            tensors[f"{name}.alpha"] = torch.tensor(float(layer.alpha))
    return tensors


def kohya_to_diffusers(
    tensors: Mapping[str, Tensor], layers_per_block: int = 2
) -> dict[str, Tensor]:
    """kohya's keys -> diffusers' keys, alpha multiplied into up; raises as `parse_keys` does."""
    return to_diffusers(parse_keys(tensors, layers_per_block))


def diffusers_to_kohya(
    tensors: Mapping[str, Tensor], architecture: Architecture, layers_per_block: int = 2
) -> dict[str, Tensor]:
    """diffusers' keys -> kohya's keys; raises as `parse_keys` and `to_kohya` do."""
    return to_kohya(parse_keys(tensors), architecture, layers_per_block)


def guess_architecture(weights: LoraWeights) -> Architecture:
    """SDXL by its second text encoder or its 2048 text channels, else SD."""
    if "text_encoder_2" in weights:
        return "sdxl"
    layers = {**weights.get("unet", {}), **weights.get(DENOISER, {})}
    context = [layer.down.shape[1] for path, layer in layers.items() if path.endswith("attn2.to_k")]
    return "sdxl" if 2048 in context else "sd"


def name_denoiser(weights: LoraWeights, component: str) -> LoraWeights:
    """Name the component of layers whose file does not name it."""
    if DENOISER not in weights:
        return weights
    rest = {key: layers for key, layers in weights.items() if key != DENOISER}
    return {**rest, component: {**rest.get(component, {}), **weights[DENOISER]}}


def with_alphas(weights: LoraWeights, alphas: Mapping[tuple[str, str], float]) -> LoraWeights:
    """The same layers with some alphas replaced, by (component, path)."""
    return {
        component: {
            path: replace(layer, alpha=alphas.get((component, path), layer.alpha))
            for path, layer in layers.items()
        }
        for component, layers in weights.items()
    }


def _place(key: str, layers_per_block: int) -> tuple[str, str, str] | None:
    """(component, module path, "down" | "up" | "alpha") of a key, None for no LoRA key."""
    if match := _KOHYA.fullmatch(key):
        component = _KOHYA_COMPONENTS[match[1]]
        unet = component == "unet"
        path = unet_path(match[2], layers_per_block) if unet else dotted(match[2])
        return component, path, match[3].removeprefix("lora_").removesuffix(".weight")
    match = _DIFFUSERS.fullmatch(key)
    if match is None or key.startswith("lora_"):
        return None
    component = (match[1] or DENOISER).replace("base_model.model", DENOISER)
    path = match[2].replace(".processor.", ".")
    if key.endswith(".alpha"):
        return component, path, "alpha"
    role = "down" if re.search(r"(lora_A|down)\.weight$", key) else "up"
    if re.search(r"_lora\.(down|up)\.weight$", key):
        path = _old_path(path, component)
    return component, path, role


def _old_path(path: str, component: str) -> str:
    """Before peft diffusers wrote `to_q_lora` on the attention, `to_out_lora` for `to_out.0`."""
    if component.startswith("text_encoder"):
        return re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", path)
    return re.sub(r"\.to_out$", ".to_out.0", path)


def _layer(path: str, part: Mapping[str, Tensor]) -> LoraLayer:
    if missing := sorted({"down", "up"} - set(part)):
        raise UserError(
            f"{path}: this LoRA layer has no {missing[0]!r} weight; the file is not whole"
        )
    rank = part["down"].shape[0]
    if part["up"].shape[1] != rank:
        raise UserError(f"{path}: down has rank {rank}, up has rank {part['up'].shape[1]}")
    alpha = float(part["alpha"]) if "alpha" in part else float(rank)
    return LoraLayer(part["down"], part["up"], alpha)


def _unknown(keys: list[str], total: int) -> str:
    kinds = {
        "dora_scale": "DoRA",
        "lora_magnitude_vector": "DoRA",
        "hada_": "LoHa (LyCORIS)",
        "lokr_": "LoKr (LyCORIS)",
        "lora_mid": "LoCon with a Tucker core",
    }
    text = " ".join(keys)
    kind = next((name for mark, name in kinds.items() if mark in text), None)
    shown = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
    what = f"{kind} is not supported" if kind else "they belong to no LoRA"
    return f"{len(keys)} of {total} keys cannot be used, {what}: {shown}"
