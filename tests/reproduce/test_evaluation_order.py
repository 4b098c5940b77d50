"""The evaluation experiment: its command on tiny inputs, its verdicts and its table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import evaluation_order
import pytest
from diffkit.assets import path
from evaluation_order import ARMS, EXPECTED, EXPERIMENT, FORMS, LABELS, verdict
from matplotlib.figure import Figure
from runner.experiment import Results

from diffkit.cli import main as diffkit
from diffkit.files import read_json


def value(low: float, mid: float, high: float, better: str = "higher") -> dict[str, Any]:
    found = {"label": "L", "better": better, "n": 4, "model": mid, "against": 0.0}
    return found | {"difference_value": mid, "difference_low": low, "difference_high": high}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (value(0.1, 0.2, 0.3), 1),
        (value(-0.3, -0.2, -0.1), -1),
        (value(-0.1, 0.2, 0.3), 0),
        (value(0.0, 0.0, 0.0), 0),
        (value(0.1, 0.2, 0.3, "lower"), -1),
        (value(-0.3, -0.2, -0.1, "lower"), 1),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(found: dict[str, Any], expected: int) -> None:
    assert verdict(found) == expected


def test_every_arm_has_a_label_and_an_expectation() -> None:
    assert list(ARMS) == list(LABELS) == list(EXPECTED)


def known() -> Results:
    """Results as they should be, but for one verdict of one seed."""
    sides = {1: (0.1, 0.2, 0.3), 0: (0.0, 0.0, 0.0), -1: (-0.3, -0.2, -0.1)}
    cells = {
        (arm, seed): {name: value(*sides[EXPECTED[arm]]) for name in FORMS}
        for arm in ARMS
        for seed in (0, 1, 2)
    }
    cells["itself", 1]["concept"] = value(0.1, 0.2, 0.3)
    return Results(cells)


def test_the_table_counts_what_is_right() -> None:
    rows = evaluation_order.text(known()).splitlines()
    concept = next(row for row in rows if "100.0%" in row or "%" in row and "of 3" in row)
    assert concept.endswith(
        "| +20.0% (3 of 3) | +20.0% (3 of 3) | +6.7% (2 of 3) | -20.0% (3 of 3) |"
    )
    assert sum("(3 of 3)" in row for row in rows) == len(FORMS)


def test_the_figure_is_drawn_from_results_alone() -> None:
    figure = Figure()
    evaluation_order.draw(known(), figure)
    assert len(figure.axes) == len(FORMS)


@pytest.mark.parametrize("arm", ["itself", "four-steps"])
def test_a_tiny_evaluation(tmp_path: Path, arm: str) -> None:
    """The real command: zero with a zero interval against itself, a loss with fewer steps."""
    arms = {name: {**values, "steps": values.get("steps", 2)} for name, values in ARMS.items()}
    arms["four-steps"]["steps"] = 1
    small = replace(
        EXPERIMENT, arms=arms, settings={**EXPERIMENT.settings, "num": 8}, work=tmp_path
    )
    cell = small.cell(arm, 1)
    words = evaluation_order.command(cell, {}, str(path("sample")))
    words[words.index("--against-steps") + 1] = "2"
    assert diffkit(words) == 0
    found = evaluation_order.values(read_json(cell.work / "evaluation" / "report.json"))
    assert list(found) == EXPERIMENT.scoring["metrics"]
    differences = [one["difference_value"] for one in found.values()]
    if arm == "itself":
        assert differences == [0.0] * len(found)
        assert all(one["difference_low"] == one["difference_high"] == 0 for one in found.values())
    else:
        assert found["frechet"]["difference_value"] > 0
    assert evaluation_order.text(Results({(arm, 1): found}))
