"""A true experiment of one addition, for the tests of the runner; also a script."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from runner.experiment import Cell, Experiment, Results
from runner.main import main
from runner.report import Measure, contrast_table

ARMS: dict[str, dict[str, Any]] = {"plain": {"gain": 0.0}, "better": {"gain": 1.0}}


def run(cell: Cell) -> dict[str, Any]:
    """seed + gain; leaves a line a call in the work folder, to count calls."""
    cell.work.mkdir(parents=True, exist_ok=True)
    with open(cell.work / "calls.txt", "a") as file:
        file.write("called\n")
    time.sleep(cell.settings["seconds"])
    value = cell.seed + cell.settings["gain"] * cell.settings["scale"]
    return {"value": value, "twice": [value, 2 * value]}


def text(results: Results) -> str:
    measures = [Measure("value", "the value", ".2f"), Measure("twice", "twice it", ".1f", 1)]
    return "\n".join(contrast_table(results, "better", "plain", measures))


def draw(results: Results, figure: Any) -> None:
    axes = figure.subplots()
    axes.plot(results.column("better", "value", results.seeds("better")))


def toy(work: Path, seconds: float = 0.0, scale: float = 1.0) -> Experiment:
    return Experiment(
        name="toy",
        title="Toy",
        arms=ARMS,
        seeds=(0, 1, 2),
        settings={"scale": scale, "seconds": seconds},
        scoring={"digits": 2},
        run=run,
        text=text,
        draw=draw,
        work=work,
    )


if __name__ == "__main__":
    sys.exit(main(toy(Path(os.environ["TOY_WORK"]), seconds=0.2)))
