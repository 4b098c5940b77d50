"""Views of one network: the same module with other weights, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

__all__ = ["snapshot", "weights_exchanged"]


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the trainable parameters by name, on their device and in float32."""
    return {
        name: parameter.detach().to(torch.float32, copy=True)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def _exchange(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    for name, weight in weights.items():
        parameter = parameters[name]
        kept = parameter.detach().clone()
        parameter.copy_(weight)
        weight.copy_(kept)


@contextlib.contextmanager
def weights_exchanged(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let `module` hold `weights` inside the block; `weights` hold the module's own meanwhile.

    The values change places one tensor at a time, so the block needs no second copy of the model.
    `weights` must be float32 tensors on the module's device (sharded alike when it is sharded).
    """
    _exchange(module, weights)
    try:
        yield
    finally:
        _exchange(module, weights)
