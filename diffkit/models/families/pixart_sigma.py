"""PixArt-Sigma: PixArt's network with longer captions and SDXL's codec (Chen et al. 2024)."""

from __future__ import annotations

from dataclasses import replace

from diffkit.models.families import pixart

FAMILY = replace(
    pixart.FAMILY,
    name="PixArt-Sigma",
    pipelines={"text2image": "PixArtSigmaPipeline"},
    prompt_limits={"tokenizer": 300},  # max_sequence_length of the pipeline
)
