"""Stable Diffusion 1 and 2: a U-Net conditioned on CLIP tokens (Rombach et al. 2022)."""

from __future__ import annotations

from typing import Any

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
        return_dict=False,
    )[0]
    return output


def _encode(pipeline: Any, prompts: list[str]) -> Conditioning:
    device = pipeline.text_encoder.device
    tokens, _ = pipeline.encode_prompt(prompts, device, 1, do_classifier_free_guidance=False)
    return Conditioning(tokens=tokens)


def _encode_null(pipeline: Any) -> Conditioning:
    return _encode(pipeline, [""])


FAMILY = Family(
    name="Stable Diffusion",
    denoiser="unet",
    text_components=("tokenizer", "text_encoder"),
    pipelines={
        "text2image": "StableDiffusionPipeline",
        "image2image": "StableDiffusionImg2ImgPipeline",
        "inpaint": "StableDiffusionInpaintPipeline",
    },
    aliases=("LatentConsistencyModelPipeline",),
    capabilities=frozenset({"lora", "cfg", "guidance_embedding", "taps", "kohya"}),
    lora_targets=LORA_TARGETS,
    guidance_scale=7.5,
    call=_call,
    encode_prompts=_encode,
    encode_null=_encode_null,
    tap_names=tap_names,
    tap=tap,
    inputs=inputs,
    add=add,
    checkpoint=checkpoint,
)
