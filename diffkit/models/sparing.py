"""Forward passes through frozen convolutional networks that keep less for their backward pass.

A ResNet block runs GroupNorm, SiLU and a convolution in a row, and autograd keeps the input of each
of the three. Where the weights are frozen only the first is needed: the convolution's gradient in
its input reads its weights alone, and what SiLU reads follows from GroupNorm's input by one more
normalisation, whose cost beside the convolution's is small. So a third of the activations is left,
for no further pass of the network, unlike with checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode

__all__ = ["SparingActivations", "sparing"]

FROM = 128 * 128
"""Pixels from which a picture's activations are worth sparing."""


class SparingActivations(TorchFunctionMode):
    """Within the context, what runs with frozen weights keeps a third of its activations.

    Values and gradients are those of the plain pass, up to rounding. Layers whose weights want a
    gradient run as always. The backward pass may run outside. Not for passes that recompute blocks
    in their backward pass: those would be run again without this.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if not torch.is_grad_enabled():
            return func(*args, **named)
        if func is F.conv2d and not named and _frozen(args[1:3]):
            return _Convolution.apply(*args)
        if func is F.silu and isinstance(getattr(args[0], "normalised", None), tuple):
            return _NormSilu.apply(*args[0].normalised, args[0].detach())
        result = func(*args, **named)
        if func is F.group_norm:
            weights = (named.get("weight"), named.get("bias"))
            if len(args) == 2 and _frozen(weights):
                # SiLU looks here for what its input was made of.
                result.normalised = (*args, *weights, named.get("eps", 1e-5))
        return result


def sparing(images: Tensor) -> AbstractContextManager[Any]:
    """`SparingActivations` for an encoder's pass of these pictures (B, C, H, W), if they are large.

    In small pictures and small networks there is little to spare, and normalising again takes a
    third of the encoder's time (the embedded model at 64 pixels); at true sizes some percent.
    """
    return SparingActivations() if images[0, 0].numel() >= FROM else nullcontext()


def _frozen(weights: tuple[Tensor | None, ...]) -> bool:
    return not any(weight is not None and weight.requires_grad for weight in weights)


class _Convolution(torch.autograd.Function):
    """F.conv2d that keeps its weights and the shape of its input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *options: Any,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.options = x.shape, options
        return F.conv2d(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        g = conv2d_input(ctx.shape, weight, grad[0], *ctx.options)
        return (g, None, None, *(None for _ in ctx.options))


class _NormSilu(torch.autograd.Function):
    """SiLU(GroupNorm(x)) that keeps x; `y` is GroupNorm's result, known already."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        y: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(y)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        with torch.enable_grad():
            start = x.detach().requires_grad_()
            again = F.silu(F.group_norm(start, ctx.groups, weight, bias, ctx.eps))
        (g,) = torch.autograd.grad(again, start, grad[0])
        return g, None, None, None, None, None
