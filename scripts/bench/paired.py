"""Paired measurements: two ways to do one thing, taken turn by turn in one run.

A machine's speed drifts (other processes, heat, clocks), so a quotient of two separate runs says
little. Here each pair measures both ways one after the other, in random order, and only the ratio
inside a pair counts. The result is the median ratio with a bootstrap interval. Nothing here passes
or fails anything: a benchmark reports, a person or a test judges.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffkit.files import write_json

__all__ = [
    "Ratio",
    "child",
    "command",
    "machine",
    "measure",
    "median_interval",
    "peak_memory",
    "ratio",
    "save",
    "seconds_of",
    "turns",
]

RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """How `candidate` compares with `baseline`: seconds(baseline) / seconds(candidate).

    Above 1 the candidate is faster. `low` and `high` bound the median ratio with 95 % confidence.
    """

    candidate: str
    baseline: str
    median: float
    low: float
    high: float
    ratios: tuple[float, ...]
    candidate_seconds: tuple[float, ...]
    baseline_seconds: tuple[float, ...]

    def line(self) -> str:
        """The result in one line for a person."""
        return (
            f"{self.candidate} / {self.baseline} speed: {self.median:.3f} "
            f"[{self.low:.3f}, {self.high:.3f}] over {len(self.ratios)} pairs "
            f"({statistics.median(self.candidate_seconds):.4g} s / "
            f"{statistics.median(self.baseline_seconds):.4g} s)"
        )


def median_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """(median, low, high): the median and its 95 % percentile-bootstrap interval."""
    data = np.asarray(values, dtype=np.float64)
    rows = np.random.default_rng(seed).integers(0, len(data), (RESAMPLES, len(data)))
    low, high = np.percentile(np.median(data[rows], axis=1), [2.5, 97.5])
    return float(np.median(data)), float(low), float(high)


def measure(
    candidate: Callable[[], object],
    baseline: Callable[[], object],
    *,
    names: tuple[str, str] = ("candidate", "baseline"),
    pairs: int = 20,
    warmup: int = 2,
    seed: int = 0,
    clock: Callable[[], float] | None = None,
) -> Ratio:
    """Call both `warmup` times, then `pairs` times each, the order inside a pair drawn by `seed`.

    `clock` returns seconds; the default waits for a CUDA device before it looks at the time.
    """
    now = clock or synchronized_time
    calls = (candidate, baseline)
    for _ in range(warmup):
        candidate()
        baseline()
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in turns(pairs, seed):
        for which in pair:
            start = now()
            calls[which]()
            seconds[which].append(now() - start)
    return ratio(*seconds, names=names, seed=seed)


def turns(pairs: int, seed: int = 0) -> list[tuple[int, int]]:
    """The order inside each pair, (0, 1) or (1, 0); 0 is the candidate."""
    order = random.Random(seed)
    return [(0, 1) if order.random() < 0.5 else (1, 0) for _ in range(pairs)]


def ratio(
    candidate: Sequence[float],
    baseline: Sequence[float],
    *,
    names: tuple[str, str] = ("candidate", "baseline"),
    seed: int = 0,
) -> Ratio:
    """The result of paired seconds, for those who cannot hand both sides over as callables."""
    ratios = tuple(slow / fast for fast, slow in zip(candidate, baseline, strict=True))
    return Ratio(*names, *median_interval(ratios, seed), ratios, tuple(candidate), tuple(baseline))


def synchronized_time() -> float:
    """Seconds of the wall clock, after the CUDA device, if any is in use, has finished."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(call: Callable[[], object], repeats: int = 3) -> float:
    """Median seconds of a call, after one call to warm up."""
    call()
    took = []
    for _ in range(repeats):
        start = synchronized_time()
        call()
        took.append(synchronized_time() - start)
    return statistics.median(took)


def command(argv: Sequence[str]) -> Callable[[], None]:
    """A callable that runs a command to its end and raises when it fails."""

    def run() -> None:
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)

    return run


def child(argv: Sequence[str]) -> Any:
    """Run a command and return the JSON on its last line of output.

    Memory is compared this way, each arm in a process of its own that prints `peak_memory()`.
    """
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_memory() -> int:
    """The most bytes this process has held: of the CUDA device in use, else of its RAM.

    RAM is the kernel's high-water mark of the resident set. `getrusage` will not do: its number is
    inherited from the parent through `fork` and `exec`.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def processor() -> str:
    """The name of the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def save(path: Path, results: dict[str, Any], ratios: Sequence[Ratio] = ()) -> None:
    """Write results and machine as JSON, whole or not at all, and print one line a ratio."""
    rows = [asdict(ratio) for ratio in ratios]
    write_json(path, {"argv": sys.argv, "machine": machine(), **results, "ratios": rows})
    for ratio in ratios:
        print(ratio.line())
    print(f"written to {path}")
