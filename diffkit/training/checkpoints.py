"""Checkpoints: whole or absent, a bounded number of them, readable without running code.

OUTPUT/checkpoints/step-00000100/
    state.json                      step, and the size of every other file
    PLAYER.safetensors              trainable parameters and buffers
    PLAYER.optimizer.safetensors    optimizer state, keys `slot/parameter`
    PLAYER.ema.safetensors          the moving average, where one is kept
    NAME.state.safetensors          what the objective keeps beside its players, where it does
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffkit.console import warn
from diffkit.errors import RunFailed
from diffkit.files import TEMPORARY_PREFIX, atomic_directory, read_json, storage_errors, write_json

__all__ = ["Checkpoint", "Checkpoints", "tensor_file_errors"]

_NAME = re.compile(r"step-(\d{8,})$")


@contextlib.contextmanager
def tensor_file_errors() -> Iterator[None]:
    """Give the storage errors that safetensors reports as text their number back."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number.group(1)), str(error)) from error


@dataclass
class Checkpoint:
    """All that a run needs to go on.

    `files` maps a file's stem, such as "denoiser.optimizer", to its tensors by name; `numbers` is
    anything else, as JSON knows it.
    """

    step: int
    files: dict[str, dict[str, Tensor]]
    numbers: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run.

    Arguments:
        folder: where they lie; made when the first is written.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def paths(self) -> list[Path]:
        """The checkpoint folders, oldest first."""
        if not self.folder.is_dir():
            return []
        named = [(_NAME.match(path.name), path) for path in self.folder.iterdir()]
        return [path for _, path in sorted((int(m.group(1)), path) for m, path in named if m)]

    def write(self, checkpoint: Checkpoint) -> Path:
        """Write one, then remove those beyond `keep`.

        Raises `RunFailed` for weights that are not finite and for storage that ran out; in both
        cases the earlier checkpoints stay.
        """
        for stem, tensors in checkpoint.files.items():
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise RunFailed(
                        f"step {checkpoint.step}: {name} of {stem} is not finite, so no checkpoint "
                        "was written; the last one is good. Try a lower --learning-rate."
                    )
        path = self.folder / f"step-{checkpoint.step:08d}"
        with (
            storage_errors(path),
            tensor_file_errors(),
            atomic_directory(path, overwrite=True) as new,
        ):
            for stem, tensors in checkpoint.files.items():
                whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
                save_file(whole, new / f"{stem}.safetensors")
            sizes = {file.name: file.stat().st_size for file in sorted(new.iterdir())}
            state = {"step": checkpoint.step, "files": sizes, "numbers": checkpoint.numbers}
            write_json(new / "state.json", state)
        for old in self.paths()[: -self.keep]:
            shutil.rmtree(old)
        return path

    def latest(self) -> Checkpoint | None:
        """The newest one that is whole; a damaged one is named in a warning and passed over."""
        for path in reversed(self.paths()):
            try:
                return _read(path)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                warn(f"{path}: this checkpoint is damaged ({error}); going on from the one before.")
        return None

    def clean(self) -> None:
        """Remove what killed writers left behind."""
        if self.folder.is_dir():
            for path in self.folder.glob(f"{TEMPORARY_PREFIX}*"):
                shutil.rmtree(path, ignore_errors=True)


def _read(path: Path) -> Checkpoint:
    state = read_json(path / "state.json")
    files = {}
    for name, size in state["files"].items():
        found = (path / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes instead of {size}")
        files[name.removesuffix(".safetensors")] = load_file(path / name)
    return Checkpoint(int(state["step"]), files, dict(state["numbers"]))
