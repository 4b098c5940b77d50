"""Tables, figures and the README's section, from the result files alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from diffkit.files import atomic_write
from runner.experiment import Experiment, Results
from runner.intervals import Difference, paired_difference

__all__ = [
    "MORE",
    "Measure",
    "contrast_table",
    "interval_text",
    "section",
    "write_readme",
    "write_report",
]

MORE = "<!-- more -->"
"""A line of an experiment's text: what follows stands in its summary and not in the README."""

BEGIN, END = "<!-- experiments:begin -->", "<!-- experiments:end -->"
SUMMARY, FIGURE = "summary.md", "figure.png"


@dataclass(frozen=True)
class Measure:
    """One row of a table: the key in the result files, its label, and how it is printed.

    `form` is a format specification such as ".1%" or ".4f"; `index` picks from a list of numbers.
    """

    key: str
    label: str
    form: str
    index: int | None = None


def interval_text(difference: Difference, form: str) -> str:
    """`+1.2% [-0.3%, +2.7%]`, or `+1.2% (1 seed)`, which says nothing of the spread."""
    if not math.isfinite(difference.low):
        return f"{difference.mean:+{form}} (1 seed)"
    mean, low, high = (
        format(value, f"+{form}") for value in (difference.mean, difference.low, difference.high)
    )
    return f"{mean} [{low}, {high}]"


def contrast_table(
    results: Results, arm: str, baseline: str, measures: Sequence[Measure]
) -> list[str]:
    """Markdown rows: both arms' means over the seeds, the paired difference, its interval."""
    seeds = results.seeds(arm, baseline)
    if not seeds:
        return [f"No seed has both {baseline} and {arm} yet."]
    lines = [
        f"| measure | {baseline} | {arm} | {arm} - {baseline}, 95 % interval | seed by seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for measure in measures:
        columns = [results.column(name, measure.key, seeds) for name in (arm, baseline)]
        if measure.index is not None:
            columns = [[value[measure.index] for value in column] for column in columns]
        difference = paired_difference(*columns)
        means = [format(sum(column) / len(seeds), measure.form) for column in columns]
        by_seed = ", ".join(format(value, f"+{measure.form}") for value in difference.values)
        lines.append(
            f"| {measure.label} | {means[1]} | {means[0]} | "
            f"{interval_text(difference, measure.form)} | {by_seed} |"
        )
    return lines


def section(experiment: Experiment, results: Results) -> str:
    """The Markdown of one experiment, its figure beside it."""
    lines = [f"### {experiment.title}", "", experiment.text(results)]
    lines += ["", f"![{experiment.title}]({FIGURE})"]
    lines += ["", f"`python scripts/reproduce/{experiment.name}.py` makes it."]
    return "\n".join(lines) + "\n"


def write_report(experiment: Experiment, results: Path) -> str:
    """Write the summary and the figure beside the result files; returns the summary, if any."""
    found = Results.read(experiment, results)
    if not found:
        return ""
    folder = results / experiment.name
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    experiment.draw(found, figure)
    with atomic_write(folder / FIGURE) as file:
        # Without the version of matplotlib, equal numbers give equal bytes for longer.
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    text = section(experiment, found)
    with atomic_write(folder / SUMMARY, "w") as file:
        file.write(text)
    return text


def write_readme(readme: Path, results: Path) -> None:
    """Fill the part between the markers with the summaries of all experiments, by name."""
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    with atomic_write(readme, "w") as file:
        file.write(before + between(readme.parent, results) + after)


def between(root: Path, results: Path) -> str:
    """The README's part with its markers; figures are linked from `root`."""
    parts = [BEGIN]
    for path in sorted(results.glob(f"*/{SUMMARY}")):
        figure = (path.parent / FIGURE).relative_to(root).as_posix()
        text = _shortened(path.read_text(encoding="utf-8"), path.relative_to(root).as_posix())
        parts.append(text.replace(f"]({FIGURE})", f"]({figure})"))
    return "\n".join([*parts, END])


def _shortened(text: str, summary: str) -> str:
    """A summary up to its `MORE`, then its figure and command, and where the rest stands."""
    if MORE not in text:
        return text
    head, rest = text.split(MORE)
    tail = rest[rest.rindex("![") :]
    return f"{head.rstrip()}\n\n{tail.rstrip()} [All tables]({summary}).\n"
