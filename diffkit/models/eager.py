"""Losses whose gradient is made in the forward pass, so that nothing of them waits beside a graph.

A loss through a frozen decoder that sits behind the denoiser keeps its activations until the
denoiser's backward pass has come, all samples at once. But a value a sample needs nothing of what
is behind it: its gradient in its own input can be made at once, and the chain rule

    dL/dx_b = (dL/dvalue_b) (dvalue_b/dx_b)

asks for one number a sample later on. So every sample's network runs forwards and backwards by
itself, and only a tensor of the input's shape is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["eager", "eager_terms", "uncompiled"]

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
    rows = range(0, len(x), chunk)
    parts = [
        tuple(None if tensor is None else tensor[i : i + chunk] for tensor in (x.detach(), *others))
        for i in rows
    ]
    if not (torch.is_grad_enabled() and x.requires_grad):
        with torch.no_grad():
            return _joined([function(*part) for part in parts])
    terms: Terms = _Eager.apply(x, parts, function)
    return terms


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
    """The terms of one chunk without their graph, which ends here, and the first's gradient."""
    start = part[0].detach().requires_grad_()
    with torch.enable_grad():
        terms = function(start, *part[1:])
        total = terms[0].sum()
    with _without_autocast(start.device.type):
        (grad,) = torch.autograd.grad(total, start)
    return tuple(term.detach() for term in terms), grad


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    # Within it some backward operations (products of attention) would be cast down anew, whatever
    # the dtype of the forward ones.
    if not torch.amp.is_autocast_available(device):  # meta
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _joined(parts: list[Terms]) -> Terms:
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
