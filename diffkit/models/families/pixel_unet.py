"""U-Nets of pixels, unconditional or class-conditional (Ho et al. 2020; Karras et al. 2022)."""

from __future__ import annotations

from diffkit.models.families import Family
from diffkit.models.families.unet2d import call, classes, geometry, tap_names

FAMILY = Family(
    name="pixel U-Net",
    denoiser="unet",
    text_components=(),
    pipelines={"unconditional": "DDPMPipeline"},
    aliases=(),
    capabilities=frozenset({"taps"}),  # the stock pipelines load no LoRA
    lora_targets=(),
    guidance_scale=2.0,
    call=call,
    encode_prompts=None,
    encode_null=None,
    tap_names=tap_names,
    geometry=geometry,
    codec=None,
    classes=classes,
    siblings=("DDIMPipeline",),
)
