"""What calls of networks cost: parameters, multiply-accumulates, memory and time.

Counting runs the networks on torch's meta device (`diffkit.models.skeleton`): exact operation
counts and activation sizes, without weights, memory or arithmetic. One multiply-accumulate is two
floating-point operations (FLOP).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = [
    "Cost",
    "GradientCost",
    "Live",
    "Rates",
    "Saved",
    "count",
    "count_gradient",
    "count_vjp",
    "measure_rates",
    "parameter_count",
    "saved_for_backward",
]


@dataclass(frozen=True)
class Cost:
    """One call of a network.

    Attributes:
        matmul_macs: multiply-accumulates of linear layers and attention.
        conv_macs: those of convolutions.
        peak_elements: numbers in the activations that are alive at once, at most; with autograd
            those that wait for the backward pass too.
        attention_macs: the part of `matmul_macs` that is products of queries, keys and values.
    """

    matmul_macs: int
    conv_macs: int
    peak_elements: int
    attention_macs: int = 0

    @property
    def macs(self) -> int:
        """All multiply-accumulates; one is two floating-point operations."""
        return self.matmul_macs + self.conv_macs

    @property
    def flops(self) -> int:
        """All floating-point operations."""
        return 2 * self.macs

    @property
    def flops_without_attention(self) -> int:
        """Those of layers with weights, which is what papers usually count."""
        return 2 * (self.macs - self.attention_macs)


@dataclass(frozen=True)
class GradientCost:
    """A forward and a backward pass.

    Attributes:
        forward: with a graph.
        backward: with what checkpointed blocks compute again.
        saved_elements: numbers that are kept between the two, weights not counted.
    """

    forward: Cost
    backward: Cost
    saved_elements: int

    @property
    def flops(self) -> int:
        """Both passes, attention included."""
        return self.forward.flops + self.backward.flops

    @property
    def flops_without_attention(self) -> int:
        """Both passes."""
        return self.forward.flops_without_attention + self.backward.flops_without_attention

    @property
    def peak_elements(self) -> int:
        """Of both passes."""
        return max(self.forward.peak_elements, self.backward.peak_elements)


class _Attend(torch.autograd.Function):
    """The shapes of fused attention with a gradient: keeps its inputs, its result and one number a
    row, and makes the scores again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, tally: _FusedAttention) -> Any:
        result = tally.result(query, key, value)
        ctx.tally = tally
        ctx.save_for_backward(query, key, value, result, result.new_empty(result.shape[:-1]))
        return result

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        query, key, value = inputs = ctx.saved_tensors[:3]
        products = query.numel() // query.shape[-1] * key.shape[-2]
        wanted = ctx.needs_input_grad[:3]
        # scores again, then each gradient; those of queries and keys go through the scores' own
        widths = [query.shape[-1], *(t.shape[-1] for t, w in zip(inputs, wanted, strict=True) if w)]
        if wanted[0] or wanted[1]:
            widths.append(value.shape[-1])
        ctx.tally.macs += products * sum(widths)
        grads = (torch.empty_like(t) if w else None for t, w in zip(inputs, wanted, strict=True))
        return (*grads, None)


class _FusedAttention(TorchFunctionMode):
    """Counts scaled_dot_product_attention as fused kernels do it, without the L x S matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is torch.autograd.grad:
            # It would run with this mode off, also where a checkpointed block runs again.
            with self:
                return _gradients(*args, **named)
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **named)
        names = ("query", "key", "value")
        inputs = (*args, *(named[name] for name in names[len(args) :]))[:3]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
            return _Attend.apply(*inputs, self)
        return self.result(*inputs)

    def result(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """An empty result of the right shape; its products are counted."""
        depth = query.shape[-1]
        self.macs += query.numel() // depth * key.shape[-2] * (depth + value.shape[-1])
        return query.new_empty(*query.shape[:-1], value.shape[-1])


def _gradients(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | Sequence[Tensor] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool | None = None,
    **others: object,
) -> tuple[Tensor, ...]:
    """`torch.autograd.grad` without its look at function modes; nothing batched or filled in."""
    roots, leaves = _as_tuple(outputs), _as_tuple(inputs)
    given = map(torch.ones_like, roots) if grad_outputs is None else _as_tuple(grad_outputs)
    found: tuple[Tensor, ...] = Variable._execution_engine.run_backward(
        roots,
        tuple(given),
        create_graph if retain_graph is None else retain_graph,
        create_graph,
        leaves,
        bool(allow_unused),
        False,
    )
    return found


def _as_tuple(tensors: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


class _Products(TorchDispatchMode):
    """Counts the operations of matrix products and convolutions, forward and backward.

    torch's own `FlopCounterMode` has the same formulas, but tracks modules too, which does not go
    with `torch.autograd.grad`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.matmul = 0
        self.conv = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        result = func(*args, **named)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            flops = formula(*args, **named, out_val=result)
            if "conv" in str(func):
                self.conv += flops
            else:
                self.matmul += flops
        return result


