"""A thousand small pictures: all are done or named, memory stays flat, and a kill costs nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGKILL

import pytest

from tests.protection.gallery import Gallery, make_gallery

ROOT = Path(__file__).parents[2]
FILES = 1000

GROWTH = 64e6
"""Bytes by which the process may grow between the first quarter of its pictures and the last."""


@pytest.fixture(scope="module")
def small_model(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Stable Diffusion, told that its pictures have 8 pixels: the smallest it can take."""
    folder = tmp_path_factory.mktemp("small") / "model"
    shutil.copytree(tiny_sd, folder)
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 4}))
    return folder


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return make_gallery(tmp_path_factory.mktemp("gallery") / "in", FILES, size=16)


def start(gallery: Gallery, model: Path, output: Path) -> subprocess.Popen[str]:
    words = ["protect", gallery.root, "--output", output, "--model", model, "--steps", "1"]
    command = [sys.executable, "-m", "diffkit.cli", *map(str, words), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (output.parent / f"{output.name}.log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log, text=True)


def said(output: Path) -> str:
    return (output.parent / f"{output.name}.log").read_text()


def records(output: Path) -> int:
    return sum(name.endswith(".json") for _, _, names in os.walk(output) for name in names)


def resident(process: subprocess.Popen[str]) -> int:
    """Bytes of the process that are in memory."""
    fields = Path(f"/proc/{process.pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def files(output: Path) -> dict[str, tuple[int, bytes]]:
    """All but hidden ones, which are what a kill leaves behind for a while."""
    found = [path for path in output.rglob("*") if path.is_file() and path.name[0] != "."]
    return {str(p.relative_to(output)): (p.stat().st_mtime_ns, p.read_bytes()) for p in found}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_a_thousand_pictures(gallery: Gallery, small_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start(gallery, small_model, output)
    good, samples = len(gallery.good), list[tuple[int, int]]()
    while process.poll() is None:
        samples.append((records(output), resident(process)))
        time.sleep(0.25)
    assert process.returncode == 1
    log = said(output)
    # memory is flat once the first quarter is done
    first = [size for done, size in samples if good // 8 < done <= good // 4]
    last = [size for done, size in samples if 3 * good // 4 < done < good]
    print(f"grew by {(max(last) - max(first)) / 1e6:.1f} MB")
    assert max(last) - max(first) < GROWTH
    # all good ones are done, each bad one is named with its reason
    made = files(output)
    assert len(made) == 2 * good
    assert f"{good} pictures protected" in log
    for path, reason in gallery.bad.items():
        lines = [line for line in log.splitlines() if f" {path}: " in line]
        assert lines and all(reason in line for line in lines), path
    assert not [path for path in output.rglob("*") if path.name.startswith(".")]
    # a second run does nothing
    begun = time.monotonic()
    again = start(gallery, small_model, output)
    assert again.wait() == 1
    print(f"second run: {time.monotonic() - begun:.1f} s")
    assert files(output) == made
    assert f"0 pictures protected in {output}, {good} there already" in said(output)
    # a run that is killed in the middle, and started again
    killed = tmp_path / "killed"
    process = start(gallery, small_model, killed)
    while records(killed) < good // 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, SIGKILL)
    process.wait()
    half = files(killed)
    assert len(half) < 2 * good
    assert start(gallery, small_model, killed).wait() == 1
    whole = files(killed)
    assert {name: data for name, (_, data) in whole.items()} == {
        name: data for name, (_, data) in made.items()
    }
    # what was finished before the kill was not touched again
    kept = [name.removesuffix(".json") for name in half if name.endswith(".json")]
    assert len(kept) >= good // 2 and all(whole[name] == half[name] for name in kept)
