"""What a model costs: parameters, multiply-accumulates, memory and time.

Counting runs the networks on torch's meta device (`diffkit.models.skeleton`): exact operation
counts and activation sizes, without weights, memory or arithmetic.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = [
    "Cost",
    "ModelCost",
    "Rates",
    "count",
    "measure_rates",
    "model_cost",
    "parameter_count",
]


@dataclass(frozen=True)
class Cost:
    """One call of a network.

    Attributes:
        matmul_macs: multiply-accumulates of linear layers and attention.
        conv_macs: those of convolutions.
        peak_elements: numbers in the activations that are alive at once, at most, without autograd.
    """

    matmul_macs: int
    conv_macs: int
    peak_elements: int

    @property
    def macs(self) -> int:
        """All multiply-accumulates; one is two floating-point operations."""
        return self.matmul_macs + self.conv_macs


class _FusedAttention(TorchFunctionMode):
    """Counts scaled_dot_product_attention as fused kernels do it, without the L x S matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **named)
        names = ("query", "key", "value")
        query, key, value = (*args, *(named[name] for name in names[len(args) :]))[:3]
        length, depth = query.shape[-2:]
        rows = query.numel() // depth
        self.macs += rows * key.shape[-2] * (depth + value.shape[-1])
        return query.new_empty(*query.shape[:-2], length, value.shape[-1])


class _LiveElements(TorchDispatchMode):
    """Follows how many numbers the results of operations hold while they are referenced."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # Weights and inputs are known before an operation hands back a view of them.
        self._follow(args, inside=False)
        result = func(*args, **(kwargs or {}))
        self._follow(result, inside=True)
        return result

    def _follow(self, tree: Any, inside: bool) -> None:
        for item in tree_leaves(tree):
            if isinstance(item, Tensor):
                self._add(item, inside)

    def _add(self, item: Tensor, inside: bool) -> None:
        storage = item.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes() // item.element_size() if inside else 0
        self._seen[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._seen.pop(key)


@torch.no_grad()
def count(call: Callable[[], object]) -> Cost:
    """Count one call, on whatever device its tensors are; on "meta" it costs no memory."""
    flops, attention, live = FlopCounterMode(display=False), _FusedAttention(), _LiveElements()
    with live, flops, attention:
        call()
    convs = sum(
        value
        for operation, value in flops.get_flop_counts().get("Global", {}).items()
        if "conv" in str(operation)
    )
    matmuls = flops.get_total_flops() - convs
    return Cost(matmuls // 2 + attention.macs, convs // 2, live.peak)


def parameter_count(module: nn.Module) -> int:
    """Parameters, each shared one counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class ModelCost:
    """The cost of one picture's stages and of the weights.

    Attributes:
        parameters: by network name, in the pipeline's order.
        text: the text encoders on one prompt.
        denoiser: one call for one picture; guidance makes two of each step.
        decode: the VAE's decoder on one picture.
        width, height: pixels.
    """

    parameters: dict[str, int]
    text: Cost
    denoiser: Cost
    decode: Cost
    width: int
    height: int

    def macs(self, steps: int, guided: bool = True) -> int:
        """Multiply-accumulates of one picture."""
        stages = self._stages(steps, guided)
        return sum(calls * stage.macs for calls, stage in stages)

    def _stages(self, steps: int, guided: bool) -> list[tuple[int, Cost]]:
        passes = 2 if guided else 1
        return [(passes, self.text), (passes * steps, self.denoiser), (1, self.decode)]

    def memory(self, batch_size: int, guided: bool = True, bytes_each: int = 4) -> int:
        """Estimated peak bytes: all weights, and the largest stage's live activations.

        Workspaces of the kernels and the memory of the framework itself are not in it.
        """
        passes = 2 if guided else 1
        stages = (self.text.peak_elements, passes * self.denoiser.peak_elements)
        activations = batch_size * max(*stages, self.decode.peak_elements)
        return bytes_each * (sum(self.parameters.values()) + activations)

    def seconds(self, steps: int, rates: Rates, guided: bool = True) -> float:
        """Estimated seconds a picture at measured `rates`, memory traffic left out."""
        stages = self._stages(steps, guided)
        matmul = sum(calls * stage.matmul_macs for calls, stage in stages)
        conv = sum(calls * stage.conv_macs for calls, stage in stages)
        return matmul / rates.matmul + conv / rates.conv


def model_cost(model: LatentDiffusion, width: int, height: int) -> ModelCost:
    """Count a model (usually a `skeleton`) at one picture size in pixels."""
    channels, h, w = model.codec.channels, height // model.codec.factor, width // model.codec.factor
    device = model.device
    conditioner, denoiser, codec = model.conditioner, model.denoiser, model.codec
    prompt = [conditioner.example]
    cond = conditioner.encode(prompt, (height, width))
    z_0 = torch.empty(1, channels, h, w, device=device, dtype=model.dtype)
    # more channels than z_0 has where a mask goes in
    z_t = z_0.new_empty(1, denoiser.geometry.channels, h, w)
    t = torch.ones(1, device=device)
    guidance = t if model.family.takes_guidance else None
    return ModelCost(
        parameters={name: parameter_count(part) for name, part in model.networks.items()},
        text=count(lambda: conditioner.encode(prompt, (height, width))),
        denoiser=count(lambda: denoiser(z_t, t, cond, guidance)),
        decode=count(lambda: codec.decode(z_0)),
        width=width,
        height=height,
    )


@dataclass(frozen=True)
class Rates:
    """Measured multiply-accumulates a second of this machine.

    Attributes:
        matmul: a 1024 x 1024 matrix product.
        conv: a 3 x 3 convolution of 64 channels on 64 x 64.
    """

    matmul: float
    conv: float


@torch.no_grad()
def measure_rates(device: str, dtype: torch.dtype = torch.float32, seconds: float = 0.2) -> Rates:
    """Measure `Rates`, about `seconds` for each; the best of the repetitions counts."""
    a = torch.randn(1024, 1024, device=device).to(dtype)
    x = torch.randn(1, 64, 64, 64, device=device).to(dtype)
    kernel = torch.randn(64, 64, 3, 3, device=device).to(dtype)
    matmul = _best_time(lambda: a @ a, device, seconds)
    conv = _best_time(lambda: nn.functional.conv2d(x, kernel, padding=1), device, seconds)
    return Rates(1024**3 / matmul, 64 * 64 * 9 * 64 * 64 / conv)


def _best_time(call: Callable[[], Tensor], device: str, seconds: float) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()  # the first call chooses kernels
    end = time.perf_counter() + seconds
    best = once()
    while time.perf_counter() < end:
        best = min(best, once())
    return best
