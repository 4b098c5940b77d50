"""Which form of a kernel runs, and that Triton is not imported without need."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from diffkit.errors import UserError
from diffkit.kernels.choice import VARIABLE, forced, fused

MAPS = torch.zeros(1, 2, 3, 4)


def test_the_reference_runs_on_a_cpu(monkeypatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not fused(MAPS)


def test_the_environment_and_the_context_choose(monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")
    assert fused(MAPS) and not fused(MAPS.double())
    with forced("torch"):
        assert not fused(MAPS)
        with forced("triton"):
            assert fused(MAPS)
    monkeypatch.setenv(VARIABLE, "torch")
    assert not fused(MAPS)


def test_an_unknown_choice_is_refused(monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(UserError, match="use auto, torch or triton"):
        fused(MAPS)


def test_triton_waits_until_it_is_needed() -> None:
    code = (
        "import sys, torch; from diffkit.perceptual import feature_distance as f;"
        "f.feature_distance(*torch.rand(2, 1, 2, 3, 3)); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
