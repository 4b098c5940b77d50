"""LoRA layers inside a network: what can be adapted, which weights fit, how peft wraps them."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffkit.models.lora_keys import LoraLayer, LoraWeights
from diffkit.randomness import normal, uniform

__all__ = ["Init", "fit", "inject", "lora_layers", "new_layer", "plain_modules"]

Init = Literal["uniform", "gaussian"]
"""How A begins."""


def lora_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """The peft layers of a network by path, which is that of the module they wrap."""
    from peft.tuners.lora import LoraLayer as PeftLayer

    for path, module in network.named_modules():
        if isinstance(module, PeftLayer):
            yield path, module


def plain_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Linear and convolution layers by the path that they have without adapters."""
    wrapped = dict(lora_layers(network))
    inside = tuple(f"{path}." for path in wrapped)
    found: dict[str, nn.Module] = {path: m.get_base_layer() for path, m in wrapped.items()}
    for path, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not path.startswith(inside):
            found[path] = module
    return found


def new_layer(
    module: nn.Module, rank: int, alpha: float, seed: int, path: str, init: Init = "uniform"
) -> LoraLayer:
    """Weights of an untrained layer, A from its address and B zero.

    A is uniform in +-1 / sqrt(fan_in), or normal with standard deviation 1 / rank ("gaussian").
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    down_shape, up_shape = _shapes(module, rank)
    if init == "gaussian":
        down = normal(down_shape, seed, path, "lora") / rank
    else:
        bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
        down = (2 * uniform(down_shape, seed, path, "lora") - 1) * bound
    return LoraLayer(down, torch.zeros(up_shape), float(alpha))


def _shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B for a module."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    out, *inside = weight.shape
    return (rank, *inside), (out, rank, *(1 for _ in inside[1:]))


def fit(weights: LoraWeights, networks: Mapping[str, nn.Module]) -> tuple[LoraWeights, list[str]]:
    """The layers that fit, shaped for their modules, and the names of the others, with a reason."""
    fitting: LoraWeights = {}
    unexpected = []
    for component, layers in weights.items():
        modules = plain_modules(networks[component]) if component in networks else {}
        for path, layer in layers.items():
            place = _find(path, modules)
            if place is None:
                unexpected.append(f"{component}.{path} (no such layer)")
                continue
            shaped = _shaped(layer, modules[place])
            if shaped is None:
                have, want = tuple(layer.down.shape), _shapes(modules[place], layer.rank)[0]
                unexpected.append(f"{component}.{path} (shape {have}, would have to be {want})")
                continue
            fitting.setdefault(component, {})[place] = shaped
    return fitting, unexpected


def _find(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """transformers 5 dropped CLIP's `text_model.` level, which files still have."""
    names = (path, path.removeprefix("text_model."), f"text_model.{path}")
    return next((name for name in names if name in modules), None)


def _shaped(layer: LoraLayer, module: nn.Module) -> LoraLayer | None:
    """The layer in float32 and in the module's shapes, None where it does not fit.

    Only ones at the end may differ: files hold (r, in) and (r, in, 1, 1) for the same network.
    """
    shapes = _shapes(module, layer.rank)
    for tensor, shape in zip((layer.down, layer.up), shapes, strict=True):
        if _four(tensor.shape) != _four(shape):
            return None
    down, up = layer.down.float().reshape(shapes[0]), layer.up.float().reshape(shapes[1])
    return LoraLayer(down, up, layer.alpha)


def _four(shape: Sequence[int]) -> list[int]:
    return [*shape, *(1 for _ in range(4 - len(shape)))]


def inject(network: nn.Module, name: str, layers: Mapping[str, LoraLayer]) -> None:
    """Wrap the modules at these paths and fill in the weights, float32, where the module is."""
    from peft import LoraConfig, inject_adapter_in_model

    ranks = {path: layer.rank for path, layer in layers.items()}
    alphas = {path: layer.alpha for path, layer in layers.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    config = LoraConfig(
        r=int(rank),
        lora_alpha=alpha,
        target_modules="|".join(re.escape(path) for path in layers),
        rank_pattern=_pattern(ranks, rank),
        alpha_pattern=_pattern(alphas, alpha),
    )
    with warnings.catch_warnings():
        # peft warns of every second adapter; several are what this module is for
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, network, adapter_name=name)
    # stock pipelines look here to see whether a network carries adapters
    network._hf_peft_config_loaded = True  # type: ignore[assignment]
    wrapped = dict(lora_layers(network))
    for path, layer in layers.items():
        device = wrapped[path].get_base_layer().weight.device
        for part, value in ((wrapped[path].lora_A, layer.down), (wrapped[path].lora_B, layer.up)):
            part[name].weight = nn.Parameter(value.to(device, torch.float32, copy=True))


def _most_common(values: Mapping[str, float]) -> float:
    return Counter(values.values()).most_common(1)[0][0]


def _pattern(values: Mapping[str, float], usual: float) -> dict[str, Any]:
    return {f"^{re.escape(path)}": v for path, v in values.items() if v != usual}
