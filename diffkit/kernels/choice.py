"""Which form of a kernel runs: Triton's on a GPU, else the reference in torch.

The environment variable `DIFFKIT_KERNELS` says so for a process: "auto" (the default), "torch" for
the reference everywhere, or "triton", which on a CPU works only under Triton's interpreter
(`TRITON_INTERPRET=1`, set before Triton is imported). `forced` says so for a part of a program.
Triton is imported when its kernels first run, never with the package.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from diffkit.errors import UserError

__all__ = ["VARIABLE", "Form", "forced", "fused"]

Form = Literal["auto", "torch", "triton"]

VARIABLE = "DIFFKIT_KERNELS"

# Not a context variable: autograd runs backward passes in threads of its own.
_forced: list[Form] = []


@contextmanager
def forced(form: Form) -> Iterator[None]:
    """Run the kernels in this form within the context, whatever the environment says."""
    _forced.append(form)
    try:
        yield
    finally:
        _forced.pop()


def fused(maps: Tensor) -> bool:
    """Whether Triton's kernel is to run on these maps; it computes in float32, so not on float64.

    Raises:
        UserError: the environment variable has an unknown value, or asks for Triton without it.
    """
    form = _forced[-1] if _forced else os.environ.get(VARIABLE, "auto")
    if form not in ("auto", "torch", "triton"):
        raise UserError(f"{VARIABLE}={form}: unknown; use auto, torch or triton")
    if form == "triton" and not _installed():
        raise UserError(f"{VARIABLE}=triton: Triton is not installed; use auto or torch")
    if form == "torch" or maps.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return form == "triton" or (maps.is_cuda and _installed())


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("triton") is not None
