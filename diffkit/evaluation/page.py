"""report.html: one self-contained page that a person who sees it for the first time can read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from diffkit.evaluation.cost_table import cost_groups
from diffkit.evaluation.gallery import Extremes, Gallery
from diffkit.evaluation.plots import (
    cost_plot,
    difference_histogram,
    spectra_plot,
    spectrum_difference_plot,
    value_histogram,
)
from diffkit.evaluation.templates import render_page
from diffkit.evaluation.wording import (
    Verdict,
    command_line,
    estimate_text,
    number,
    role_names,
    verdict,
)
from diffkit.files import atomic_write

__all__ = ["PAGE_NAME", "write_page"]

PAGE_NAME = "report.html"

_DIRECTIONS = {"higher": "↑ higher is better", "lower": "↓ lower is better", None: "no better side"}

# What a metric's verdict is called on the page, in the page's order.
_VERDICTS: dict[Verdict, tuple[str, str]] = {
    "better": ("Clearly better", "The whole interval lies on the better side of zero."),
    "worse": ("Clearly worse", "The whole interval lies on the worse side of zero."),
    "changed": ("Clearly changed", "The interval excludes zero, but neither side is better."),
    "undecided": (
        "Undecided",
        "The interval contains zero: no change, or one too small for this many pictures.",
    ),
    "equal": ("Exactly equal", "The same value on every resample."),
}


@dataclass(frozen=True)
class Whisker:
    """A small interval plot: places from 0 to 200 on its axis, and the words at the axis' ends."""

    low: float
    high: float
    value: float
    zero: float
    ends: tuple[str, str]


@dataclass(frozen=True)
class Estimate:
    """A number and its interval as text."""

    value: str
    interval: str


@dataclass(frozen=True)
class MetricRow:
    """One line of the table of metrics."""

    name: str
    label: str
    direction: str
    values: dict[str, Estimate]
    difference: Estimate | None
    verdict: Verdict | None
    verdict_text: str
    whisker: Whisker
    facts: tuple[str, ...]
    about: str


def write_page(
    report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], folder: Path
) -> Path:
    """Write the page of a finished evaluation.

    The page holds its style, plots and pictures; it needs no other file and no network. The number
    of pictures on it is bounded whatever the size of the sets, and large ones become thumbnails.

    Args:
        report: the content of report.json.
        samples: the rows of samples.jsonl.
        folder: of the evaluation: where the pictures' paths start and report.html is written.

    Returns:
        The path of the page.
    """
    text = render_page("page.html", _content(report, samples, folder))
    with atomic_write(folder / PAGE_NAME, "w") as file:
        file.write(text)
    return folder / PAGE_NAME


def _content(
    report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], folder: Path
) -> dict[str, Any]:
    """Everything that the template names."""
    gallery = Gallery(samples, folder)
    names = role_names(report["sets"])
    rows = [_row(metric) for metric in report["metrics"]]
    per_picture = [metric for metric in report["metrics"] if metric["kind"] == "sample"]
    histograms, still = _histograms(per_picture, samples)
    compared = [row for row in rows if row.verdict is not None]
    return {
        "report": report,
        "two": len(report["sets"]) == 2,
        "paired": len(report["sets"]) == 2 and report["pairing"] != "none",
        "counts": {key: sum(key in row["pictures"] for row in samples) for key in report["sets"]},
        "roles": {key: names[key] for key in report["sets"]},
        "sets": {names[key]: (entry, _set_facts(entry)) for key, entry in report["sets"].items()},
        "level": f"{100 * report['level']:g} %",
        "rows": rows,
        "changes": _changes(compared),
        "by_chance": number(round((1 - report["level"]) * len(compared), 1)),
        "compared": len(compared),
        "blocks": gallery.blocks(),
        "large": gallery.large,
        "extremes": _extremes(gallery, per_picture),
        "spectra": _spectra(report["spectra"]),
        "histograms": histograms,
        "still": still,
        "cost_groups": cost_groups(report["cost"]),
        "cost_plot": Markup(cost_plot(report["cost"], names)) if report["cost"] else "",
        "command": command_line(report["command"]),
    }


def _row(metric: Mapping[str, Any]) -> MetricRow:
    difference = metric["difference"]
    said = verdict(difference, metric["better"])
    shown = metric["values"]["model"] if difference is None else difference
    return MetricRow(
        name=metric["name"],
        label=_label(metric),
        direction=_DIRECTIONS[metric["better"]],
        values={key: Estimate(*estimate_text(value)) for key, value in metric["values"].items()},
        difference=difference and Estimate(*estimate_text(difference, signed=True)),
        verdict=said,
        verdict_text=_VERDICTS[said][0].lower() if said else "",
        whisker=_whisker(shown, metric["better"], compared=difference is not None),
        facts=_facts(metric),
        about=metric["about"],
    )


