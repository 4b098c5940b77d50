"""What differs between model classes: one table of functions each, and what it can do.

Only this folder knows a diffusers model class. To add a family, write one module that exports
`FAMILY` and name it in `_MODULES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioning

__all__ = ["Capability", "Family", "PipelineKind", "families", "family_of"]

PipelineKind = Literal["text2image", "image2image", "inpaint"]
Capability = Literal["lora", "cfg", "guidance_embedding", "taps", "micro_conditioning", "kohya"]

_MODULES = ("sd", "sdxl", "sd3")


@dataclass(frozen=True)
class Family:
    """One diffusers model class as a table.

    Attributes:
        name: the family's name in messages.
        denoiser: component name of the denoiser in the pipeline, "unet" or "transformer".
        text_components: component names of tokenizers and text encoders.
        pipelines: stock pipeline class names by kind.
        aliases: further pipeline class names whose checkpoints belong to this family.
        capabilities: what the model class can do.
        lora_targets: module-name endings that LoRA adapts by default.
        guidance_scale: the usual `guidance_scale`, diffusers' convention.
        call: (model, z_t, t (B,), conditioning, guidance (B,) or None) -> raw output (B, C, h, w).
        encode_prompts: (pipeline, prompts) -> Conditioning without sizes.
        encode_null: pipeline -> the unconditional Conditioning, batch of one.
        tap_names: model -> the names of the blocks whose output can be read.
        prompt_limits: tokens that the pipeline reads of a prompt, by tokenizer name, where that is
            not the tokenizer's own `model_max_length`.
    """

    name: str
    denoiser: Literal["unet", "transformer"]
    text_components: tuple[str, ...]
    pipelines: Mapping[PipelineKind, str]
    aliases: tuple[str, ...]
    capabilities: frozenset[Capability]
    lora_targets: tuple[str, ...]
    guidance_scale: float
    call: Callable[[nn.Module, Tensor, Tensor, Conditioning, Tensor | None], Tensor]
    encode_prompts: Callable[[Any, list[str]], Conditioning]
    encode_null: Callable[[Any], Conditioning]
    tap_names: Callable[[nn.Module], tuple[str, ...]]
    prompt_limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def micro_conditioning(self) -> bool:
        """True when the denoiser is told picture sizes (SDXL)."""
        return "micro_conditioning" in self.capabilities

    def require(self, capability: Capability) -> None:
        """Raise `UserError` by name when this family lacks `capability`."""
        if capability not in self.capabilities:
            has = ", ".join(sorted(self.capabilities))
            raise UserError(
                f"{self.name} models have no {capability!r} capability (they have {has})."
            )

    def pipeline_class(self, kind: PipelineKind) -> Any:
        """The stock diffusers class of this kind, or `UserError` when there is none."""
        import diffusers

        if kind not in self.pipelines:
            raise UserError(f"{self.name} models have no {kind} pipeline in diffusers.")
        return getattr(diffusers, self.pipelines[kind])


def families() -> tuple[Family, ...]:
    """All families, in the order of their introduction."""
    names = (f"{__name__}.{name}" for name in _MODULES)
    return tuple(importlib.import_module(name).FAMILY for name in names)


def family_of(pipeline_class: str) -> Family:
    """The family whose checkpoints have this pipeline class name in their model_index.json.

    Raises `UserError` naming the classes that are known.
    """
    known: list[str] = []
    for family in families():
        names = (*family.pipelines.values(), *family.aliases)
        if pipeline_class in names:
            return family
        known.extend(names)
    raise UserError(
        f"{pipeline_class}: diffkit does not know this pipeline class. It knows {', '.join(known)}."
    )
