"""Where numbers and pictures go besides the output folder."""

from __future__ import annotations

import secrets
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from diffkit.errors import UserError
from diffkit.files import atomic_write

__all__ = ["Tracker", "make_tracker", "require_tracker", "run_id"]


class Tracker(Protocol):
    """A place that shows the run while it goes on."""

    def row(self, row: dict[str, Any]) -> None:
        """One row of metrics.jsonl."""
        ...

    def images(self, step: int, prompts: list[str], images: list[Any]) -> None:
        """Validation pictures (PIL) after `step` steps."""
        ...

    def close(self) -> None:
        """Write what is buffered."""
        ...


class _Nothing:
    def row(self, row: dict[str, Any]) -> None:
        pass

    def images(self, step: int, prompts: list[str], images: list[Any]) -> None:
        pass

    def close(self) -> None:
        pass


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, (int, float))}
    for place, value in enumerate(row.get("loss_by_time", [])):
        if value is not None:
            numbers[f"loss_by_time/{place}"] = value
    return numbers


class _TensorBoard:
    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides the rows that a killed run wrote beyond its last checkpoint.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def row(self, row: dict[str, Any]) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def images(self, step: int, prompts: list[str], images: list[Any]) -> None:
        import numpy as np

        for number, image in enumerate(images):
            array = np.asarray(image)
            self._writer.add_image(f"validation/{number}", array, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


def run_id(folder: Path, start: int) -> str:
    """The name under which wandb knows the run in `folder`: random, kept there, new at step 0."""
    path = folder / "wandb-id.txt"
    if start == 0 or not path.exists():
        with atomic_write(path, "w") as file:
            file.write(secrets.token_hex(8))
    return path.read_text()


class _WandB:
    def __init__(self, folder: Path, start: int, config: dict[str, Any]) -> None:
        wandb: Any = import_module("wandb")
        self._wandb = wandb
        self._run = wandb.init(
            project="diffkit",
            dir=str(folder),
            name=folder.resolve().name,
            id=run_id(folder, start),
            resume="allow",
            config=config,
        )

    def row(self, row: dict[str, Any]) -> None:
        self._run.log(_numbers(row), step=row["step"])

    def images(self, step: int, prompts: list[str], images: list[Any]) -> None:
        pictures = [self._wandb.Image(i, caption=p) for i, p in zip(images, prompts)]
        self._run.log({"validation": pictures}, step=step)

    def close(self) -> None:
        self._run.finish()


def require_tracker(name: str) -> None:
    """Raise `UserError` when the library behind a tracker is missing."""
    if name != "none" and find_spec(name) is None:
        raise UserError(f"tracker: {name} is not installed; pip install {name}, or use another.")


def make_tracker(name: str, folder: Path, start: int, config: dict[str, Any]) -> Tracker:
    """The tracker called `name`; `start` is the step after which the run goes on."""
    if name == "tensorboard":
        return _TensorBoard(folder, start)
    if name == "wandb":
        return _WandB(folder, start, config)
    return _Nothing()
