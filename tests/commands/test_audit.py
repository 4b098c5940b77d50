"""`diffkit audit` from the command line: exit codes, JSON, the terminal and the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from diffkit.cli import main
from tests.audit.pictures import pixels, record, save, two_folders

QUICK = ("--strengths", "0.03", "--seeds", "2", "--resamples", "100", "--purify", "jpeg75")


def run(root: Path, model: Path, *flags: object) -> int:
    words = [
        "audit",
        root / "clean",
        root / "protected",
        "--model",
        model,
        "--output",
        root / "out",
    ]
    return main([str(word) for word in (*words, *flags)])


def test_json_is_only_json_and_equal_to_the_file(
    tmp_path: Path, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_folders(tmp_path)
    assert run(tmp_path, tiny_sd, *QUICK, "--json", "--prompt", "a") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert report["kind"] == "diffkit audit" and report["n"] == 2 and report["seeds"] == 2
    assert len(report["notice"]) == 8
    row = report["models"][0]["threats"][0]
    numbers = row["numbers"]["latent_l2"]
    assert numbers["effect"].keys() == {"protected", "random", "jpeg95", "clean again"}
    assert numbers["vs_original"].keys() == numbers["effect"].keys() | {"clean"}
    assert str(tmp_path) not in json.dumps(report)
    assert report["command"]["clean"] == "clean" and report["command"]["model"] == [tiny_sd.name]


def test_a_dry_run_is_json_too(
    tmp_path: Path, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_folders(tmp_path)
    assert run(tmp_path, tiny_sd, *QUICK, "--json", "--prompt", "a", "--dry-run") == 0
    (plan,) = json.loads(capsys.readouterr().out)["models"]
    # 2 pictures x 2 noises x (5 versions, and 3 behind the purifier)
    assert plan["edits"] == 32 and plan["purified"] == 12 and plan["cells"] == 4
    assert plan["seconds"] > 0 and not (tmp_path / "out" / "cells").exists()


@pytest.mark.slow
def test_pictures_of_other_sizes_are_named_and_the_exit_code_is_1(
    tmp_path: Path, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, result = two_folders(tmp_path, 3)
    record(save(result / "1.png", pixels(1, 40, 32)), clean / "1.png")
    assert run(tmp_path, tiny_sd, *QUICK, "--prompt", "a") == 1
    said = capsys.readouterr()
    assert "1.png" in said.out and "has 32x40 pixels" in " ".join(said.out.split())
    assert "There is no verdict here" in said.err
    assert "audit.html" in said.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--threats", "paint"), "--threats paint: unknown. Known: sdedit"),
        (("--purify", "wash"), "--purify wash: unknown. Known: identity"),
        (("--threats", "inpaint"), "needs --mask"),
        (("--threats", "lora", "--strengths", "0.1"), "--strengths: are those of sdedit"),
        (("--rank", "8"), "--rank: is for imitators"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_measured(
    tmp_path: Path,
    tiny_sd: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    words: str,
) -> None:
    two_folders(tmp_path)
    assert run(tmp_path, tiny_sd, *flags) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "cells").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_has_nothing_to_complain_about(tmp_path: Path, tiny_sd: Path) -> None:
    """No line in the console, and no sideways scrolling of the page on a phone and on a desk."""
    two_folders(tmp_path)
    assert run(tmp_path, tiny_sd, *QUICK, "--json", "--prompt", "a") == 0
    text = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=.https?:|url\(.?https?:|@import", text)
    root = "document.documentElement"
    tell = f"parent.postMessage(innerWidth + ': ' + ({root}.scrollWidth <= innerWidth), '*')"
    child, frames = tmp_path / "child.html", tmp_path / "frames.html"
    child.write_text(text.replace("</body>", f"<script>{tell}</script></body>"), encoding="utf-8")
    listen = "onmessage = said => document.body.append(said.data, '; ')"
    shown = "".join(
        f'<iframe src="child.html" width="{w}" height="900"></iframe>' for w in (420, 1300)
    )
    frames.write_text(f"<body><script>{listen}</script>{shown}</body>", encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --enable-logging=stderr"
    flags += " --v=0 --virtual-time-budget=5000 --dump-dom"
    words = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", frames.as_uri()]
    found = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in found.stderr
    assert "420: true; " in found.stdout and "1300: true; " in found.stdout
