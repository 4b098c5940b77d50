"""The GPU check's sections about few-step students, at tiny size on a CPU."""

from __future__ import annotations

from pathlib import Path

import gpu_check
import pytest

from diffkit.files import read_json


@pytest.fixture
def setting(tmp_path: Path) -> gpu_check.Setting:
    (tmp_path / "scratch").mkdir()
    return gpu_check.Setting("cpu", "tiny", tmp_path / "scratch", steps=2)


@pytest.mark.slow
def test_trajectories_are_made_and_made_anew(setting: gpu_check.Setting, tmp_path: Path) -> None:
    passed = gpu_check.run_section("trajectories", setting, tmp_path)
    result = read_json(tmp_path / "trajectories.json")
    assert passed, result
    assert result["pairs"]["made"] == 24 and result["verified"]["identical"] == 3
    assert result["seconds_a_pair"] > 0


@pytest.mark.slow
def test_steps_of_consistency_distillation(setting: gpu_check.Setting, tmp_path: Path) -> None:
    passed = gpu_check.run_section("consistency", setting, tmp_path)
    result = read_json(tmp_path / "consistency.json")
    assert passed, result
    assert list(result["rows"]) == [
        "lcd",
        "rg_lcd, decoded",
        "rg_lcd, proxy",
        "rg_lcd, proxy, LoRA",
    ]
    assert all(row["seconds"] > 0 for row in result["rows"].values())


@pytest.mark.slow
def test_steps_of_a_generator_and_its_discriminator(
    setting: gpu_check.Setting, tmp_path: Path
) -> None:
    passed = gpu_check.run_section("adversaries", setting, tmp_path)
    result = read_json(tmp_path / "adversaries.json")
    assert passed, result
    assert set(result["losses"]) == {"discriminator", "generator"}
