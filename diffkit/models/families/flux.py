"""Flux 1: a multimodal transformer trained by flow matching (Black Forest Labs 2024).

Two kinds of checkpoint share the class. FLUX.1-dev was distilled to be told the guidance scale:
`guidance_scale` is an input of the network, one call makes a step, and classifier-free guidance is
possible on top of it (`true_cfg_scale` in diffusers). FLUX.1-schnell was not: its `guidance_scale`
is that of classifier-free guidance, and it is best without any; it was distilled to four steps and
trained on shorter prompts. Any checkpoint without the guidance embedding is taken for it.

The network takes packed latents, tokens of 2 x 2 latent pixels; packing and unpacking happen here,
so that latents are (B, C, h, w) everywhere else, with h and w even.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioning
from diffkit.models.families import Family, Geometry

PATCH = 2
# The pipelines' own default, in latent pixels; the network's config does not say.
_SAMPLE = 128
# T5 tokens of a prompt: the pipelines' max_sequence_length, and what schnell was trained on.
_LENGTH, _SCHNELL_LENGTH = 512, 256


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> tokens (B, h/2 w/2, 4C), row by row; h and w are even."""
    rows = nn.functional.pixel_unshuffle(latents, PATCH)
    return rows.flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for latents of this height and width."""
    rows = tokens.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
    return nn.functional.pixel_shuffle(rows, PATCH)


def _places(height: int, width: int, device: torch.device) -> Tensor:
    """(0, row, column) of every token, (h/2 w/2, 3), for the rotary position embedding."""
    rows = torch.arange(height // PATCH, device=device)
    columns = torch.arange(width // PATCH, device=device)
    grid = torch.cartesian_prod(rows, columns).float()
    return nn.functional.pad(grid, (1, 0))


def _call(
    model: Any, z_t: Tensor, t: Tensor, cond: Conditioning, guidance: Tensor | None
) -> Tensor:
    _check_guidance(model, guidance)
    assert cond.tokens is not None
    height, width = z_t.shape[-2:]
    tokens: Tensor = model(
        hidden_states=pack(z_t),
        # The network multiplies by 1000 again.
        timestep=t.to(z_t.dtype) / 1000,
        guidance=guidance,
        encoder_hidden_states=cond.tokens,
        pooled_projections=cond.pooled,
        txt_ids=z_t.new_zeros(cond.tokens.shape[1], 3),
        img_ids=_places(height, width, z_t.device),
        return_dict=False,
    )[0]
    return unpack(tokens, height, width)


def _check_guidance(model: Any, guidance: Tensor | None) -> None:
    if model.config.guidance_embeds and guidance is None:
        raise UserError(
            "this Flux is guidance-distilled: give guidance=(B,) guidance scales (3.5 is usual)."
        )
    if guidance is not None and not model.config.guidance_embeds:
        raise UserError("this Flux has no guidance embedding (guidance_embeds is not set).")


def _encode(pipeline: Any, prompts: list[str], length: int = _LENGTH) -> Conditioning:
    tokens, pooled, _ = pipeline.encode_prompt(
        prompts, device=pipeline.text_encoder_2.device, max_sequence_length=length
    )
    return Conditioning(tokens=tokens, pooled=pooled)


def _encode_null(pipeline: Any, length: int = _LENGTH) -> Conditioning:
    return _encode(pipeline, [""], length)


def _checkpoint(family: Family, model: Any) -> Family:
    if model.config.guidance_embeds:
        return family
    return replace(
        family,
        capabilities=family.capabilities - {"guidance_embedding"},
        guidance_scale=1.0,
        steps=4,
        train_guidance=None,
        encode_prompts=partial(_encode, length=_SCHNELL_LENGTH),
        encode_null=partial(_encode_null, length=_SCHNELL_LENGTH),
        prompt_limits={"tokenizer_2": _SCHNELL_LENGTH},
    )


def _geometry(model: Any) -> Geometry:
    return Geometry(model.config.in_channels // PATCH**2, PATCH, (_SAMPLE, _SAMPLE))


def _arguments(family: Family, guidance: float, negatives: list[str]) -> dict[str, Any]:
    if family.takes_guidance:
        return {"guidance_scale": guidance}
    return {
        "true_cfg_scale": guidance,
        "negative_prompt": negatives,
        "max_sequence_length": _SCHNELL_LENGTH,
    }


def _tap_names(model: nn.Module) -> tuple[str, ...]:
    kinds = ("transformer_blocks", "single_transformer_blocks")
    return tuple(f"{kind}.{i}" for kind in kinds for i in range(len(getattr(model, kind))))


FAMILY = Family(
    name="Flux",
    denoiser="transformer",
    text_components=("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"),
    pipelines={
        "text2image": "FluxPipeline",
        "image2image": "FluxImg2ImgPipeline",
        "inpaint": "FluxInpaintPipeline",
    },
    aliases=(),
    capabilities=frozenset({"lora", "cfg", "guidance_embedding", "taps"}),
    # The default of diffusers' train_dreambooth_lora_flux.py.
    lora_targets=(
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ),
    guidance_scale=3.5,
    call=_call,
    encode_prompts=_encode,
    encode_null=_encode_null,
    tap_names=_tap_names,
    prompt_limits={"tokenizer_2": _LENGTH},
    checkpoint=_checkpoint,
    geometry=_geometry,
    pack=pack,
    pipeline_arguments=_arguments,
    flow_spacing="fractions",
    train_guidance=3.5,  # the default of diffusers' Flux training scripts
)
