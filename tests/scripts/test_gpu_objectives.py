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


def test_objectives_and_the_script_are_measured(
    setting: gpu_check.Setting, tmp_path: Path
) -> None:
    for name in ("objectives", "lpl_script"):
        assert gpu_check.run_section(name, setting, tmp_path), read_json(tmp_path / f"{name}.json")
    rows = read_json(tmp_path / "objectives.json")["rows"]
    assert len(rows) == 9 and rows["plain fine-tuning"]["time"] == 1
    assert len(read_json(tmp_path / "lpl_script.json")["time"]) == 3


@pytest.mark.slow
def test_the_check_starts_as_a_script() -> None:
    """From its own folder alone it must find the benchmarks, which import one another."""
    script = Path(gpu_check.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--help"], cwd="/", check=True, stdout=subprocess.PIPE
    )
    assert b"lpl_script" in done.stdout
