"""Students as `diffkit train` writes them, without the training, and what their cards say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import add_lora
from diffkit.training.config import TrainConfig
from diffkit.training.publish import write_result_card
from diffkit.training.registry import method_of


def write_student(config: TrainConfig) -> Path:
    """The result of a run, as it starts, with its card; returns its folder."""
    model = config.prepared(LatentDiffusion.load(config.model))
    lora = None if config.lora_rank is None else "default"
    if lora is not None:
        add_lora(model, config.lora_rank or 0, targets=config.adapted(model), name=lora)
    folder = config.output / config.result_name()
    method_of(config).build(model, config, lora).save(folder)
    metrics = config.output / "metrics.jsonl"
    metrics.touch()
    write_result_card(folder, config, model, metrics)
    return folder


def used(folder: Path) -> str:
    """What the card of a folder says of its use: a block of Python or of a shell."""
    found = re.search(r"## Use\n.*?```\w*\n(.*?)\n```", (folder / "README.md").read_text(), re.S)
    assert found is not None
    return found[1]


def run_card(folder: Path, base: Path | None = None, more: str = "") -> tuple[Any, Any]:
    """(pipeline, picture) of the card's own Python, with folders in place of names.

    Arguments:
        base: of a LoRA.
        more: further arguments of the call, such as a size.
    """
    block = used(folder).replace('"THIS"', repr(str(folder)))
    if base is not None:
        block = re.sub(r'from_pretrained\(".*?"\)', f"from_pretrained({str(base)!r})", block)
    block = block.replace(").images[0]", f"{', ' + more if more else ''}).images[0]")
    names: dict[str, Any] = {}
    exec(block, names)
    return names["pipeline"], names["image"]
