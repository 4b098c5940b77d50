"""Losses whose gradient is made in the forward pass, so that nothing of them waits beside a graph.

A loss through a frozen decoder that sits behind the denoiser keeps its activations until the
denoiser's backward pass has come, all samples at once. But a value a sample needs nothing of what
is behind it: its gradient in its own input can be made at once, and the chain rule

    dL/dx_b = (dL/dvalue_b) (dvalue_b/dx_b)

asks for one number a sample later on. So every sample's network runs forwards and backwards by
itself, and only a tensor of the input's shape is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["eager", "eager_sum", "eager_terms", "uncompiled", "without_autocast"]

Terms = tuple[Tensor, ...]
P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which torch.compile leaves alone, with all that it calls.

    For losses through a decoder: gradients that are taken at once cannot be traced, and a trace
    would take the whole decoder into the graph, anew for every number of samples.
    """
    kept: Callable[P, R] = torch.compiler.disable(function)
    return kept


def eager(
    function: Callable[..., Tensor], x: Tensor, *others: Tensor | None, chunk: int = 1
) -> Tensor:
    """function(x, *others), (B,), that keeps for its backward pass its gradient in x alone.

    Values and gradients are those of the plain call, up to rounding; there are no second
    derivatives. The function runs under the caller's autocast, its backward pass outside, like that
    of a training step. Where no gradient is asked for, only values are computed.

    Arguments:
        function: one value a sample, (b, ...), ... -> (b,), which depends on its own sample only.
            It may use checkpoints. Nothing but `x` gets a gradient through it.
        x: (B, ...), B at least 1.
        others: (B, ...), what else belongs to each sample, or None; taken apart along with `x`.
        chunk: samples that run at once.
    """
    return eager_terms(lambda *parts: (function(*parts),), x, *others, chunk=chunk)[0]


def eager_terms(
    function: Callable[..., Terms], x: Tensor, *others: Tensor | None, chunk: int = 1
) -> Terms:
    """As `eager`, of a function that returns several tensors (b, ...).

    The gradient is that of the first, (b,); the others come back without one.
    """
    parts = _parts((x.detach(), *others), chunk)
    if not (torch.is_grad_enabled() and x.requires_grad):
        with torch.no_grad():
            return _joined([function(*part) for part in parts])
    terms: Terms = _Eager.apply(x, parts, function)
    return terms


def eager_sum(
    functions: Sequence[Callable[..., Tensor]],
    weights: Tensor,
    x: Tensor,
    *others: Tensor | None,
    chunks: Sequence[int | None],
) -> Terms:
    """A weighted sum of several losses of one tensor, with the gradient of each told apart.

        total_b = sum_k weights_k f_k(x_b, ...),    squares_kb = |d f_k(x_b, ...) / d x_b|^2

    As in `eager`, each loss runs forwards and backwards at once and is then forgotten, and only
    `x` gets a gradient, from `total`. A weight of 0 keeps the gradient of its loss out altogether,
    be it infinite.

    Arguments:
        functions: f_k: one value a sample, (b, ...), ... -> (b,), see `eager`.
        weights: (K,), constants.
        x: (B, ...), B at least 1.
        others: (B, ...), what else belongs to each sample, or None; taken apart along with `x`.
        chunks: for each loss, the samples that run at once; None for all.

    Returns:
        total (B,), with its gradient; values (K, B) and squares (K, B), without one, in at least
        float32. Where no gradient is asked for, squares are 0.
    """
    tensors = (x.detach(), *others)
    parts = [_parts(tensors, len(x) if size is None else size) for size in chunks]
    if torch.is_grad_enabled() and x.requires_grad:
        found: Terms = _EagerSum.apply(x, weights, parts, tuple(functions))
        return found
    with torch.no_grad():
        pairs = zip(functions, parts, strict=True)
        values = torch.stack([_joined([(f(*part),) for part in p])[0] for f, p in pairs])
    return _weighted(weights, values), values, torch.zeros_like(values)


def _parts(tensors: Sequence[Tensor | None], chunk: int) -> list[tuple[Any, ...]]:
    rows = range(0, len(tensors[0]), chunk)  # type: ignore[arg-type]
    return [tuple(None if t is None else t[i : i + chunk] for t in tensors) for i in rows]


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """sum_k w_k v_k over the first dimension, where a weight of 0 leaves its values out."""
    each = weights.to(values).view(-1, *(1 for _ in values.shape[1:]))
    return torch.where(each == 0, 0.0, each * values).sum(0)


class _EagerSum(torch.autograd.Function):
    """Values of all losses and the weighted sum of their gradients, loss by loss."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        parts: list[list[tuple[Any, ...]]],
        functions: tuple[Callable[..., Tensor], ...],
    ) -> Terms:
        total = torch.zeros_like(x)
        values, squares = [], []
        for weight, own, function in zip(weights.to(x).unbind(), parts, functions, strict=True):
            found = [_with_gradient(lambda *p, f=function: (f(*p),), part) for part in own]
            grad = torch.cat([grad for _, grad in found])
            total += torch.where(weight == 0, 0.0, weight * grad)
            values.append(torch.cat([terms[0] for terms, _ in found]))
            wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
            squares.append(wide.flatten(1).square().sum(1))
        ctx.save_for_backward(total)
        stacked = torch.stack(values), torch.stack(squares)
        ctx.mark_non_differentiable(*stacked)
        return _weighted(weights, stacked[0]), *stacked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (own,) = ctx.saved_tensors
        each = grads[0].to(own).view(-1, *(1 for _ in own.shape[1:]))
        return own * each, None, None, None


class _Eager(torch.autograd.Function):
    """The values; each chunk's gradient is made, and its graph freed, before the next one runs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: list[tuple[Any, ...]], function: Callable[..., Terms]
    ) -> Terms:
        found, grads = [], []
        for part in parts:
            terms, grad = _with_gradient(function, part)
            found.append(terms)
            grads.append(grad)
        ctx.save_for_backward(torch.cat(grads))
        joined = _joined(found)
        ctx.mark_non_differentiable(*joined[1:])
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (own,) = ctx.saved_tensors
        each = grads[0].to(own).view(-1, *(1 for _ in own.shape[1:]))
        return own * each, None, None


def _with_gradient(function: Callable[..., Terms], part: tuple[Any, ...]) -> tuple[Terms, Tensor]:
    """The terms of one chunk without their graph, which ends here, and the first's gradient.

    Under autocast to float16 the backward pass is that of the loss times 2^12, for which no
    gradient scaler cares here: gradients of means over many places would be lost on the way.
    """
    start = part[0].detach().requires_grad_()
    device = start.device.type
    scale = 4096.0 if _half_precision(device) else 1.0
    with torch.enable_grad():
        terms = function(start, *part[1:])
        total = terms[0].sum() * scale
    with without_autocast(device):
        (grad,) = torch.autograd.grad(total, start)
    return tuple(term.detach() for term in terms), grad / scale


def _half_precision(device: str) -> bool:
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return False
    return torch.get_autocast_dtype(device) == torch.float16


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """No autocast on devices of this type; nothing where there is none, as on "meta"."""
    # Within it some backward operations (products of attention) would be cast down anew, whatever
    # the dtype of the forward ones.
    if not torch.amp.is_autocast_available(device):  # meta
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _joined(parts: list[Terms]) -> Terms:
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
