"""A VAE's encoder and decoder as a chain of named stages.

Decoder: mid, up_0, ..., up_k, out. Encoder: in, down_0, ..., down_k, mid, out. A stage is a list of
units (one convolution, ResNet block, attention or resampler); running every unit in order is the
network's own forward pass, operation by operation. What decides memory is where the chain is cut:
activations are kept at the cuts and recomputed between them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from diffkit.errors import UserError

__all__ = [
    "Checkpoint",
    "Stage",
    "chain_vjp",
    "cuts",
    "decoder_stages",
    "encoder_stages",
    "run",
    "up_receptive_field",
    "without_float16",
]

Checkpoint = Literal["block", "resnet"] | None
Unit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stage:
    """One named part of the chain; its output is the feature of that name."""

    name: str
    units: tuple[Unit, ...]

    def __call__(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return x


def decoder_stages(vae: Any) -> tuple[Stage, ...]:
    """The stages of an `AutoencoderKL`'s decoder: mid, up_0, ..., up_k, out.

    `mid` begins with `post_quant_conv` where the model has one; `out` gives the image.
    """
    decoder = vae.decoder
    first = _sequence([vae.post_quant_conv, decoder.conv_in])
    last = _sequence([decoder.conv_norm_out, decoder.conv_act, decoder.conv_out])
    ups = [Stage(f"up_{i}", _block_units(block)) for i, block in enumerate(decoder.up_blocks)]
    return (
        Stage("mid", (first, *_mid_units(decoder.mid_block))),
        *ups,
        Stage("out", (last,)),
    )


def encoder_stages(vae: Any) -> tuple[Stage, ...]:
    """The stages of an `AutoencoderKL`'s encoder: in, down_0, ..., down_k, mid, out.

    `out` ends with `quant_conv` where the model has one and gives the moments (B, 2C, h, w).
    """
    encoder = vae.encoder
    head = [encoder.conv_norm_out, encoder.conv_act, encoder.conv_out, vae.quant_conv]
    downs = [Stage(f"down_{i}", _block_units(b)) for i, b in enumerate(encoder.down_blocks)]
    return (
        Stage("in", (encoder.conv_in,)),
        *downs,
        Stage("mid", _mid_units(encoder.mid_block)),
        Stage("out", (_sequence(head),)),
    )


@contextlib.contextmanager
def without_float16(device: str) -> Iterator[None]:
    """Switch float16 autocast off: activations of some VAEs (SDXL's) overflow in it.

    The networks then compute in the dtype of their weights; bfloat16 autocast, which has float32's
    range, stays on.
    """
    half = (
        torch.amp.is_autocast_available(device)  # the meta device has none
        and torch.is_autocast_enabled(device)
        and torch.get_autocast_dtype(device) == torch.float16
    )
    with torch.autocast(device, enabled=False) if half else contextlib.nullcontext():
        yield


def cuts(stages: Sequence[Stage], checkpoint: Checkpoint) -> list[Unit]:
    """The pieces between two kept activations: all in one (None), one a stage, or one a unit."""
    if checkpoint is None:
        return [_compose(stages)]
    if checkpoint == "block":
        return list(stages)
    if checkpoint == "resnet":
        return list(chain.from_iterable(stage.units for stage in stages))
    raise UserError(f"checkpoint={checkpoint!r} is unknown; use None, 'block' or 'resnet'")


def run(stages: Sequence[Stage], x: Tensor, checkpoint: Checkpoint = None) -> Tensor:
    """Run the chain, never in float16 autocast. With `checkpoint`, autograd keeps only the input of
    every piece.

    Output and gradients are those of the plain run. The networks draw no random numbers, so no
    random state is kept.
    """
    pieces = cuts(stages, checkpoint)
    with without_float16(x.device.type):
        for piece in pieces:
            if checkpoint is None or not torch.is_grad_enabled():
                x = piece(x)
            else:
                x = torch_checkpoint(piece, x, use_reentrant=False, preserve_rng_state=False)
    return x


def chain_vjp(
    pieces: Sequence[Unit], x: Tensor, cotangent: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Output y of the chain and J^T c at x, where c = cotangent(y), in two passes.

    Pass one runs without a graph and keeps the input of every piece; pass two goes backwards and
    builds the graph of one piece at a time, so the peak is the inputs plus one piece's graph.
    Parameters get no gradient.
    """
    inputs = [x.detach()]
    with torch.no_grad(), without_float16(x.device.type):
        for piece in pieces:
            inputs.append(piece(inputs[-1]))
    y = inputs.pop()
    grad = cotangent(y).to(y.dtype)
    with without_float16(x.device.type):
        for piece in reversed(pieces):
            start = inputs.pop().requires_grad_()
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(piece(start), start, grad)
    return y, grad


def up_receptive_field(vae: Any) -> int:
    """Latent pixels beyond which nothing reaches an output pixel through the decoder's up path.

    The sum over all 3x3 convolutions after the mid block of 1 / (their resolution / latent
    resolution), rounded up. GroupNorm statistics are global and not counted.
    """
    total, scale = 0.0, 1
    for block in vae.decoder.up_blocks:
        total += 2 * len(block.resnets) / scale
        if block.upsamplers is not None:
            scale *= 2
            total += 1 / scale
    return math.ceil(total + 1 / scale)


def _compose(stages: Sequence[Stage]) -> Unit:
    return Stage("all", tuple(chain.from_iterable(stage.units for stage in stages)))


def _sequence(modules: Iterable[nn.Module | None]) -> Unit:
    return Stage("sequence", tuple(module for module in modules if module is not None))


def _mid_units(block: Any) -> tuple[Unit, ...]:
    units = [_resnet(block.resnets[0])]
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            units.append(attention)
        units.append(_resnet(resnet))
    return tuple(units)


def _block_units(block: Any) -> tuple[Unit, ...]:
    """ResNets, each followed by its attention where the block has any, then the resamplers."""
    attentions = getattr(block, "attentions", None)
    units: list[Unit] = []
    for i, resnet in enumerate(block.resnets):
        units.append(_resnet(resnet))
        if attentions is not None:
            units.append(attentions[i])
    units.extend(getattr(block, "upsamplers", None) or ())
    units.extend(getattr(block, "downsamplers", None) or ())
    return tuple(units)


def _resnet(module: nn.Module) -> Unit:
    return lambda x: module(x, None)
