"""The table of costs of the report page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffkit.evaluation.plots import STAGES
from diffkit.evaluation.wording import amount, interval_decimals, number, storage

__all__ = ["CostGroup", "CostRow", "cost_groups"]


@dataclass(frozen=True)
class CostRow:
    """One line: for each set a text and a smaller one, then candidate divided by baseline."""

    label: str
    cells: tuple[tuple[str, str], ...]
    ratio: str


@dataclass(frozen=True)
class CostGroup:
    """Lines under one heading."""

    title: str
    rows: tuple[CostRow, ...]


Costs = Mapping[str, Mapping[str, Any]]


def cost_groups(cost: Costs | None) -> list[CostGroup]:
    """The table, group by group; empty without costs."""
    if not cost:
        return []
    groups = [
        CostGroup("Time for one picture, drawn alone", tuple(_times(cost))),
        CostGroup("In batches", tuple(_batches(cost))),
        CostGroup("Multiply-accumulates", tuple(_counts(cost, "macs"))),
        CostGroup("Parameters", tuple(_counts(cost, "parameters"))),
        CostGroup("Measured on", tuple(_conditions(cost))),
    ]
    return groups


def _times(cost: Costs) -> list[CostRow]:
    rows = []
    for key, label in STAGES.items():
        found = [entry["seconds"].get(key) for entry in cost.values()]
        if any(found):
            unit = 1e3 if max(x["value"] for x in found if x) < 1 else 1
            cells = tuple(_time(x, unit) if x else ("–", "") for x in found)
            rows.append(CostRow(label, cells, _ratio([x and x["value"] for x in found])))
    speedup = cost.get("model", {}).get("speedup")
    if speedup:
        decimals = interval_decimals(speedup["low"], speedup["high"])
        value, low, high = (number(speedup[k], decimals) for k in ("value", "low", "high"))
        cells = ((f"{value}× as fast", f"{low} to {high}"), ("", ""))
        rows.append(CostRow("speed against the baseline", cells, ""))
    return rows


def _time(estimate: Mapping[str, float], factor: float) -> tuple[str, str]:
    decimals = interval_decimals(factor * estimate["low"], factor * estimate["high"])
    value, low, high = (number(factor * estimate[k], decimals) for k in ("value", "low", "high"))
    return f"{value} {'s' if factor == 1 else 'ms'}", f"{low} to {high}"


def _batches(cost: Costs) -> list[CostRow]:
    speed = [entry["pictures_per_second"] for entry in cost.values()]
    memory = [entry["peak_memory_bytes"] for entry in cost.values()]
    notes = [f"batch of {entry['batch_size']}" for entry in cost.values()]
    rows = [
        CostRow(
            "pictures a second",
            tuple((number(x, 2 if x < 100 else 0), note) for x, note in zip(speed, notes)),
            _ratio(speed),
        )
    ]
    if None not in memory:
        cells = tuple((storage(x), note) for x, note in zip(memory, notes))
        rows.append(CostRow("peak memory", cells, _ratio(memory)))
    return rows


def _counts(cost: Costs, kind: str) -> list[CostRow]:
    """Counts by component; those of `parameters` also have their sum."""
    names = list(dict.fromkeys(name for entry in cost.values() for name in entry[kind]))
    rows = []
    if kind == "parameters":
        sums = [sum(entry[kind].values()) for entry in cost.values()]
        rows.append(CostRow("all together", tuple((amount(x), "") for x in sums), _ratio(sums)))
    for name in names:
        found = [entry[kind].get(name) for entry in cost.values()]
        cells = tuple(("–" if x is None else amount(x), "") for x in found)
        label = STAGES.get(name, name) if kind == "macs" else name
        rows.append(CostRow(label, cells, _ratio(found)))
    return rows


def _conditions(cost: Costs) -> list[CostRow]:
    def row(label: str, texts: list[str]) -> CostRow:
        return CostRow(label, tuple((text, "") for text in texts), "")

    entries = list(cost.values())
    return [
        row("device", [entry["device"] for entry in entries]),
        row("arithmetic", [entry["dtype"] for entry in entries]),
        row("size", ["×".join(map(str, entry["size"])) for entry in entries]),
        row("steps", [str(entry["steps"]) for entry in entries]),
        row("guidance", ["two rows a step" if entry["guided"] else "off" for entry in entries]),
    ]


def _ratio(values: list[Any]) -> str:
    if len(values) < 2 or None in values or not values[1]:
        return ""
    ratio = values[0] / values[1]
    return f"{ratio:.2f}×" if ratio >= 0.1 else f"{ratio:.2g}×"
