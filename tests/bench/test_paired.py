"""The measuring tool measured: known ratios on a fake clock, coverage, isolation of memory."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import paired
import pytest
import torch


class Clock:
    """A clock that only the measured work moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: float, noise: float = 0.0, seed: int = 0):
        draw = random.Random(seed)

        def run() -> None:
            self.calls.append(name)
            self.now += seconds * (1 + noise * draw.random())

        return run


def test_a_known_ratio_is_found_exactly() -> None:
    clock = Clock()
    result = paired.measure(clock.work("fast", 1.0), clock.work("slow", 2.0), clock=clock)
    assert (result.median, result.low, result.high) == (2.0, 2.0, 2.0)
    assert len(result.ratios) == 20


def test_drift_shared_by_a_pair_cancels() -> None:
    """The machine becomes ten times slower on the way; the ratio inside each pair stays."""
    clock = Clock()

    def work(seconds: float):
        def run() -> None:
            clock.now += seconds * (1 + clock.now)

        return run

    result = paired.measure(work(1e-3), work(2e-3), pairs=200, warmup=0, clock=clock)
    assert result.candidate_seconds[-1] > 1.5 * result.candidate_seconds[0]
    assert result.median == pytest.approx(2.0, rel=0.01)


def test_each_pair_holds_both_in_a_drawn_order() -> None:
    clock = Clock()
    paired.measure(clock.work("a", 1), clock.work("b", 1), pairs=50, warmup=3, clock=clock)
    assert clock.calls[:6] == ["a", "b"] * 3
    measured = clock.calls[6:]
    pairs = ["".join(measured[i : i + 2]) for i in range(0, 100, 2)]
    assert set(pairs) == {"ab", "ba"}
    assert 10 < pairs.count("ab") < 40
    again = Clock()
    paired.measure(again.work("a", 1), again.work("b", 1), pairs=50, warmup=3, clock=again)
    assert again.calls == clock.calls


def test_the_interval_covers_the_true_median() -> None:
    """95 % intervals of 200 samples of known median: between 88 % and 100 % of them cover it."""
    draw = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        ratios = np.exp(draw.normal(np.log(1.5), 0.2, 25))
        _, low, high = paired.median_interval(ratios, seed)
        covered += low <= 1.5 <= high
    assert 176 <= covered <= 200


def test_the_interval_is_repeatable() -> None:
    values = [1.0, 1.2, 0.9, 1.4, 1.1]
    assert paired.median_interval(values) == paired.median_interval(values)


def test_a_failing_command_is_an_error(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    paired.command([sys.executable, "-c", f"open({str(mark)!r}, 'w')"])()
    assert mark.exists()
    with pytest.raises(Exception, match="exit status 3"):
        paired.command([sys.executable, "-c", "raise SystemExit(3)"])()


def test_peak_memory_of_a_child_is_its_own() -> None:
    """This process holds 400 MB: a small child does not inherit the mark, a big one shows it."""
    ballast = torch.ones(100_000_000)
    assert paired.peak_memory() > 4 * ballast.numel()
    script = "import sys; from pathlib import Path; b = bytearray(int(sys.argv[1])); b[:] = b; "
    script += "print([x.split()[1] for x in Path('/proc/self/status').read_text().splitlines() "
    script += "if x.startswith('VmHWM')][0])"
    small, big = (
        paired.child([sys.executable, "-c", script, str(size)]) * 1024 for size in (0, 300_000_000)
    )
    assert small < 100_000_000
    assert 290_000_000 < big - small < 650_000_000


def test_the_report_is_complete_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    names = ("ours", "plain")
    ratio = paired.measure(clock.work("a", 1), clock.work("b", 3), names=names, clock=clock)
    paired.save(tmp_path / "result.json", {"batch": 4}, [ratio])
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["batch"] == 4
    assert saved["ratios"][0]["median"] == 3.0
    assert {"cpu", "threads", "torch", "gpu"} <= set(saved["machine"])
    assert "ours / plain speed: 3.000 [3.000, 3.000]" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
