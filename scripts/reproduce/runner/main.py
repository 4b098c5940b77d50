"""The command line of every experiment."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffkit.console import say, warn
from diffkit.errors import UserError
from runner import ROOT
from runner.experiment import Experiment, Results
from runner.report import write_readme, write_report
from runner.work import INTERRUPTED, make, spawn

__all__ = ["COMMITTED", "main"]

COMMITTED = ROOT / "scripts" / "reproduce" / "results"


def arguments(experiment: Experiment, words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=experiment.title)
    parser.add_argument("--only", nargs="+", choices=list(experiment.arms), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, choices=experiment.seeds, metavar="SEED")
    parser.add_argument("--jobs", type=int, default=1, help="processes beside each other")
    parser.add_argument("--report-only", action="store_true", help="make nothing, only the report")
    help_results = "folder of the result files; another one than the committed makes them anew"
    parser.add_argument("--results", type=Path, default=COMMITTED, help=help_results)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(experiment: Experiment, words: Sequence[str] | None = None) -> int:
    """Make what is missing or stale, then write the report; returns the exit code."""
    words = sys.argv[1:] if words is None else words
    args = arguments(experiment, words)
    results = args.results.resolve()
    cells = experiment.cells(args.only or experiment.arms, args.seeds or experiment.seeds)
    try:
        if args.worker:
            # Training catches it by itself; anything else ends as it does at Ctrl-C.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            return make(experiment, cells, results)
        code = 0
        if not args.report_only and any(cell.state(results) != "done" for cell in cells):
            code = spawn([*words, "--results", str(results), "--worker"], args.jobs)
        report(experiment, results)
    except UserError as error:
        warn(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def report(experiment: Experiment, results: Path) -> None:
    """Write summary and figure; and the README's section when these are the committed results."""
    text = write_report(experiment, results)
    if not text:
        say(f"{experiment.name}: no results yet.")
        return
    print(text)
    if results == COMMITTED:
        write_readme(ROOT / "README.md", results)
    else:
        for line in comparison(experiment, results):
            print(line)


def comparison(experiment: Experiment, results: Path) -> list[str]:
    """A line a cell that was made anew: how its numbers differ from the committed ones."""
    anew, committed = (Results.read(experiment, folder) for folder in (results, COMMITTED))
    lines = []
    for (arm, seed), values in anew.values.items():
        if (arm, seed) not in committed.values:
            continue
        pairs = zip(numbers(values), numbers(committed.values[arm, seed]), strict=True)
        gaps = {name: abs(new - old) for (name, new), (_, old) in pairs}
        widest = max(gaps, key=lambda name: gaps[name])
        equal = sum(gap == 0 for gap in gaps.values())
        lines.append(
            f"{arm}-{seed}: {equal} of {len(gaps)} numbers equal the committed ones; the widest "
            f"gap is {gaps[widest]:.3g}, in {widest}."
        )
    return lines


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every number of nested values with the path that leads to it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from numbers(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from numbers(inner, f"{name}[{index}]")
    elif isinstance(value, (int, float)):
        yield name, float(value)
