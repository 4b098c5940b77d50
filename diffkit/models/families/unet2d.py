"""What U-Nets without text share, those of pixels and of latents (diffusers' `UNet2DModel`).

With `num_class_embeds` the network is conditioned on labels, one embedding row each, the last of
them being the null class where the model folder says so (see `diffkit.models.classes`). Stock
pipelines of these networks pass no labels; diffkit samples them in its own loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.classes import Classes, parse_names
from diffkit.models.conditioner import Conditioning
from diffkit.models.families import Geometry

__all__ = ["call", "classes", "geometry", "tap_names"]


def call(model: Any, z_t: Tensor, t: Tensor, cond: Conditioning, guidance: Tensor | None) -> Tensor:
    """The network's output; the first half of it where it predicts a variance too."""
    if guidance is not None:
        raise UserError("U-Nets without text have no guidance embedding.")
    labels = None if model.class_embedding is None else cond.labels
    output: Tensor = model(z_t, t, class_labels=labels, return_dict=False)[0]
    learns_variance = output.shape[1] == 2 * z_t.shape[1]
    return output.chunk(2, dim=1)[0] if learns_variance else output


def classes(pipeline: Any, stored: Mapping[str, Any]) -> Classes:
    """Rows of the label embedding less the null class; none for an unconditional network.

    Raises `UserError` for another kind of label embedding, and for a null class that is not the
    last row.
    """
    config = pipeline.unet.config
    rows, null = config.num_class_embeds, stored.get("null_class")
    if config.class_embed_type is not None:
        raise UserError(f"UNet2DModel: class_embed_type {config.class_embed_type!r} has no labels.")
    if config.time_embedding_type == "fourier" and hasattr(
        pipeline.scheduler, "precondition_noise"
    ):
        raise UserError(
            "UNet2DModel: time_embedding_type 'fourier' takes the logarithm of a time, which is "
            "negative for an EDM scheduler; EDM needs 'positional'."
        )
    if rows is None:
        return Classes(0)
    if null is not None and null != rows - 1:
        raise UserError(
            f"null_class: {null} is not the last of the network's {rows} label rows, {rows - 1}."
        )
    count = rows if null is None else rows - 1
    return Classes(count, null, parse_names(stored.get("id2label"), count))


def geometry(model: Any) -> Geometry:
    """Sides of latents are multiples of 2^(levels - 1): `UNet2DModel` restores no odd sizes."""
    config = model.config
    sample = config.sample_size
    if sample is None:
        raise UserError("UNet2DModel: its config names no sample_size.")
    height, width = sample if isinstance(sample, (list, tuple)) else (sample, sample)
    return Geometry(config.in_channels, 2 ** (len(config.block_out_channels) - 1), (height, width))


def tap_names(model: nn.Module) -> tuple[str, ...]:
    """down_blocks.i, mid_block if there is one, and up_blocks.i, in the order of computation."""
    downs = tuple(f"down_blocks.{i}" for i in range(len(model.down_blocks)))  # type: ignore[arg-type]
    ups = tuple(f"up_blocks.{i}" for i in range(len(model.up_blocks)))  # type: ignore[arg-type]
    return (*downs, *(("mid_block",) if model.mid_block is not None else ()), *ups)
