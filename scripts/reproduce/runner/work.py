"""Making cells: one at a time in this process, several processes beside each other.

Who makes a cell holds a lock on a file beside its work folder until it ends in whatever way, so
that any number of processes, started together or not, share out the cells of an experiment.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import diffkit
from diffkit.console import say, warn
from diffkit.errors import RunFailed
from diffkit.files import write_json
from runner import ROOT
from runner.experiment import Cell, Experiment

__all__ = ["Interrupted", "claim", "make", "spawn"]

INTERRUPTED = 130


class Interrupted(Exception):
    """A cell was stopped on request, with all that is needed to go on from there."""


@contextlib.contextmanager
def claim(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the work folder against other processes; yields whether it is ours.

    With `wait` it is, once whoever holds it has let go. A killed process lets go at once.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def make(experiment: Experiment, cells: Sequence[Cell], results: Path) -> int:
    """Make every cell that is not done and that no other process makes; returns the exit code.

    A cell that fails is named and the others go on; the code is then 1. It is 130 when a cell was
    interrupted.
    """
    code = 0
    for cell in cells:
        if cell.state(results) == "done":
            continue
        with claim(cell.work) as ours:
            if not ours:
                say(f"{cell.experiment} {cell.name}: another process makes it.")
            elif cell.state(results) != "done":  # it may have come in between
                say(f"{cell.experiment} {cell.name}: starting.")
                try:
                    values = experiment.run(cell)
                except Interrupted:
                    return INTERRUPTED
                except RunFailed as error:
                    warn(f"{cell.experiment} {cell.name}: failed. {error}")
                    code = 1
                else:
                    write_json(cell.path(results), record(cell, values))
    return code


def record(cell: Cell, values: Any) -> dict[str, Any]:
    """What a result file holds."""
    return {
        "experiment": cell.experiment,
        "arm": cell.arm,
        "seed": cell.seed,
        "digest": cell.digest,
        "settings": dict(cell.settings),
        "scoring": dict(cell.scoring),
        "values": dict(values),
        "made_with": {
            "diffkit": diffkit.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }


def spawn(arguments: Sequence[str], jobs: int) -> int:
    """Run this script `jobs` times with the arguments, one thread each; returns the worst code.

    A thread of its own for each process passes more work than threads that share one process, and
    on one thread the numbers of a CPU repeat bit by bit.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), *arguments]
    children = []

    def stop(number: int, _: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for _ in range(jobs):
            # In a session of its own, so that Ctrl-C reaches each child once, through `stop`.
            children.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
            )
        codes = [child.wait() for child in children]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return next((code for code in codes if code), 0)
