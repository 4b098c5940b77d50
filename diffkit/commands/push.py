"""`diffkit push`: a saved model or adapter to the hub, with its card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from diffkit.console import say
from diffkit.errors import UserError

__all__ = ["PushConfig", "configs", "main"]


@dataclass(frozen=True)
class PushConfig:
    """Upload a saved model or LoRA to the hub as one commit, with the card that it was saved with.

    A token of the hub is needed: `hf auth login`, or HF_TOKEN.
    """

    folder: tyro.conf.Positional[Path]
    """A folder that diffkit saved: RUN/model, RUN/lora, the output of `lora merge`."""

    repo: tyro.conf.Positional[str]
    """OWNER/NAME; made when it does not exist."""

    private: bool = False
    """Make a new repository private."""

    report: Path | None = None
    """report.json of `diffkit evaluate`: its scores are written into the card first."""

    message: str = "Upload with diffkit"
    """Of the commit."""


def configs() -> dict[str, type]:
    """The one config of this command."""
    return {"": PushConfig}


def main(config: PushConfig) -> int:
    """Push; returns 0. See `PushConfig`."""
    if not config.folder.is_dir():
        raise UserError(f"{config.folder}: no such folder.")
    from diffkit.models.publish import check_destination, push_folder

    check_destination(config.repo)
    if config.report is not None:
        _write_scores(config.folder, config.report, config.repo.split("/")[-1])
    address = push_folder(
        config.folder, config.repo, private=config.private, message=config.message
    )
    say(f"{config.folder}: pushed to {address}")
    return 0


def _write_scores(folder: Path, file: Path, name: str) -> None:
    from diffkit.files import atomic_write, read_json
    from diffkit.models.model_card import CARD_FILE, with_scores

    report: Any = read_json(file)
    if not isinstance(report, dict) or "metrics" not in report:
        raise UserError(f"{file}: is no report.json of diffkit evaluate (it has no metrics).")
    card = folder / CARD_FILE
    if not card.is_file():
        raise UserError(f"{folder}: holds no {CARD_FILE} to write the scores into.")
    text = with_scores(card.read_text(encoding="utf-8"), report, name)
    with atomic_write(card, "w") as out:
        out.write(text)
