"""`diffkit lora`: merge LoRAs into a model, convert LoRA files between layouts, look at one."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from diffkit.console import say, set_quiet
from diffkit.errors import UserError

if TYPE_CHECKING:
    from diffkit.models.lora_keys import LoraWeights

__all__ = ["ConvertConfig", "InfoConfig", "MergeConfig", "configs", "main"]


@dataclass(frozen=True)
class MergeConfig:
    """Add LoRAs to a model's weights and save a plain diffusers folder."""

    output: Path
    """Folder for the merged model."""

    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA as PATH or PATH:WEIGHT, a file, folder or hub id; repeat the flag for several."""

    model: str = "embedded"
    """"embedded", a diffusers folder, a single .safetensors file, or a hub id."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the saved weights; the sum is made in float32."""

    overwrite: bool = False
    """Replace a folder that exists."""

    json: bool = False
    """Print what was done as JSON on stdout, and nothing else."""


@dataclass(frozen=True)
class ConvertConfig:
    """Rewrite a LoRA file with the keys of diffusers or of kohya's trainers."""

    source: tyro.conf.Positional[str]
    """A .safetensors file, a folder or a hub id; diffusers, peft or kohya keys."""

    output: Path
    """File to write; without .safetensors at its end a folder, for the usual file name."""

    to: Literal["diffusers", "kohya"] = "diffusers"
    """Whose keys."""

    architecture: Literal["auto", "sd", "sdxl"] = "auto"
    """With --to kohya: SDXL files use other names than SD files. auto looks at the layers."""

    layers_per_block: int = 2
    """ResNet blocks in each block of the U-Net, from its config; 2 for all SD and SDXL models."""

    overwrite: bool = False
    """Replace a file that exists."""

    json: bool = False
    """Print what was done as JSON on stdout, and nothing else."""


@dataclass(frozen=True)
class InfoConfig:
    """Show what is in a LoRA file: its layout, components, ranks and alphas."""

    source: tyro.conf.Positional[str]
    """A .safetensors file, a folder or a hub id."""

    json: bool = False
    """Print it as JSON on stdout, and nothing else."""


def configs() -> dict[str, type]:
    """The configs of the subcommands."""
    return {"merge": MergeConfig, "convert": ConvertConfig, "info": InfoConfig}


def main(config: MergeConfig | ConvertConfig | InfoConfig) -> int:
    """Do what the config's class says; returns 0."""
    set_quiet(config.json)
    if isinstance(config, MergeConfig):
        report = _merge(config)
        say(f"merged {len(config.lora)} LoRAs into {config.output}")
    elif isinstance(config, ConvertConfig):
        report = _convert(config)
        say(f"{report['layers']} layers with {config.to} keys in {report['output']}")
    else:
        report = _info(config)
        if not config.json:
            print(_table(report))
    if config.json:
        print(json.dumps(report))
    return 0


def _merge(config: MergeConfig) -> dict[str, Any]:
    if not config.lora:
        raise UserError("lora merge: give at least one --lora PATH or PATH:WEIGHT")
    if config.output.exists() and not config.overwrite:
        raise UserError(f"{config.output}: exists already; choose another folder or --overwrite")
    import torch

    from diffkit.generation.plan import parse_lora
    from diffkit.models.latent_diffusion import LatentDiffusion
    from diffkit.models.lora import load_lora, merge_lora
    from diffkit.models.model_card import ModelCard, public_name, write_model_card

    model = LatentDiffusion.load(config.model)
    weighted = [parse_lora(text) for text in config.lora]
    for number, (source, weight) in enumerate(weighted):
        load_lora(model, source, weight, name=f"lora{number}")
    merge_lora(model)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    model.to(dtype=dtypes[config.dtype]).save(config.output, overwrite=config.overwrite)
    added = ", ".join(f"{public_name(path)} with weight {w:g}" for path, w in weighted)
    card = ModelCard.of(model, relation="merge", objective=f"LoRAs were added: {added}.")
    write_model_card(config.output, card)
    return {"model": config.model, "loras": weighted, "output": str(config.output)}


def _convert(config: ConvertConfig) -> dict[str, Any]:
    from diffkit.models.lora_file import LORA_FILE, read_lora, write_lora
    from diffkit.models.lora_keys import guess_architecture

    if config.to == "diffusers" and config.architecture != "auto":
        raise UserError("--architecture is for --to kohya; diffusers' keys do not depend on it")
    named = config.output.suffix == ".safetensors"
    output = config.output if named else config.output / LORA_FILE
    if output.exists() and not config.overwrite:
        raise UserError(f"{output}: exists already; choose another file or --overwrite")
    weights = read_lora(config.source, layers_per_block=config.layers_per_block)
    kind = guess_architecture(weights) if config.architecture == "auto" else config.architecture
    write_lora(output, weights, config.to, kind, config.layers_per_block)
    layers = sum(len(part) for part in weights.values())
    report = {"output": str(output), "layout": config.to, "layers": layers}
    return {**report, "architecture": kind} if config.to == "kohya" else report


def _info(config: InfoConfig) -> dict[str, Any]:
    from diffkit.models.lora_file import describe_file, find_lora, read_lora
    from diffkit.models.weights import read_header

    path = find_lora(config.source)
    header = read_header(path)
    weights = read_lora(path)
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "kind": describe_file(header),
        "components": {name: _component(weights, name) for name in weights},
        "metadata": dict(header.metadata),
    }


def _component(weights: LoraWeights, name: str) -> dict[str, Any]:
    layers = weights[name].values()
    return {
        "layers": len(layers),
        "parameters": sum(layer.down.numel() + layer.up.numel() for layer in layers),
        "ranks": dict(Counter(layer.rank for layer in layers)),
        "alphas": dict(Counter(layer.alpha for layer in layers)),
        "dtypes": dict(Counter(str(layer.up.dtype).removeprefix("torch.") for layer in layers)),
    }


def _table(report: dict[str, Any]) -> str:
    lines = [f"{report['file']}: {report['kind']}, {report['bytes'] / 1e6:.1f} MB"]
    for name, part in report["components"].items():
        counts = (
            f"{key[:-1]} " + ", ".join(f"{value:g}" for value in part[key])
            for key in ("ranks", "alphas")
        )
        lines.append(
            f"  {name:<16}{part['layers']} layers, {part['parameters']:,} parameters, "
            f"{'; '.join(counts)}, {', '.join(part['dtypes'])}"
        )
    return "\n".join(lines)
