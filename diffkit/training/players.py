"""One trained network: its wrapped module, its optimizer, its average, and their state on disk.

State is kept by parameter name, whole and on the CPU, so that plain, data-parallel and sharded
(FSDP2) runs read and write the same files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from diffkit.errors import UserError
from diffkit.objectives.views import Ema
from diffkit.training.config import TrainConfig

__all__ = ["Player", "make_optimizer", "shaped_like", "whole"]


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names; raises `UserError` when its library is missing."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.beta1, config.beta2),
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    try:
        bitsandbytes: Any = import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(
            "optimizer: adamw8bit needs bitsandbytes, which is not installed; "
            "pip install bitsandbytes, or use --optimizer adamw."
        ) from error
    return bitsandbytes.optim.AdamW8bit(parameters, **options)


def whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The full tensors on the CPU, without graphs and without sharing memory.

    Sharded tensors are gathered by all processes together; those with `keep` false only take part
    in that, one tensor at a time, and get nothing.
    """
    found = {}
    for name, value in tensors.items():
        tensor = value.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if keep:
            found[name] = tensor.to("cpu", copy=True)
    return found


def shaped_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole `tensor` on the device of `like`, sharded as `like` is."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)


class Player:
    """A player's module before and after wrapping, with all the state that training gives it.

    Arguments:
        name: the objective's name for it.
        module: the plain module, with its trainable parameters in float32.
        config: optimizer, clipping and EMA.
        average: whether to keep a moving average when the config asks for one.
    """

    def __init__(self, name: str, module: nn.Module, config: TrainConfig, average: bool) -> None:
        self.name = name
        self.plain = module
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if not any(p.requires_grad for p in module.parameters()):
            raise UserError(f"player {name}: has no trainable parameter.")
        self.optimizer: Any = make_optimizer(self._trainable(), config)
        self.module = module
        self._decay = config.ema if average else None
        self.ema: Ema | None = None

    def wrap(self, accelerator: Any) -> None:
        """Hand module and optimizer to accelerate, in the one call that FSDP2 asks for."""
        self.module, self.optimizer = accelerator.prepare(self.plain, self.optimizer)
        self.plain = accelerator.unwrap_model(self.module)
        self.names = [n for n, p in self.plain.named_parameters() if p.requires_grad]
        self.parameters = self._trainable()
        if self._decay is not None:
            self.ema = Ema(self.plain, self._decay)

    def _trainable(self) -> list[nn.Parameter]:
        return [p for p in self.plain.parameters() if p.requires_grad]

    def count(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters."""
        trainable = sum(p.numel() for p in self._trainable())
        return trainable, sum(p.numel() for p in self.plain.parameters())

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def freeze(self, frozen: bool) -> None:
        """Keep gradients of another player's loss out of this one."""
        for parameter in self.parameters:
            parameter.requires_grad_(not frozen)

    # -- state --------------------------------------------------------------------------------

    # Reading state is a collective call when sharded. Processes that pass `keep=False` take part
    # and get nothing, so that only the one that writes spends memory and copies.

    def weights(self, keep: bool = True) -> dict[str, Tensor]:
        """Trainable parameters and persistent buffers by name."""
        return whole(dict(zip(self.names, self.parameters, strict=True)) | self._buffers(), keep)

    def _buffers(self) -> dict[str, Tensor]:
        buffers = dict(self.plain.named_buffers())
        kept = self.plain.state_dict().keys() & buffers.keys()
        return {name: buffer for name, buffer in buffers.items() if name in kept}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set what `weights` returned."""
        tensors = dict(zip(self.names, self.parameters, strict=True)) | self._buffers()
        for name, tensor in tensors.items():
            tensor.copy_(shaped_like(weights[name], tensor))

    def average(self, keep: bool = True) -> dict[str, Tensor]:
        """The moving average by name; empty without EMA."""
        return {} if self.ema is None else whole(self.ema.weights, keep)

    def load_average(self, weights: Mapping[str, Tensor]) -> None:
        """Set what `average` returned."""
        if self.ema is not None:
            shadow = self.ema.weights
            self.ema.load({k: shaped_like(v, shadow[k]) for k, v in weights.items()})

    def optimizer_state(self, keep: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain numbers of the optimizer's state, each named `slot/parameter`."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        state = self._raw_optimizer().state
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for slot, value in state.get(parameter, {}).items():
                key = f"{slot}/{name}"
                if isinstance(value, Tensor):
                    tensors[key] = value
                else:
                    numbers[key] = value
        return whole(tensors, keep), numbers

    def load_optimizer_state(
        self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
    ) -> None:
        """Set what `optimizer_state` returned."""
        state = self._raw_optimizer().state
        parameters = dict(zip(self.names, self.parameters, strict=True))
        state.clear()
        for key, value in {**tensors, **numbers}.items():
            slot, name = key.split("/", 1)
            parameter = parameters[name]
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value = shaped_like(value, parameter)
            elif isinstance(value, Tensor):
                value = value.to(parameter.device)
            state[parameter][slot] = value

    def _raw_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @contextlib.contextmanager
    def result(self, keep: bool = True) -> Iterator[None]:
        """Inside the block the plain module holds the result: the average where one is kept.

        Sharded weights are whole, on the CPU, in the processes with `keep`; see above.
        """
        average = self.ema.applied() if self.ema else contextlib.nullcontext()
        with average, _gathered(self.plain, keep):
            yield


@contextlib.contextmanager
def _gathered(module: nn.Module, keep: bool) -> Iterator[None]:
    """Whole CPU parameters in place of the sharded ones; does nothing to a plain module."""
    sharded: list[tuple[nn.Module, str, nn.Parameter]] = []
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                sharded.append((owner, name, parameter))
    gathered = whole({str(place): p for place, (_, _, p) in enumerate(sharded)}, keep)
    for place, tensor in gathered.items():
        owner, name, _ = sharded[int(place)]
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    try:
        yield
    finally:
        for owner, name, parameter in sharded:
            owner._parameters[name] = parameter
