"""`diffkit train OBJECTIVE`: fine-tune a model; the same command again goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from diffkit.commands.flags import parse_flags
from diffkit.training.config import TrainConfig
from diffkit.training.configfile import load
from diffkit.training.registry import METHODS

__all__ = ["configs", "main", "parse"]

Config = TypeVar("Config")


def configs() -> dict[str, type]:
    """The configuration of every objective."""
    return {name: method.config for name, method in METHODS.items()}


def parse(config_class: type[Config], argv: Sequence[str], prog: str) -> Config:
    """Flags over the values of the file that `--config` names, if any."""
    file = _config_file(argv)
    default = None if file is None else load(file, config_class)
    return parse_flags(config_class, argv, prog, default)


def _config_file(argv: Sequence[str]) -> Path | None:
    """The value of `--config`, which is needed before the other flags are understood."""
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        if word == "--config" and after and not after.startswith("--"):
            return Path(after)
        if word.startswith("--config="):
            return Path(word.removeprefix("--config="))
    return None


def main(config: TrainConfig) -> int:
    """Train, or with --dry-run say what training will cost."""
    if config.dry_run:
        from diffkit.training.estimate import dry_run

        return dry_run(config)
    from diffkit.training.launch import train

    return train(config)