def _facts(metric: Mapping[str, Any]) -> tuple[str, ...]:
    """What a number was measured with, without which it cannot be compared with another."""
    counts = f"n {metric['n']:,}"
    if metric["n_reference"] is not None:
        counts += f", reference n {metric['n_reference']:,}"
    found = [f"{counts}, seed {metric['seed']}, {metric['resamples']:,} resamples"]
    if metric["extractor"]:
        found.append(f"extractor: {metric['extractor']}")
    if metric["resize"]:
        found.append(f"resize: {metric['resize']}")
    if metric["note"]:
        found.append(metric["note"])
    return tuple(found)


def _label(metric: Mapping[str, Any]) -> str:
    """The metric's label without its network, which stands beside it as the extractor."""
    text = metric["label"].removesuffix(f" ({metric['extractor']})")
    # `str.capitalize` would lower the other letters.
    return text[:1].upper() + text[1:]


def _whisker(estimate: Mapping[str, float], better: str | None, compared: bool) -> Whisker:
    """Differences stand around zero with the better side right; values on an axis from zero."""
    low, value, high = (estimate[key] for key in ("low", "value", "high"))
    if compared:
        sign = -1 if better == "lower" else 1
        reach = 1.1 * max(abs(low), abs(high), abs(value)) or 1.0
        ends = ("less", "more") if better is None else ("worse", "better")
        low, value, high = (100 + 100 * sign * x / reach for x in (low, value, high))
        return Whisker(min(low, high), max(low, high), value, 100.0, ends)
    # A pivotal interval may lie beside its value.
    start, end = 1.1 * min(0.0, low, value), 1.1 * max(0.0, high, value)
    end = end if end > start else 1.0
    if not math.isfinite(end - start):
        return Whisker(0, 200, 200, 0, ("0", "∞"))
    low, value, high, zero = (200 * (x - start) / (end - start) for x in (low, value, high, 0.0))
    return Whisker(low, high, value, zero, (number(start), number(end)))


def _changes(rows: Sequence[MetricRow]) -> list[tuple[Verdict, str, str, list[MetricRow]]]:
    """(verdict, title, explanation, metrics) of each verdict that occurs."""
    return [
        (name, title, explanation, found)
        for name, (title, explanation) in _VERDICTS.items()
        if (found := [row for row in rows if row.verdict == name])
    ]


def _set_facts(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a set was made with; picture folders only have their place."""
    loras = ", ".join(f"{path} at weight {weight:g}" for path, weight in entry["loras"] or ())
    found = {
        "kind": {"model": "model", "pictures": "folder of pictures"}[entry["kind"]],
        "family": entry["family"],
        "steps": entry["steps"],
        "guidance": entry["guidance"],
        "scheduler": entry["scheduler"],
        "LoRA": loras,
        "weights": entry["weights"],
        "pictures in": entry["folder"],
    }
    return [(key, str(value)) for key, value in found.items() if value not in (None, "")]


def _extremes(gallery: Gallery, metrics: Sequence[Mapping[str, Any]]) -> list[Extremes]:
    found = [
        gallery.extremes(metric["name"], _label(metric), metric["better"])
        for metric in metrics
        if metric["better"] is not None
    ]
    return [extremes for extremes in found if extremes.ends]


def _spectra(spectra: Mapping[str, Any] | None) -> list[Markup]:
    if not spectra:
        return []
    plots = (spectra_plot(spectra), spectrum_difference_plot(spectra))
    return [Markup(plot) for plot in plots if plot]


def _histograms(
    metrics: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]
) -> tuple[list[tuple[str, Markup]], list[str]]:
    """(label, plot) of each metric, and the labels of those that changed in no picture.

    The plot shows differences where pictures have two values, else the values.
    """
    plots, still = [], []
    for metric in metrics:
        name, label = metric["name"], _label(metric)
        found = [sample["values"][name] for sample in samples if name in sample["values"]]
        if not all(len(value) == 2 for value in found):
            values = {key: [v[key] for v in found if key in v] for key in metric["values"]}
            plots.append((label, Markup(value_histogram(name, values))))
        elif any(value["model"] != value["against"] for value in found):
            changes = [value["model"] - value["against"] for value in found]
            plots.append((label, Markup(difference_histogram(name, changes, metric["better"]))))
        else:
            still.append(label)
    return plots, still
