"""Stable Diffusion XL: a U-Net told pooled text and picture sizes too (Podell et al. 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkit.models.conditioner import Conditioning
from diffkit.models.families import Family
from diffkit.models.families.unet import (
    LORA_TARGETS,
    add,
    checkpoint,
    guidance_embedding,
    inputs,
    tap,
    tap_names,
)


def _call(
    model: Any, z_t: Tensor, t: Tensor, cond: Conditioning, guidance: Tensor | None
) -> Tensor:
    output: Tensor = model(
        z_t,
        t,
        encoder_hidden_states=cond.tokens,
        timestep_cond=guidance_embedding(model, guidance, z_t.dtype),
        added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": cond.time_ids},
        return_dict=False,
    )[0]
    return output


def _encode(pipeline: Any, prompts: list[str]) -> Conditioning:
    device = pipeline.text_encoder_2.device
    tokens, _, pooled, _ = pipeline.encode_prompt(
        prompts, device=device, do_classifier_free_guidance=False
    )
    return Conditioning(tokens=tokens, pooled=pooled)


def _encode_null(pipeline: Any) -> Conditioning:
    empty = _encode(pipeline, [""])
    if not pipeline.config.force_zeros_for_empty_prompt:
        return empty
    assert empty.tokens is not None and empty.pooled is not None
    return Conditioning(torch.zeros_like(empty.tokens), torch.zeros_like(empty.pooled))


FAMILY = Family(
    name="Stable Diffusion XL",
    denoiser="unet",
    text_components=("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"),
    pipelines={
        "text2image": "StableDiffusionXLPipeline",
        "image2image": "StableDiffusionXLImg2ImgPipeline",
        "inpaint": "StableDiffusionXLInpaintPipeline",
    },
    aliases=(),
    capabilities=frozenset(
        {"lora", "cfg", "guidance_embedding", "taps", "kohya", "micro_conditioning"}
    ),
    lora_targets=LORA_TARGETS,
    guidance_scale=5.0,
    call=_call,
    encode_prompts=_encode,
    encode_null=_encode_null,
    tap_names=tap_names,
    tap=tap,
    inputs=inputs,
    add=add,
    checkpoint=checkpoint,
)
