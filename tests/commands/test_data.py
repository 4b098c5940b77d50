"""`diffkit data check`: exit codes and output; the checks themselves are tested with the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffkit.cli import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        Image.effect_noise((48, 48), 40).convert("RGB").save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("noise")
    return tmp_path


def test_a_good_folder_exits_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(folder)]) == 0
    assert "2 images" in capsys.readouterr().out


def test_bad_files_are_named_and_exit_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "c.txt").write_text("a caption for no picture")
    assert main(["data", "check", str(folder)]) == 1
    text = capsys.readouterr().out
    assert "a.png" in text
    assert "c.txt" in text
    assert main(["data", "check", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {problem["kind"] for problem in report["problems"]} >= {
        "corrupt",
        "caption without image",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("check", "{tmp}/absent"), "absent"),
        (("check", "{tmp}/empty"), "empty"),
        (("check",), "DIR"),
        (("check", "{tmp}/empty", "--smallest", "0"), "--smallest 0"),
        (("chekc", "{tmp}"), "Did you mean check?"),
    ],
)
def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["data", *(word.format(tmp=tmp_path) for word in words)]) == 2
    assert message in capsys.readouterr().err
