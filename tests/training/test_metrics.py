"""Rows of metrics.jsonl, and the runs of trackers."""

from __future__ import annotations

import json
import time

import pytest
import torch

from diffkit.errors import RunFailed
from diffkit.training.metrics import Metrics, StepRecord
from diffkit.training.trackers import run_id


def seconds(path):
    return [json.loads(line)["seconds"] for line in path.read_text().splitlines()]


def test_seconds_are_shared_out_between_flushes(tmp_path):
    """The wait for a GPU falls into the reading of numbers; it is the time of all their steps."""

    def slow(numbers):
        time.sleep(0.3)
        return numbers

    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, slow, write=True, skipped_steps=False, track=lambda row: None)
    for step in range(1, 4):
        metrics.record(StepRecord(step, 0, 1e-3, step, {"loss": torch.ones(())}))
    metrics.flush()
    time.sleep(0.5)
    metrics.pause()  # a checkpoint
    metrics.record(StepRecord(4, 0, 1e-3, 4, {"loss": torch.ones(())}))
    metrics.flush()
    assert seconds(path)[:3] == [pytest.approx(0.1, abs=0.05)] * 3
    assert seconds(path)[3] == pytest.approx(0.3, abs=0.15)


def rows_of(tmp_path, *records):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(
        path, lambda x: 2 * x, write=True, skipped_steps=False, track=lambda row: None
    )
    for record in records:
        metrics.record(record)
    metrics.flush()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_pair_is_logged_as_the_ratio_of_its_sums(tmp_path):
    """Over micro-batches and processes (here two equal ones), not as a mean of ratios."""
    record = StepRecord(1, 0, 1e-3, 4)
    ones = torch.ones(2)
    for share, under in (([1.0, 2.0], [4.0, 0.0]), ([3.0, 0.0], [0.0, 8.0])):
        pair = (torch.tensor(share), torch.tensor(under))
        record.add(
            "", {"loss": ones, "time": ones / 2, "ratio": pair, "none": (ones, 0 * ones)}, 1 / 8
        )
    (row,) = rows_of(tmp_path, record)
    assert row["ratio"] == 0.5
    assert row["none"] is None
    assert row["loss"] == 1.0
    assert row["loss_by_time"][5] == 1.0
    assert row["count_by_time"][5] == 8


def test_a_ratio_that_is_not_finite_stops_the_run(tmp_path):
    record = StepRecord(1, 0, 1e-3, 2)
    record.add(
        "", {"loss": torch.ones(2), "r": (torch.ones(2), torch.tensor([1.0, torch.nan]))}, 0.5
    )
    with pytest.raises(RunFailed, match="r is nan"):
        rows_of(tmp_path, record)


def test_wandb_runs_of_equal_folder_names_are_different_runs(tmp_path):
    """A run that goes on is the same run; one that starts anew in its folder is another."""
    a, b = tmp_path / "a" / "out", tmp_path / "b" / "out"
    a.mkdir(parents=True)
    b.mkdir(parents=True)
    first = run_id(a, 0)
    assert run_id(b, 0) != first
    assert run_id(a, 100) == first
    assert run_id(a, 0) != first
