"""PixArt-alpha: a transformer with cross-attention to T5 tokens (Chen et al. 2023).

The network predicts eps and a variance that no stock sampler reads: its output has twice the
latent channels, of which the first half is the prediction. Training leaves the second half alone.

The 1024-pixel checkpoints of alpha are told the picture's size and aspect ratio; the others and
Sigma are not. Captions are cleaned as in the stock pipelines' default: by their `_clean_caption`
where its packages, beautifulsoup4 and ftfy, are installed, else lower-cased and stripped.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor, nn

from diffkit import console
from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioning
from diffkit.models.families import Family


def _call(
    model: Any, z_t: Tensor, t: Tensor, cond: Conditioning, guidance: Tensor | None
) -> Tensor:
    if guidance is not None:
        raise UserError("PixArt has no guidance embedding.")
    output: Tensor = model(
        z_t,
        encoder_hidden_states=cond.tokens,
        encoder_attention_mask=cond.mask,
        timestep=t,
        added_cond_kwargs=_sizes(cond.time_ids, z_t),
        return_dict=False,
    )[0]
    learns_variance = model.config.out_channels == 2 * model.config.in_channels
    return output.chunk(2, dim=1)[0] if learns_variance else output


def _sizes(time_ids: Tensor | None, z_t: Tensor) -> dict[str, Tensor | None]:
    """The (height, width) that the picture has now, and their ratio; not the original picture's."""
    if time_ids is None:
        return {"resolution": None, "aspect_ratio": None}
    size = time_ids[:, 4:].float()
    ratio = size[:, :1] / size[:, 1:]
    return {"resolution": size.to(z_t.dtype), "aspect_ratio": ratio.to(z_t.dtype)}


@cache
def _cleans() -> bool:
    """True where the stock pipelines can clean captions."""
    from diffusers.utils import is_bs4_available, is_ftfy_available

    if is_bs4_available() and is_ftfy_available():
        return True
    console.warn(
        "PixArt was trained on cleaned captions; without beautifulsoup4 and ftfy they are only "
        "lower-cased, as in the stock pipeline: pip install beautifulsoup4 ftfy"
    )
    return False


def _rules() -> str:
    return "cleaned captions" if _cleans() else "lower-cased captions"


def _encode(pipeline: Any, prompts: list[str]) -> Conditioning:
    tokens, mask, _, _ = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        device=pipeline.text_encoder.device,
        clean_caption=_cleans(),
    )
    return Conditioning(tokens=tokens, mask=mask)


def _encode_null(pipeline: Any) -> Conditioning:
    return _encode(pipeline, [""])


def _checkpoint(family: Family, model: Any) -> Family:
    if model.use_additional_conditions:
        return family
    return replace(family, capabilities=family.capabilities - {"micro_conditioning"})


def _arguments(family: Family, guidance: float, negatives: list[str]) -> dict[str, Any]:
    return {
        "guidance_scale": guidance,
        "negative_prompt": negatives,
        "clean_caption": _cleans(),
        # Binning would make a picture of another size and scale it to the one asked for.
        "use_resolution_binning": False,
    }


def _tap_names(model: nn.Module) -> tuple[str, ...]:
    count = len(model.transformer_blocks)  # type: ignore[arg-type]
    return tuple(f"transformer_blocks.{i}" for i in range(count))


FAMILY = Family(
    name="PixArt-alpha",
    denoiser="transformer",
    text_components=("tokenizer", "text_encoder"),
    pipelines={"text2image": "PixArtAlphaPipeline"},
    aliases=(),
    # No "lora": diffusers has no loader for it, so that a file would load nowhere.
    capabilities=frozenset({"cfg", "taps", "micro_conditioning"}),
    lora_targets=(),
    guidance_scale=4.5,
    call=_call,
    encode_prompts=_encode,
    encode_null=_encode_null,
    tap_names=_tap_names,
    prompt_limits={"tokenizer": 120},  # max_sequence_length of the pipeline
    prompt_rules=_rules,
    checkpoint=_checkpoint,
    pipeline_arguments=_arguments,
)
