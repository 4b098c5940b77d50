"""LoRA through peft: weighted adapters on a frozen base (Hu et al. 2021, arXiv:2106.09685).

    W' = W + sum_i w_i (alpha_i / r_i) B_i A_i,    A_i (r_i, in),  B_i (out, r_i)

A and B are float32 whatever the dtype of the base; each layer's sum is cast back to the base's
dtype. Adapters are injected in place: the base is not copied, only frozen. An adapter stretches
over all networks in which it has layers, the denoiser and the text encoders.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from diffkit import console
from diffkit.errors import UserError
from diffkit.models.lora_file import LORA_FILE, find_lora, read_lora, write_lora
from diffkit.models.lora_keys import LoraLayer, LoraWeights
from diffkit.models.lora_layers import Init, fit, inject, lora_layers, new_layer, plain_modules
from diffkit.models.model_card import ModelCard, write_model_card
from diffkit.models.weights import read_header

if TYPE_CHECKING:
    from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = [
    "active_adapters",
    "add_lora",
    "disable_lora",
    "load_lora",
    "lora_parameters",
    "lora_weights",
    "merge_lora",
    "plain_copy",
    "remove_lora",
    "save_lora",
    "set_adapters",
]


def add_lora(
    model: LatentDiffusion,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    name: str = "default",
    seed: int = 0,
    init: Init = "uniform",
    text_targets: Sequence[str] = (),
    lasting: bool = True,
) -> dict[str, nn.Parameter]:
    """Put a new trainable adapter on the denoiser and freeze everything else of it.

    B = 0, so that the output does not change; A is drawn from an address of (seed, module path).
    Other active adapters stay active, with their weights, but are no longer trainable.

    Arguments:
        model: gets the adapter in place.
        rank: r, at least 1.
        alpha: scale's numerator, `rank` by default (scale 1).
        targets: endings of module paths, such as "to_q" or "ff.net.2"; by default the family's.
            Linear and convolution layers can be adapted.
        name: of the adapter, a Python identifier.
        seed: of A.
        init: of A: "uniform" in +-1 / sqrt(fan_in) (Kaiming's bound, peft's default), or
            "gaussian" with standard deviation 1 / r (peft's option of that name).
        text_targets: the same endings for the text encoders, which get no layers without.
        lasting: it will be saved, so the family must be one whose LoRA files load; False for an
            adapter that is taken off again, which any network can have.

    Returns:
        The adapter's parameters, as `lora_parameters` gives them.

    Raises:
        UserError: the family has no LoRA, the name is taken or unusable, or nothing matches.
    """
    if lasting:
        model.family.require("lora")
    if rank < 1:
        raise UserError(f"LoRA rank {rank}: must be at least 1")
    _check_name(model, name)
    scale = float(rank if alpha is None else alpha)

    def layers_of(network: nn.Module, endings: Sequence[str], prefix: str) -> dict[str, LoraLayer]:
        return {
            path: new_layer(module, rank, scale, seed, prefix + path, init)
            for path, module in plain_modules(network).items()
            if any(path == ending or path.endswith(f".{ending}") for ending in endings)
        }

    endings = tuple(targets if targets is not None else model.family.lora_targets)
    found: dict[str, dict[str, LoraLayer]] = {}
    found[model.family.denoiser] = layers_of(model.denoiser.model, endings, "")
    if text_targets:
        for component, encoder in model.conditioner.encoders.items():
            found[component] = layers_of(encoder, text_targets, f"{component}.")
    if not found[model.family.denoiser]:
        raise UserError(
            f"LoRA targets {list(endings)}: no layer of the {model.family.denoiser} ends so"
        )
    before = active_adapters(model)
    for component, layers in found.items():
        if layers:
            inject(_networks(model)[component], name, layers)
    _activate(model, {**before, name: 1.0}, trainable={name})
    return lora_parameters(model, name)


def load_lora(
    model: LatentDiffusion,
    source: str | os.PathLike[str],
    weight: float = 1.0,
    name: str | None = None,
    strict: bool = True,
    trainable: bool = False,
) -> str:
    """Put the adapter of a file on the model, active beside those that are there.

    Arguments:
        model: gets the adapter in place.
        source: a `.safetensors` file, a folder, or a hub id; diffusers, peft or kohya keys.
        weight: w, see the module's formula.
        name: of the adapter; by default made from the file's name.
        strict: refuse a file of which only a part fits; without, the rest is named and left out.
        trainable: let the adapter's weights require gradients (alone of all).

    Returns:
        The adapter's name.

    Raises:
        UserError: no LoRA file, one that fits no layer (the message says what it looks like), one
            with kohya's keys for a family whose names of those are not known, or with `strict` one
            of which keys are unexpected (they are named).
    """
    model.family.require("lora")
    path = find_lora(source)
    name = _check_name(model, name or _name_of(path))
    if any(key.startswith(("lora_unet_", "lora_te")) for key in read_header(path).shapes):
        model.family.require("kohya")
    weights = read_lora(path, model.family.denoiser, _layers_per_block(model))
    fitting, unexpected = fit(weights, _networks(model))
    if not fitting:
        raise UserError(_no_match(path, weights, model))
    if unexpected:
        message = f"{path}: {len(unexpected)} of its layers do not fit this model: "
        message += "; ".join(unexpected[:8]) + ("; ..." if len(unexpected) > 8 else "")
        if strict:
            raise UserError(f"{message}. In Python, strict=False loads the rest")
        console.warn(message)
    before = active_adapters(model)
    for component, layers in fitting.items():
        inject(_networks(model)[component], name, layers)
    _activate(model, {**before, name: weight}, trainable={name} if trainable else set())
    return name


def set_adapters(model: LatentDiffusion, weights: Mapping[str, float]) -> None:
    """Make exactly these adapters active, with these weights w; the others stay in memory.

    Which parameters require gradients does not change.

    Raises:
        UserError: a name that the model does not have.
    """
    if unknown := sorted(set(weights) - set(_all_adapters(model))):
        raise UserError(f"no adapter {unknown[0]!r}; this model has {_all_adapters(model)}")
    _activate(model, weights, trainable=None)


def active_adapters(model: LatentDiffusion) -> dict[str, float]:
    """Names of the active adapters and their weights w, in order."""
    weights: dict[str, float] = {}
    for layer in _all_layers(model):
        for name in layer.active_adapters:
            if name in layer.lora_A and name not in weights:
                scale = layer.lora_alpha[name] / layer.r[name]
                weights[name] = layer.scaling[name] / scale
    return weights


def merge_lora(model: LatentDiffusion) -> None:
    """Add the active adapters to the base weights and take all adapters off.

    The sum is made in float32 and cast once to the base's dtype. Afterwards the networks have
    their plain classes and names again.
    """
    for layer in _all_layers(model):
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        weight = layer.get_base_layer().weight
        delta = sum((layer.get_delta_weight(name).float() for name in names), torch.zeros(()))
        with torch.no_grad():
            weight.copy_(weight.float() + delta.to(weight.device))
    remove_lora(model)


def remove_lora(model: LatentDiffusion, name: str | None = None) -> None:
    """Take all adapters off, or the one of this name; the networks are those from before, frozen.

    The other adapters stay as active and as trainable as they were. Raises `UserError` for a name
    that the model does not have.
    """
    if name is not None and _all_adapters(model) != [name]:
        return _remove_one(model, name)
    for network in _networks(model).values():
        _take_off(network)


def plain_copy(network: nn.Module) -> nn.Module:
    """A copy of a network without its adapters; every parameter as trainable as it was there."""
    copied = copy.deepcopy(network)
    _take_off(copied)
    return copied


def _take_off(network: nn.Module) -> None:
    from diffusers.utils import recurse_remove_peft_layers

    if any(True for _ in lora_layers(network)):
        recurse_remove_peft_layers(network)
        del network.peft_config
        network._hf_peft_config_loaded = False  # type: ignore[assignment]


def _remove_one(model: LatentDiffusion, name: str) -> None:
    if name not in _all_adapters(model):
        raise UserError(f"no adapter {name!r}; this model has {_all_adapters(model)}")
    # First out of use: peft would choose another active adapter, and make it trainable.
    _activate(model, {n: w for n, w in active_adapters(model).items() if n != name}, None)
    for network in _networks(model).values():
        for path, layer in list(lora_layers(network)):
            if name in layer.lora_A:
                layer.delete_adapter(name)
            if not layer.lora_A:
                parent, _, last = path.rpartition(".")
                setattr(network.get_submodule(parent), last, layer.get_base_layer())
        config: Any = getattr(network, "peft_config", {})
        if config.pop(name, None) is not None and not config:
            del network.peft_config
            network._hf_peft_config_loaded = False  # type: ignore[assignment]


def save_lora(
    model: LatentDiffusion, folder: str | os.PathLike[str], name: str = "default"
) -> Path:
    """Write an adapter to `folder/pytorch_lora_weights.safetensors` and its card, atomically.

    Stock `load_lora_weights(folder)` gives the same outputs. alpha / rank is multiplied into B, so
    that programs which know no alpha read the same adapter: it comes back with alpha = rank. The
    weight w of `set_adapters` is not part of the file.

    Raises:
        UserError: a name that the model does not have.
    """
    path = Path(folder) / LORA_FILE
    write_lora(path, lora_weights(model, name))
    write_model_card(folder, ModelCard.of(model, relation="adapter"))
    return path


def lora_weights(model: LatentDiffusion, name: str = "default") -> LoraWeights:
    """An adapter's layers by component and module path; tensors share memory with the model."""
    weights: LoraWeights = {}
    for component, network in _networks(model).items():
        for path, layer in lora_layers(network):
            if name in layer.lora_A:
                down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
                found = LoraLayer(down.detach(), up.detach(), float(layer.lora_alpha[name]))
                weights.setdefault(component, {})[path] = found
    if not weights:
        raise UserError(f"no adapter {name!r}; this model has {_all_adapters(model)}")
    return weights


def lora_parameters(model: LatentDiffusion, name: str = "default") -> dict[str, nn.Parameter]:
    """An adapter's parameters by `component.path.lora_A` and `.lora_B`, in the networks' order."""
    found = {}
    for component, network in _networks(model).items():
        for path, layer in lora_layers(network):
            if name in layer.lora_A:
                found[f"{component}.{path}.lora_A"] = layer.lora_A[name].weight
                found[f"{component}.{path}.lora_B"] = layer.lora_B[name].weight
    return found


@contextmanager
def disable_lora(model: LatentDiffusion) -> Iterator[None]:
    """The model without its adapters, bit for bit the base, while the context lasts.

    Gradients and what is trainable do not change; contexts may be nested.
    """
    layers = list(_all_layers(model))
    before = [layer.disable_adapters for layer in layers]
    try:
        for layer in layers:
            # peft's enable_adapters would also switch requires_grad, in the midst of a step
            layer._disable_adapters = True
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def _layers_per_block(model: LatentDiffusion) -> int:
    """Of a U-Net; transformers have no such number and kohya's block names do not meet them."""
    config: Any = model.denoiser.model.config
    return int(config.get("layers_per_block", 2))


def _networks(model: LatentDiffusion) -> dict[str, nn.Module]:
    return {model.family.denoiser: model.denoiser.model, **model.conditioner.encoders}


def _all_layers(model: LatentDiffusion) -> Iterator[Any]:
    for network in _networks(model).values():
        for _, layer in lora_layers(network):
            yield layer


def _all_adapters(model: LatentDiffusion) -> list[str]:
    return list(dict.fromkeys(name for layer in _all_layers(model) for name in layer.lora_A))


def _activate(
    model: LatentDiffusion, weights: Mapping[str, float], trainable: set[str] | None
) -> None:
    """Set active adapters, their weights and, unless None, which of all adapters are trainable."""
    for layer in _all_layers(model):
        parts = [
            (n, p)
            for d in (layer.lora_A, layer.lora_B)
            for n, m in d.items()
            for p in m.parameters()
        ]
        before = [parameter.requires_grad for _, parameter in parts]
        layer.set_adapter(list(weights))
        for name, weight in weights.items():
            layer.set_scale(name, weight)
        for (name, parameter), state in zip(parts, before, strict=True):
            parameter.requires_grad_(state if trainable is None else name in trainable)


def _check_name(model: LatentDiffusion, name: str) -> str:
    if not name.isidentifier():
        raise UserError(f"adapter name {name!r}: use letters, digits and underscores")
    if name in _all_adapters(model):
        raise UserError(f"adapter name {name!r} is taken; this model has {_all_adapters(model)}")
    return name


def _name_of(path: Path) -> str:
    stem = path.parent.name if path.name == LORA_FILE else path.stem
    name = re.sub(r"\W+", "_", stem)
    return name if name.isidentifier() else f"lora_{name}"


def _no_match(path: Path, weights: LoraWeights, model: LatentDiffusion) -> str:
    parts = ", ".join(f"{name} ({len(layers)} layers)" for name, layers in weights.items())
    first = next(f"{name}.{key}" for name, layers in weights.items() for key in layers)
    return (
        f"{path}: no layer of this LoRA fits this {model.family.name} model, which has "
        f"{', '.join(_networks(model))}. The file looks like a LoRA for {parts}; its first layer "
        f"is {first}"
    )
