"""The Triton kernels through the interpreter and the compiler, neither of which needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROUNDING = {"float32": 2e-6, "bfloat16": 6e-3, "float16": 1e-3}

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def child(what: str, cache: Path, **variables: str) -> dict[str, list[float]]:
    """The JSON of `triton_cases.py`, run by itself: Triton reads its environment once."""
    known = {key: value for key, value in os.environ.items() if not key.startswith("TRITON")}
    settings = {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT), **variables}
    argv = [sys.executable, str(Path(__file__).with_name("triton_cases.py")), what]
    done = subprocess.run(argv, env=known | settings, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_they_compute_what_the_formulas_say(tmp_path) -> None:
    """Values to float32's rounding, gradients to that of the maps' dtype, zeros exactly."""
    rows = child("run", tmp_path, TRITON_INTERPRET="1")
    for name, row in rows.items():
        kind = name.rpartition(", ")[2]
        limits = [0.0, 0.0] if kind == "zero" else [2e-6, ROUNDING[kind]]
        assert all(error <= limit for error, limit in zip(row, limits)), (name, row)
    assert len(rows) == 37


@pytest.mark.slow
def test_they_compile_to_wide_reads(tmp_path) -> None:
    """Annotations from outside Triton's language ran in the interpreter and did not compile; reads
    that depended on the mask, or on an end that is no multiple of 16, were of 2 or 4 bytes."""
    rows = child("compile", tmp_path)
    assert len(rows) == 21 and all(rows.values()), rows
