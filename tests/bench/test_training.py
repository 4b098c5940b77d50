"""The training benchmark: its two loops train on the same losses, its turns are fair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import synthetic
import training

from diffkit.console import set_quiet
from diffkit.files import read_json


@pytest.fixture
def setting(tmp_path: Path) -> training.Setting:
    model = synthetic.random_model(tmp_path / "model", "tiny")
    data = synthetic.random_pictures(tmp_path / "data", 8, synthetic.SHAPES["tiny"].size)
    return training.Setting(str(model), str(data), str(tmp_path), 2, "no", 1, 4, 2)


@pytest.mark.parametrize("cached", [False, True])
def test_both_loops_have_equal_losses(setting: training.Setting, cached: bool) -> None:
    """On the same draws; fused and plain AdamW may differ in the last bits."""
    losses = training.equal_losses(setting, cached, steps=4)
    assert len(losses["ours"]) == 4
    assert losses["largest_difference"] < 1e-5


def test_turns_time_each_loop_as_often(setting: training.Setting) -> None:
    made: list[str] = []

    class Loop:
        def step(self) -> float:
            made.append("plain")
            return 0.0

    turns = training.Turns(setting, warmup=1).start(Loop())
    for block in range(turns.steps // setting.block):
        made.extend(["ours"] * setting.block)
        turns(block, None)
    timed_blocks = 1 + setting.pairs
    assert [len(seconds) for seconds in turns.seconds] == [timed_blocks] * 2
    assert made.count("plain") == setting.block * timed_blocks
    assert made.count("ours") == turns.steps
    assert len(turns.ratio("ours").ratios) == setting.pairs


@pytest.mark.slow
def test_the_whole_benchmark_writes_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "tiny", "--batch", "2", "--pairs", "2", "--block", "1", "--workers", "1"]
    flags += ["--repeats", "1"]
    try:
        assert training.main([*flags, "--output", str(tmp_path)]) == 0
    finally:
        set_quiet(False)
    report = read_json(tmp_path / "training.json")
    assert {"uncached", "cached", "memory", "machine", "ratios"} <= set(report)
    assert json.dumps(report)
    assert "diffkit, cached / plain loop speed" in capsys.readouterr().out
