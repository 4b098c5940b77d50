"""DiT: a transformer conditioned on class labels (Peebles & Xie 2023).

The network may predict eps and a variance, of which stock samplers read eps alone: its output then
has twice the latent channels, and the first half is the prediction. Training leaves the second half
alone. Classes 0 ... K-1 and the null class K are rows of one table, `num_embeds_ada_norm` = K.

In train mode diffusers' DiT replaces labels by the null class at random, in every block by a draw
of its own. `_prepare` takes that out: the caller drops labels, once for all blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.classes import Classes, parse_names
from diffkit.models.conditioner import Conditioning
from diffkit.models.families import Family


def _call(
    model: Any, z_t: Tensor, t: Tensor, cond: Conditioning, guidance: Tensor | None
) -> Tensor:
    if guidance is not None:
        raise UserError("DiT has no guidance embedding.")
    if z_t.shape[-2] != z_t.shape[-1]:
        raise UserError(f"DiT takes square latents, not {z_t.shape[-2]}x{z_t.shape[-1]}.")
    output: Tensor = model(z_t, timestep=t, class_labels=cond.labels, return_dict=False)[0]
    learns_variance = output.shape[1] == 2 * z_t.shape[1]
    return output.chunk(2, dim=1)[0] if learns_variance else output


def _prepare(model: nn.Module) -> None:
    from diffusers.models.embeddings import LabelEmbedding

    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


def _classes(pipeline: Any, stored: Mapping[str, Any]) -> Classes:
    count = pipeline.transformer.config.num_embeds_ada_norm
    names = parse_names(stored.get("id2label"), count)
    if not names:
        words: dict[int, list[str]] = {}
        for name, number in pipeline.labels.items():  # in the order of the alphabet
            words.setdefault(number, []).append(name)
        names = {number: ", ".join(parts) for number, parts in words.items()}
    return Classes(count, count, names)


def _tap_names(model: nn.Module) -> tuple[str, ...]:
    count = len(model.transformer_blocks)  # type: ignore[arg-type]
    return tuple(f"transformer_blocks.{i}" for i in range(count))


FAMILY = Family(
    name="DiT",
    denoiser="transformer",
    text_components=(),
    pipelines={"class2image": "DiTPipeline"},
    aliases=(),
    capabilities=frozenset({"taps"}),  # the stock pipeline loads no LoRA
    lora_targets=(),
    guidance_scale=4.0,
    call=_call,
    encode_prompts=None,
    encode_null=None,
    tap_names=_tap_names,
    classes=_classes,
    prepare=_prepare,
    square=True,
)
