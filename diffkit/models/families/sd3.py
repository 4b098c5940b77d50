"""Stable Diffusion 3: a multimodal transformer trained by flow matching (Esser et al. 2024)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioning
from diffkit.models.families import Family


def _call(
    model: Any, z_t: Tensor, t: Tensor, cond: Conditioning, guidance: Tensor | None
) -> Tensor:
    if guidance is not None:
        raise UserError("Stable Diffusion 3 has no guidance embedding.")
    output: Tensor = model(
        hidden_states=z_t,
        timestep=t,
        encoder_hidden_states=cond.tokens,
        pooled_projections=cond.pooled,
        return_dict=False,
    )[0]
    return output


def _encode(pipeline: Any, prompts: list[str]) -> Conditioning:
    tokens, _, pooled, _ = pipeline.encode_prompt(
        prompts,
        None,
        None,
        device=pipeline.text_encoder.device,
        do_classifier_free_guidance=False,
    )
    return Conditioning(tokens=tokens, pooled=pooled)


def _encode_null(pipeline: Any) -> Conditioning:
    return _encode(pipeline, [""])


def _tap_names(model: nn.Module) -> tuple[str, ...]:
    count = len(model.transformer_blocks)  # type: ignore[arg-type]
    return tuple(f"transformer_blocks.{i}" for i in range(count))


FAMILY = Family(
    name="Stable Diffusion 3",
    denoiser="transformer",
    text_components=(
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    ),
    pipelines={
        "text2image": "StableDiffusion3Pipeline",
        "image2image": "StableDiffusion3Img2ImgPipeline",
        "inpaint": "StableDiffusion3InpaintPipeline",
    },
    aliases=(),
    capabilities=frozenset({"lora", "cfg", "taps"}),
    lora_targets=("to_k", "to_q", "to_v", "to_out.0"),
    guidance_scale=7.0,
    call=_call,
    encode_prompts=_encode,
    encode_null=_encode_null,
    tap_names=_tap_names,
    prompt_limits={"tokenizer_3": 256},  # max_sequence_length of the pipelines
)
