"""The result of an evaluation as a few lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffkit.evaluation.wording import estimate_text, storage, verdict

__all__ = ["summary"]


def summary(report: Mapping[str, Any]) -> str:
    """One row a metric: each set's value with its interval, the difference and what it says."""
    against = "against" in report["sets"]
    head = ["", report["sets"]["model"]["name"]]
    if against:
        head += [report["sets"]["against"]["name"], "difference", ""]
    rows = [head, *(_metric_row(metric, against) for metric in report["metrics"])]
    rows += _cost_rows(report["cost"], against)
    wide = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, wide)).rstrip() for row in rows]
    lines += [f"not measured: {row['name']} ({row['reason']})" for row in report["skipped"]]
    return "\n".join(lines)


def _metric_row(metric: Mapping[str, Any], against: bool) -> list[str]:
    row = [metric["label"], _estimate(metric["values"].get("model"))]
    if against:
        found = verdict(metric["difference"], metric["better"])
        row += [
            _estimate(metric["values"].get("against")),
            _estimate(metric["difference"], signed=True),
            found or "",
        ]
    return row


def _estimate(value: Mapping[str, float] | None, signed: bool = False) -> str:
    return "-" if value is None else " ".join(_bracketed(value, signed))


def _bracketed(value: Mapping[str, float], signed: bool) -> tuple[str, str]:
    text, interval = estimate_text(value, signed)
    return text, f"[{interval}]"


def _cost_rows(cost: Mapping[str, Any], against: bool) -> list[list[str]]:
    sets = ("model", "against") if against else ("model",)
    rows: list[list[str]] = [["seconds a picture"], ["peak memory"], ["parameters"]]
    for name in sets:
        found = cost.get(name)
        cells = ("-", "-", "-") if found is None else _cost_cells(found)
        for row, cell in zip(rows, cells, strict=True):
            row.append(cell)
    return [row + [""] * 2 * against for row in rows] if cost else []


def _cost_cells(cost: Mapping[str, Any]) -> tuple[str, str, str]:
    memory = cost["peak_memory_bytes"]
    seconds = _estimate(cost["seconds"]["picture"])
    parameters = f"{sum(cost['parameters'].values()):,}"
    return seconds, "-" if memory is None else storage(memory), parameters
