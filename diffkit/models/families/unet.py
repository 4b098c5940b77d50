"""What the U-Net families share: the guidance embedding and the names of their blocks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.families import Family

__all__ = ["LORA_TARGETS", "checkpoint", "guidance_embedding", "tap_names"]

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
    """down_blocks.i, mid_block and up_blocks.i, in the order of computation."""
    downs = tuple(f"down_blocks.{i}" for i in range(len(model.down_blocks)))  # type: ignore[arg-type]
    ups = tuple(f"up_blocks.{i}" for i in range(len(model.up_blocks)))  # type: ignore[arg-type]
    return (*downs, "mid_block", *ups)
