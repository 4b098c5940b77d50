"""The GPU check's sections about objectives, at tiny size on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest

from diffkit.files import read_json


@pytest.fixture
def setting(tmp_path: Path) -> gpu_check.Setting:
    (tmp_path / "scratch").mkdir()
    return gpu_check.Setting("cpu", "tiny", tmp_path / "scratch", steps=2)


def test_kernels_are_compared_with_float64(setting: gpu_check.Setting, tmp_path: Path) -> None:
    """Without a GPU their references are."""
    passed = gpu_check.run_section("kernels", setting, tmp_path)
    result = read_json(tmp_path / "kernels.json")
    assert passed, result
    assert len(result["errors_over_limit"]) == 6
    assert 0 < max(result["errors_over_limit"].values()) <= 1


def test_the_script_is_measured(setting: gpu_check.Setting, tmp_path: Path) -> None:
    passed = gpu_check.run_section("lpl_script", setting, tmp_path)
    result = read_json(tmp_path / "lpl_script.json")
    assert passed and len(result["time"]) == 3 and len(result["peak_bytes"]) == 5, result


@pytest.mark.slow
def test_objectives_are_measured(setting: gpu_check.Setting, tmp_path: Path) -> None:
    passed = gpu_check.run_section("objectives", setting, tmp_path)
    result = read_json(tmp_path / "objectives.json")
    assert passed, result
    assert len(result["rows"]) == 9 and result["rows"]["plain fine-tuning"]["time"] == 1


@pytest.mark.slow
def test_the_check_starts_as_a_script() -> None:
    """From its own folder alone it must find the benchmarks, which import one another."""
    script = Path(gpu_check.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--help"], cwd="/", check=True, stdout=subprocess.PIPE
    )
    assert b"lpl_script" in done.stdout
