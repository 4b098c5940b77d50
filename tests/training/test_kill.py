"""`kill -9` at any moment loses at most the steps since the last checkpoint."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
STEPS = 60
WIDTH = {"moment": 8, "checkpoint": 20_000}  # the wide one takes a while to write
EVERY = {"moment": 7, "checkpoint": 1}


def start(folder: Path, kind: str, when: str) -> subprocess.Popen[bytes]:
    steps = STEPS if when == "moment" else 12
    words = [
        "tests.training.toy",
        str(folder),
        kind,
        str(WIDTH[when]),
        str(steps),
        str(EVERY[when]),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, stderr=subprocess.PIPE
    )


def writing(folder: Path) -> bool:
    """Whether a checkpoint is being written, and at least one is whole."""
    place = folder / "checkpoints"
    return any(place.glob(".partial-*/*")) and any(place.glob("step-*"))


def kill(folder: Path, kind: str, when: str, rows: int) -> None:
    """Start a run and kill it once it has `rows` rows (and, if asked, while it writes)."""
    process = start(folder, kind, when)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None:
        made = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if made >= rows and (when == "moment" or writing(folder)):
            break
        time.sleep(0.0005)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.communicate()


def finish(folder: Path, kind: str, when: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Let the run end; its losses and final weights."""
    process = start(folder, kind, when)
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint.decode()
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in losses:
        del row["seconds"]
    files = sorted((folder / "model").iterdir())
    return losses, {f"{f.name}/{k}": v for f in files for k, v in load_file(f).items()}


def assert_survives(tmp_path: Path, kind: str, when: str, moments: list[int]) -> None:
    expected = finish(tmp_path / "whole", kind, when)
    for rows in moments:
        kill(tmp_path / "killed", kind, when, rows)
    found = finish(tmp_path / "killed", kind, when)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][key], value) for key, value in expected[1].items())
    assert not list((tmp_path / "killed" / "checkpoints").glob(".partial-*"))


def test_killed_at_a_moment(tmp_path):
    assert_survives(tmp_path, "two", "moment", [17])


def test_killed_while_a_checkpoint_is_written(tmp_path):
    assert_survives(tmp_path, "one", "checkpoint", [3])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "two"])
def test_killed_at_five_random_moments(kind, tmp_path):
    moments = sorted(random.sample(range(STEPS - 5), 5))
    assert_survives(tmp_path, kind, "moment", moments)


@pytest.mark.slow
def test_killed_at_five_writes(tmp_path):
    assert_survives(tmp_path, "one", "checkpoint", [1, 3, 5, 7, 9])