class Live(TorchDispatchMode):
    """Follows how many numbers the results of operations hold while they are referenced.

    Attributes:
        live: numbers held now.
        peak: the most that were held at once.
        peak_bytes: the most bytes that were held at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.peak_bytes = 0
        self._bytes = 0
        self._seen: dict[int, tuple[int, int]] = {}

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
        held = storage.nbytes() if inside else 0
        size = held // item.element_size()
        self._seen[key] = size, held
        self.live += size
        self._bytes += held
        self.peak = max(self.peak, self.live)
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        size, held = self._seen.pop(key)
        self.live -= size
        self._bytes -= held


class Saved:
    """What autograd keeps for a backward pass; see `saved_for_backward`.

    Attributes:
        elements: numbers kept.
        bytes: the same in bytes.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.elements = 0
        self.bytes = 0
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self._kept: dict[int, Tensor] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor whose storage is neither a weight's nor counted already."""
        alias = tensor.detach()
        storage = alias.untyped_storage()
        key = storage._cdata
        if key not in self._weights and key not in self._kept:
            # Held for now, so that no other tensor gets the same address.
            self._kept[key] = alias
            self.elements += storage.nbytes() // tensor.element_size()
            self.bytes += storage.nbytes()
        return alias

    def forget(self) -> None:
        """Let go of the tensors; the numbers stay."""
        self._kept.clear()


@contextmanager
def saved_for_backward(modules: Iterable[nn.Module]) -> Iterator[Saved]:
    """Within the context, count what autograd keeps of the operations, weights of `modules` aside.

    A checkpointed block counts with its inputs only. Everything counted lives at least as long as
    the context.
    """
    weights = [t for part in modules for t in (*part.parameters(), *part.buffers())]
    saved = Saved(weights)
    with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
        yield saved
    saved.forget()


class _Counter:
    """The three modes together, read off part by part."""

    def __init__(self) -> None:
        self.products, self.attention, self.live = _Products(), _FusedAttention(), Live()
        self._before = (0, 0, 0)

    @contextmanager
    def running(self) -> Iterator[None]:
        with self.live, self.products, self.attention:
            yield

    def take(self) -> Cost:
        """The cost since the last call; the next part's peak starts at what is alive now."""
        now = (self.products.matmul, self.products.conv, self.attention.macs)
        matmul, conv, attention = (b - a for a, b in zip(self._before, now, strict=True))
        cost = Cost(matmul // 2 + attention, conv // 2, self.live.peak, attention)
        self._before, self.live.peak = now, self.live.live
        return cost


@torch.no_grad()
def count(call: Callable[[], object]) -> Cost:
    """Count one call, on whatever device its tensors are; on "meta" it costs no memory."""
    counter = _Counter()
    with counter.running():
        call()
    return counter.take()


@torch.enable_grad()
def count_gradient(
    call: Callable[[], Tensor], inputs: Tensor | list[Tensor], modules: Iterable[nn.Module]
) -> GradientCost:
    """Count `call()` and the backward pass from its result to `inputs`.

    Only those inputs and weights that ask for gradients lead to work: freeze the modules for the
    cost of an attack. Every `inputs` tensor must ask for one. Gradients of `inputs` are thrown
    away, and other leaves get none.

    Args:
        call: gives a tensor of any shape that depends on `inputs`.
        inputs: leaf tensors.
        modules: whose weights are no activations.
    """
    counter = _Counter()
    with counter.running():
        with saved_for_backward(modules) as saved:
            result = call()
        forward = counter.take()
        torch.autograd.grad(result, inputs, torch.empty_like(result))
        backward = counter.take()
    return GradientCost(forward, backward, saved.elements)


@torch.enable_grad()
def count_vjp(run: Callable[[Callable[[Tensor], Tensor]], object]) -> GradientCost:
    """Count a vector-Jacobian product that makes its own passes, as those of `Codec` do.

    Args:
        run: is given `cotangent`, calls it once with the result of its forward pass, and pulls
            what that returns back.
    """
    counter, passed = _Counter(), []

    def cotangent(result: Tensor) -> Tensor:
        passed.append((counter.take(), counter.live.live - result.numel()))
        return torch.empty_like(result)

    with counter.running():
        run(cotangent)
    ((forward, kept),) = passed
    return GradientCost(forward, counter.take(), kept)


def parameter_count(module: nn.Module) -> int:
    """Parameters, each shared one counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Rates:
    """Measured multiply-accumulates a second of this machine.

    Attributes:
        matmul: a 1024 x 1024 matrix product.
        conv: a 3 x 3 convolution of 64 channels on 64 x 64.
    """

    matmul: float
    conv: float

    def seconds(self, *costs: Cost) -> float:
        """Estimated seconds of some calls together, memory traffic left out."""
        matmul = sum(cost.matmul_macs for cost in costs)
        return matmul / self.matmul + sum(cost.conv_macs for cost in costs) / self.conv


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
