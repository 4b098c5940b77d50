"""What a finished run says of its result, and its way to the hub."""

from __future__ import annotations

import os
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from diffkit.console import say
from diffkit.files import read_jsonl
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.model_card import ModelCard, public_name, write_model_card
from diffkit.models.publish import push_folder
from diffkit.training.config import TrainConfig
from diffkit.training.folder import RunFolder

__all__ = ["publish", "result_card", "write_result_card"]

LAST_ROWS = 100
"""Steps at the end of a run whose mean loss is stated."""

# Flags that say where and how a run was made, not what came out of it.
_UNTOLD = {
    *("output", "config", "dry_run", "overwrite", "push_to_hub", "hub_private", "tracker"),
    *("checkpoint_every", "keep", "log_every", "cache", "workers", "model", "data"),
    *("validation_prompts", "validation_every", "validation_steps", "validation_guidance"),
}

_PARTS = re.compile(r"[^,:=+]+")


def write_result_card(
    folder: Path, config: TrainConfig, model: LatentDiffusion, metrics: Path
) -> Path:
    """Write README.md beside the saved result of a run; returns its path."""
    title = config.output.resolve().name
    return write_model_card(folder, result_card(config, model, metrics), title)


def result_card(config: TrainConfig, model: LatentDiffusion, metrics: Path) -> ModelCard:
    """The card of a run's result.

    Args:
        config: of the run; the flags that differ from their defaults are told.
        model: what was trained.
        metrics: metrics.jsonl, of whose last `LAST_ROWS` rows the mean losses are told.
    """
    rows = read_jsonl(metrics)[-LAST_ROWS:]
    names = [name for name in rows[-1] if name == "loss" or name.endswith("/loss")] if rows else []
    losses = {
        f"{name}, mean of the last {len(rows)} steps": fmean(
            row[name] for row in rows if row.get(name) is not None
        )
        for name in names
    }
    summary = (type(config).__doc__ or "").strip().splitlines()[0]
    return ModelCard.of(
        model,
        **config.card(model),
        data=(config.data,),
        objective=f"{summary} {config.max_steps} steps of {config.batch_size} samples.",
        settings=_changed(config),
        metrics=losses,
    )


def _changed(config: Any, prefix: str = "") -> dict[str, object]:
    """Flags that differ from their defaults, nested ones as `group.name`."""
    found: dict[str, object] = {}
    usual = type(config)(**({"data": "", "output": Path()} if not prefix else {}))
    for field in fields(config):
        if not prefix and field.name in _UNTOLD:
            continue
        value = getattr(config, field.name)
        if is_dataclass(value):
            found |= _changed(value, f"{prefix}{field.name}.")
        elif value != getattr(usual, field.name):
            found[f"{prefix}{field.name}"] = _public(value)
    return found


def _public(value: object) -> object:
    """A value without the folders of this machine, in parts such as hpsv2:FILE:1 neither."""
    if isinstance(value, Path):
        return public_name(str(value))
    if not isinstance(value, str):
        return value
    if _is_place(value):
        return public_name(value)
    return _PARTS.sub(lambda m: public_name(m[0]) if _is_place(m[0]) else m[0], value)


def _is_place(text: str) -> bool:
    path = os.path.expanduser(text)
    return os.path.isabs(path) or os.path.exists(path)


def publish(config: TrainConfig, folder: RunFolder) -> None:
    """Push a finished result where `--push-to-hub` says, unless it was pushed there already.

    Raises `RunFailed` when the hub does not take it; the result stays, and the same command tries
    again.
    """
    repo_id = config.push_to_hub
    if repo_id is None or folder.pushed_to() == repo_id:
        return
    address = push_folder(folder.result, repo_id, private=config.hub_private)
    folder.mark_pushed(repo_id)
    say(f"{folder.result}: pushed to {address}")
