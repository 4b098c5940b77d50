"""Views of one network: the same module with other weights, for as long as a `with` block lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["Ema", "ema_decay", "snapshot", "weights_exchanged"]


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the trainable parameters by name, on their device and in at least float32."""
    return {
        name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def _exchange(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # what a pass gathered would go on with the other weights
    # So would the low-precision copies that autocast keeps of float32 weights.
    torch.clear_autocast_cache()
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
    It may lie within an autocast region.
    `weights` must be tensors as `snapshot` makes them, on the module's device (sharded alike when
    it is sharded).
    """
    _exchange(module, weights)
    try:
        yield
    finally:
        _exchange(module, weights)


def ema_decay(updates: int, decay: float) -> float:
    """The decay of update number `updates` = 0, 1, ...: min(decay, (1 + n) / (10 + n)).

    The warm-up lets the average forget the first weights while few have been seen.
    """
    return min(decay, (1 + updates) / (10 + updates))


class Ema:
    """A shadow of the trainable parameters: shadow <- d shadow + (1 - d) weights; a `snapshot`.

    Arguments:
        decay: d, or with `warm` the most that it becomes, see `ema_decay`.
    """

    def __init__(self, module: nn.Module, decay: float, warm: bool = True) -> None:
        self.decay = decay
        self.warm = warm
        self.module = module
        self.weights = snapshot(module)
        parameters = dict(module.named_parameters())
        self._live = [parameters[name].detach() for name in self.weights]
        self._shadow = list(self.weights.values())

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the module's weights after `updates` earlier updates."""
        decay = ema_decay(updates, self.decay) if self.warm else self.decay
        torch._foreach_lerp_(self._shadow, self._live, 1 - decay)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Set the shadow."""
        for name, weight in weights.items():
            self.weights[name].copy_(weight)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averaged weights inside the block."""
        with weights_exchanged(self.module, self.weights):
            yield
