"""The GPU check on a machine without one: it refuses clearly, and its sections run at tiny size."""

from __future__ import annotations

from pathlib import Path

import gpu_check
import pytest
import torch

from diffkit.files import read_json

tiny_only = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@tiny_only
def test_without_a_gpu_it_says_so_and_could_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_check.main(["--output", str(tmp_path / "out")]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def setting(tmp_path: Path) -> gpu_check.Setting:
    (tmp_path / "scratch").mkdir()
    return gpu_check.Setting("cpu", "tiny", tmp_path / "scratch", steps=2)


def test_generate_and_attention_write_their_results(
    setting: gpu_check.Setting, tmp_path: Path
) -> None:
    for name in ("generate", "attention"):
        assert gpu_check.run_section(name, setting, tmp_path), read_json(tmp_path / f"{name}.json")
    rows = read_json(tmp_path / "generate.json")["rows"]
    assert [row["batch"] for row in rows] == [1, 8]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert read_json(tmp_path / "attention.json")["rows"]["classic"]["relative_difference"] == 0


def test_statistics_write_their_result(setting: gpu_check.Setting, tmp_path: Path) -> None:
    assert gpu_check.run_section("statistics", setting, tmp_path)
    rows = read_json(tmp_path / "statistics.json")["rows"]
    assert rows["frechet"]["value"] > 0


def test_protection_writes_its_result(setting: gpu_check.Setting, tmp_path: Path) -> None:
    assert gpu_check.run_section("protection", setting, tmp_path), read_json(
        tmp_path / "protection.json"
    )
    result = read_json(tmp_path / "protection.json")
    assert len(result["rows"]) == 8
    assert all(row["seconds"] > 0 for row in result["rows"].values())
    assert result["bf16_sign_agreement"] > 0.8
    assert result["repeat_sign_agreement"] == 1.0  # exactly so on a CPU alone


@pytest.mark.slow
def test_evaluate_writes_its_result(setting: gpu_check.Setting, tmp_path: Path) -> None:
    assert gpu_check.run_section("evaluate", setting, tmp_path), read_json(
        tmp_path / "evaluate.json"
    )
    assert read_json(tmp_path / "evaluate.json")["metrics"] > 5


def test_a_failing_section_leaves_a_result(
    setting: gpu_check.Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(setting: gpu_check.Setting) -> dict[str, object]:
        raise RuntimeError("out of luck")

    monkeypatch.setitem(gpu_check.SECTIONS, "generate", broken)
    assert not gpu_check.run_section("generate", setting, tmp_path)
    result = read_json(tmp_path / "generate.json")
    assert result["error"] == "RuntimeError: out of luck"
    assert not result["passed"]


@pytest.mark.slow
def test_training_writes_its_result(setting: gpu_check.Setting, tmp_path: Path) -> None:
    assert gpu_check.run_section("training", setting, tmp_path), read_json(
        tmp_path / "training.json"
    )
    assert set(read_json(tmp_path / "training.json")["rows"]) == {"lora", "full"}


@pytest.mark.slow
def test_the_compiled_model_is_the_same_model(setting: gpu_check.Setting, tmp_path: Path) -> None:
    assert gpu_check.run_section("compiled", setting, tmp_path), read_json(
        tmp_path / "compiled.json"
    )
