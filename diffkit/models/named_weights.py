"""Weights of named metric and reward networks that their authors publish as pickles only.

This is the one place that opens a pickle, from a path that the user gave, with torch's unpickler
that builds tensors and runs no code (`weights_only=True`).
"""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffkit.errors import UserError

__all__ = ["load_named_weights", "optional_module"]


def optional_module(name: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency when it is needed.

    Raises `UserError` with the line that installs it: `pip install "diffkit[EXTRA]"`.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{purpose} needs the package {name.partition('.')[0]}, which cannot be imported "
            f'({error}). Install it with: pip install "diffkit[{extra}]"'
        ) from error


def load_named_weights(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """Tensors by name from a .safetensors file or a pickled state dict, on the CPU.

    A dictionary under the key "state_dict" is unwrapped, and the prefix "module." that data
    parallel training leaves is removed. Raises `UserError` when the file is missing, is broken,
    holds more than tensors, or could only be read by running code from it.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{file}: no such file; a file of weights is needed here.")
    try:
        if file.suffix.lower() == ".safetensors":
            state: object = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        first, *_ = str(error).strip().splitlines() or ["it ends too early"]
        raise UserError(f"{file}: cannot be read as plain weights ({first}).") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{file}: must hold a dictionary of tensors, a state dict, alone.")
    return {str(key).removeprefix("module."): value for key, value in state.items()}
