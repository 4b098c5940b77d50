"""The CLIP text encoders of a model in training: encoding with gradients, and what is read of them.

T5 and other encoders stay frozen: fine-tuning for a subject never trains them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioner, Conditioning, Sizes

__all__ = ["TEXT_TARGETS", "clip_encoders", "encode_null", "encode_prompts", "freeze_unread"]

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Endings of the attention layers of CLIP, which a LoRA adapts."""


def clip_encoders(conditioner: Conditioner) -> dict[str, nn.Module]:
    """The CLIP text encoders in memory by component name; empty for a model that has none."""
    found = {}
    for name, encoder in conditioner.encoders.items():
        config: Any = encoder.config
        if config.model_type == "clip_text_model":
            found[name] = encoder
    return found


def encode_prompts(
    conditioner: Conditioner, prompts: Sequence[str], sizes: Sequence[Sizes] | tuple[int, int]
) -> Conditioning:
    """What `Conditioner.encode` gives, with gradients to the text encoders.

    Raises `UserError` for a model without text.
    """
    encode = conditioner.family.encode_prompts
    if encode is None:
        raise UserError(f"{conditioner.family.name} models read no text.")
    return conditioner.with_sizes(encode(conditioner.pipeline, list(prompts)), sizes)


def encode_null(conditioner: Conditioner) -> Conditioning:
    """What `Conditioner.null` gives, a batch of one without sizes, with gradients.

    Raises `UserError` for a model without text.
    """
    encode = conditioner.family.encode_null
    if encode is None:
        raise UserError(f"{conditioner.family.name} models read no text.")
    return encode(conditioner.pipeline)


def freeze_unread(conditioner: Conditioner, encoders: Mapping[str, nn.Module]) -> None:
    """Freeze the trainable parameters of `encoders` that no conditioning depends on.

    SDXL, for one, reads the last layer but one of its first encoder. Data-parallel training waits
    in vain for the gradient of a parameter that has none.
    """
    encoded = [p for encoder in encoders.values() for p in encoder.parameters() if p.requires_grad]
    with torch.enable_grad():
        cond = encode_prompts(conditioner, [conditioner.example], (64, 64))
        read = [x for x in (cond.tokens, cond.pooled) if x is not None and x.requires_grad]
        gradients = torch.autograd.grad([x.float().sum() for x in read], encoded, allow_unused=True)
    for parameter, gradient in zip(encoded, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)
