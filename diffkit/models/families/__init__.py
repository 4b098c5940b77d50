"""What differs between model classes: one table of functions each, and what it can do.

Only this folder knows a diffusers model class. To add a family, write one module that exports
`FAMILY` and name it in `_MODULES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.classes import Classes
from diffkit.models.conditioner import Conditioning
from diffkit.models.schedule import FlowSpacing

__all__ = [
    "BlockInput",
    "Capability",
    "Family",
    "Geometry",
    "PipelineKind",
    "families",
    "family_of",
    "tap_output",
]

PipelineKind = Literal["text2image", "image2image", "inpaint", "class2image", "unconditional"]
Capability = Literal[
    "lora", "cfg", "guidance_embedding", "taps", "micro_conditioning", "kohya", "labels"
]

_MODULES = (
    "sd",
    "sdxl",
    "sd3",
    "flux",
    "pixart",
    "pixart_sigma",
    "dit",
    "pixel_unet",
    "latent_unet",
)


@dataclass(frozen=True)
class Geometry:
    """What a denoiser's config says of the latents (B, C, h, w) that it takes.

    Attributes:
        channels: C of its input; more than the codec's where a mask goes in too.
        patch: latent pixels along one side of a token; for a U-Net what its latents' sides have to
            be multiples of.
        sample: (h, w) that it was trained at.
        largest: the largest latent side, None where there is no limit.
    """

    channels: int
    patch: int
    sample: tuple[int, int]
    largest: int | None = None


@dataclass(frozen=True)
class BlockInput:
    """Where something can be added inside a denoiser.

    Attributes:
        name: of the place.
        channels: of what goes in there.
        factor: by how much its sides are smaller than those of the latents.
    """

    name: str
    channels: int
    factor: int


def tap_output(model: nn.Module, name: str, keep: Callable[[Tensor], None]) -> Any:
    """Let every call hand the output of the block `name` to `keep`; returns the hook's handle."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        # U-Net down blocks return (state, skips), joint transformer blocks (text, image).
        last = output[-1] if isinstance(output, tuple) and torch.is_tensor(output[-1]) else output
        keep(last[0] if isinstance(last, tuple) else last)

    return model.get_submodule(name).register_forward_hook(hook)


def _geometry(model: Any) -> Geometry:
    config = model.config
    patch, sample = config.get("patch_size") or 1, config.sample_size
    height, width = sample if isinstance(sample, (list, tuple)) else (sample, sample)
    positions = config.get("pos_embed_max_size")
    largest = positions * patch if positions else None
    return Geometry(config.in_channels, patch, (height, width), largest)


def _same(family: Family, model: Any) -> Family:
    return family


def _ready(model: Any) -> None:
    pass


def _unpacked(latents: Tensor) -> Tensor:
    return latents


def _no_inputs(model: nn.Module) -> tuple[BlockInput, ...]:
    return ()


def _add_nowhere(model: nn.Module, name: str, tensor: Tensor) -> Any:
    raise UserError(f"nothing can be added at {name!r} of this network.")


def _no_rules() -> str:
    return ""


def _guidance_arguments(family: Family, guidance: float, negatives: list[str]) -> dict[str, Any]:
    arguments: dict[str, Any] = {"guidance_scale": guidance}
    # SDXL takes an empty negative prompt for a text, and its absence for the zeros that it was
    # trained with.
    if guidance > 1 and any(negatives):
        arguments["negative_prompt"] = negatives
    return arguments


