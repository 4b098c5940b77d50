"""Content fingerprints of networks: the keys of every cache that holds what a network computed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["describe_config", "fingerprint_module", "fingerprint_tensors"]

_THREADS = 4


def describe_config(config: Mapping[str, Any]) -> str:
    """Canonical JSON of a diffusers or transformers config, to be given as `extra`.

    Paths and library versions (leading underscore, ending "_version") are left out: they change
    without a change of the network.
    """
    kept = {k: v for k, v in config.items() if not k.startswith("_") and not k.endswith("_version")}
    return json.dumps(kept, sort_keys=True, default=str)


def fingerprint_tensors(tensors: Mapping[str, Tensor], extra: str = "") -> str:
    """Hash of names, dtypes, shapes and every byte of `tensors`.

    h = blake2b(extra, (name, dtype, shape, blake2b(bytes)) in the order of the names)

    All bytes count, so one changed weight changes the hash; devices, strides and the order of the
    mapping do not. It takes 1 to 3 s per GB. Returns 32 hexadecimal digits.
    """
    names = sorted(tensors)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: _digest(tensors[name]), names))
    total = hashlib.blake2b(extra.encode(), digest_size=16)
    for name, digest in zip(names, digests, strict=True):
        head = f"\n{name} {tensors[name].dtype} {tuple(tensors[name].shape)} "
        total.update(head.encode() + digest)
    return total.hexdigest()


def fingerprint_module(module: nn.Module, extra: str = "") -> str:
    """Hash of a network's class, its state dict and which of its LoRA adapters act, how strongly.

    `extra` takes whatever else decides the output: the config, a tokenizer, a token limit. The
    device does not count; the dtype of the weights does, since it changes the output.
    Returns 32 hexadecimal digits.
    """
    head = "\n".join([type(module).__name__, *_adapter_states(module), extra])
    return fingerprint_tensors(module.state_dict(), head)


def _adapter_states(module: nn.Module) -> Iterable[str]:
    for name, layer in module.named_modules():
        scaling = getattr(layer, "scaling", None)
        if isinstance(scaling, dict) and hasattr(layer, "active_adapters"):
            active = {adapter: scaling[adapter] for adapter in layer.active_adapters}
            yield f"{name} {active} {layer.disable_adapters}"


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().data, digest_size=16).digest()
