"""What the U-Net families share: the guidance embedding and the names of their blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.families import BlockInput, Family, tap_output

__all__ = ["LORA_TARGETS", "add", "checkpoint", "guidance_embedding", "inputs", "tap", "tap_names"]

# Attention projections, as in the diffusers and kohya trainers' defaults.
LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


def checkpoint(family: Family, model: Any) -> Family:
    """The guidance scale is an input of the network (LCM), or is made of two calls; never both."""
    lacking = "guidance_embedding" if model.config.time_cond_proj_dim is None else "cfg"
    return replace(family, capabilities=family.capabilities - {lacking})


def guidance_embedding(model: Any, guidance: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Sinusoidal embedding (B, time_cond_proj_dim) of `guidance_scale` (Meng et al. 2023).

    With w = guidance_scale - 1: [sin(1000 w f_i), cos(1000 w f_i)], f_i = 10000^(-i / (n/2 - 1)).
    None for a model without that input; raises `UserError` when model and argument do not fit.
    """
    width = model.config.time_cond_proj_dim
    if width is None:
        if guidance is not None:
            raise UserError("this U-Net has no guidance embedding (time_cond_proj_dim is not set).")
        return None
    if guidance is None:
        raise UserError("this U-Net has a guidance embedding: give guidance=(B,) guidance scales.")
    half = width // 2
    rate = -math.log(10000.0) / (half - 1)
    frequencies = torch.exp(rate * torch.arange(half, device=guidance.device, dtype=torch.float32))
    angles = 1000.0 * (guidance.float()[:, None] - 1.0) * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return nn.functional.pad(embedding, (0, width % 2)).to(dtype)


def tap_names(model: nn.Module) -> tuple[str, ...]:
    """down_blocks.i, mid_block and of up_blocks.i four, in the order of computation.

    up_blocks.i:skip is the skip connection that comes in first, up_blocks.i:joined it and what is
    below, joined by channels, up_blocks.i:out the block's output before it is upsampled.
    """
    network: Any = model
    downs = tuple(f"down_blocks.{i}" for i in range(len(network.down_blocks)))
    parts = (":skip", ":joined", ":out", "")
    ups = tuple(f"up_blocks.{i}{part}" for i in range(len(network.up_blocks)) for part in parts)
    return (*downs, "mid_block", *ups)


def tap(model: nn.Module, name: str, keep: Callable[[Tensor], None]) -> Any:
    """Let every call hand the tensor of this name to `keep`; returns the hook's handle."""
    path, _, part = name.partition(":")
    block: Any = model.get_submodule(path)
    if part == "skip":
        return block.register_forward_pre_hook(
            lambda module, args, named: keep(named["res_hidden_states_tuple"][-1]), with_kwargs=True
        )
    if part == "joined":
        return block.resnets[0].register_forward_pre_hook(lambda module, args: keep(args[0]))
    if part == "out":
        last = (getattr(block, "attentions", None) or block.resnets)[-1]
        return tap_output(last, "", keep)
    return tap_output(block, "", keep)


def inputs(model: Any) -> tuple[BlockInput, ...]:
    """Where each level of the encoder begins; the first is behind the first convolution."""
    widths = model.config.block_out_channels
    channels = (widths[0], *widths[:-1])
    return tuple(BlockInput(f"down_blocks.{i}", width, 2**i) for i, width in enumerate(channels))


def add(model: nn.Module, name: str, tensor: Tensor) -> Any:
    """Let every call add `tensor` to that input of `inputs`; returns the hook's handle.

    What is added to the first is seen by the first skip connection too.
    """
    if name == "down_blocks.0":
        first: Any = model.conv_in
        return first.register_forward_hook(lambda module, args, output: output + tensor.to(output))

    def hook(module: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        state = named["hidden_states"]
        return args, named | {"hidden_states": state + tensor.to(state)}

    return model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