@dataclass(frozen=True)
class Family:
    """One diffusers model class as a table.

    Attributes:
        name: the family's name in messages.
        denoiser: component name of the denoiser in the pipeline, "unet" or "transformer".
        text_components: component names of tokenizers and text encoders.
        pipelines: stock pipeline class names by kind; a model is loaded as the first.
        aliases: further pipeline class names whose checkpoints belong to this family.
        capabilities: what the model class can do.
        lora_targets: module-name endings that LoRA adapts by default.
        guidance_scale: the usual `guidance_scale`, diffusers' convention.
        steps: the usual number of sampling steps.
        call: (model, z_t, t (B,), conditioning, guidance (B,) or None) -> raw output (B, C, h, w).
        encode_prompts: (pipeline, prompts) -> Conditioning without sizes; None without text.
        encode_null: pipeline -> the unconditional Conditioning, batch of one; None without text.
        tap_names: model -> the names of the features that can be read.
        tap: (model, name, keep) -> the handle of a hook that hands the feature of every call to
            `keep`.
        inputs: model -> where something can be added inside; none for most.
        add: (model, name, tensor) -> the handle of a hook that adds the tensor there in every call.
        prompt_limits: tokens that the pipeline reads of a prompt, by tokenizer name, where that is
            not the tokenizer's own `model_max_length`.
        prompt_rules: () -> in words, what happens to a prompt before the tokenizer where that is
            not the same on every machine; a part of digests and cache keys.
        checkpoint: (family, model) -> the table as it holds for this one network, see `of`.
        geometry: model -> what latents it takes.
        pack: latents (B, C, h, w) -> as the loop of the stock pipelines holds them.
        pipeline_arguments: (family, guidance scale, negative prompts) -> what the stock pipelines
            are given for them, and for the choices in which diffkit differs from their defaults.
        flow_spacing: the sampling times of the stock pipelines, see `Schedule.from_scheduler`.
        train_guidance: the scale that a network with a guidance embedding is told in plain
            denoising training; None where such a network is not to be trained so.
        codec: component name of the autoencoder, None for models of pixels.
        classes: (pipeline, `id2label` and `null_class` of the folder) -> what labels the network
            knows; None for models conditioned on text.
        prepare: changes the network so that all its randomness is the caller's.
        square: it makes square pictures only.
        siblings: further stock pipeline classes of the same components, loaded as themselves.
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
    encode_prompts: Callable[[Any, list[str]], Conditioning] | None
    encode_null: Callable[[Any], Conditioning] | None
    tap_names: Callable[[nn.Module], tuple[str, ...]]
    tap: Callable[[nn.Module, str, Callable[[Tensor], None]], Any] = tap_output
    inputs: Callable[[nn.Module], tuple[BlockInput, ...]] = _no_inputs
    add: Callable[[nn.Module, str, Tensor], Any] = _add_nowhere
    steps: int = 25
    prompt_limits: Mapping[str, int] = field(default_factory=dict)
    prompt_rules: Callable[[], str] = _no_rules
    checkpoint: Callable[[Family, Any], Family] = _same
    geometry: Callable[[Any], Geometry] = _geometry
    pack: Callable[[Tensor], Tensor] = _unpacked
    pipeline_arguments: Callable[[Family, float, list[str]], dict[str, Any]] = _guidance_arguments
    flow_spacing: FlowSpacing = "scheduler"
    train_guidance: float | None = None
    codec: str | None = "vae"
    classes: Callable[[Any, Mapping[str, Any]], Classes] | None = None
    prepare: Callable[[Any], None] = _ready
    square: bool = False
    siblings: tuple[str, ...] = ()

    @property
    def kind(self) -> PipelineKind:
        """The kind of stock pipeline that a model is loaded as."""
        return next(iter(self.pipelines))

    def with_classes(self, classes: Classes) -> Family:
        """This table for a network with these classes: its name, its capabilities, its guidance."""
        labels, guided = classes.count > 0, classes.null is not None
        more: set[Capability] = {"labels"} if labels else set()
        return replace(
            self,
            name=f"{'class-conditional' if labels else 'unconditional'} {self.name}",
            capabilities=self.capabilities | more | ({"cfg"} if guided else set()),
            guidance_scale=self.guidance_scale if guided else 1.0,
        )

    def of(self, model: nn.Module) -> Family:
        """This table for one network: the capabilities and defaults that its config leaves it."""
        return self.checkpoint(self, model)

    @property
    def takes_guidance(self) -> bool:
        """True when the network is told the guidance scale (only after `of`)."""
        return "guidance_embedding" in self.capabilities

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

    def loader(self, class_name: str) -> Any:
        """The stock class that a folder is loaded with whose index names `class_name`."""
        import diffusers

        if class_name in self.siblings:
            return getattr(diffusers, class_name)
        return self.pipeline_class(self.kind)


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
        names = (*family.pipelines.values(), *family.aliases, *family.siblings)
        if pipeline_class in names:
            return family
        known.extend(names)
    raise UserError(
        f"{pipeline_class}: diffkit does not know this pipeline class. It knows {', '.join(known)}."
    )
