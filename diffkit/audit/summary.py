"""The result of an audit as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from diffkit.audit.measures import CONTROL, PROTECTED
from diffkit.audit.report import SHOWN_NUMBER
from diffkit.evaluation.wording import estimate_text, number

__all__ = ["print_summary"]

TOO_FEW = "too few pictures"


def print_summary(report: Mapping[str, Any], console: Console | None = None) -> None:
    """One table a model for edits, one for purifiers, and what was left out."""
    console = console or Console()
    for model in report["models"]:
        for table in _tables(model, report):
            console.print(table)
    for name, reason in report["refused"].items():
        console.print(f"refused: {name} ({reason})", highlight=False)
    for name, reason in report["unpaired"]["protected"].items():
        console.print(f"not paired: {name} ({reason})", highlight=False)
    unmasked = [text for text in report["control"] if "--mask" in text]
    for text in unmasked:
        console.print(f"random noise: {text}", highlight=False)
    if lone := report["unpaired"]["clean"]:
        console.print(f"not paired: {len(lone)} clean pictures", highlight=False)
    for name, reason in report["passed_over"].items():
        console.print(f"passed over: {name} ({reason})", highlight=False)
    for model in report["models"]:
        for name, reason in model["failed"].items():
            console.print(f"broken off: {name} ({reason})", highlight=False)
        for name, reason in model["skipped"].items():
            console.print(f"not measured with {model['name']}: {name} ({reason})", highlight=False)


def reading_of(found: Mapping[str, Any]) -> str:
    """What an effect says beside the control's."""
    if "clear" not in found:
        return "for information"
    if found["effect"][PROTECTED]["low"] is None:
        return TOO_FEW
    return "clear of random noise" if found["clear"] else "not clear of random noise"


def attacked_words(attacked: bool | None) -> str:
    """Whether the records say that a model was attacked."""
    return {True: "attacked", False: "not attacked", None: "no record says which was attacked"}[
        attacked
    ]


def shown_number(numbers: Mapping[str, Any]) -> str | None:
    """The number that a summary shows."""
    return next((name for name in SHOWN_NUMBER if name in numbers), None)


def _tables(model: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[Table]:
    title = f"{model['name']} ({attacked_words(model['attacked'])})"
    if model["threats"]:
        yield _edit_table(model, title, report)
    if model["purifiers"]:
        yield _purifier_table(model, title)
    for found in model["mimicry"]:
        yield _mimicry_table(found, title)


def _edit_table(model: Mapping[str, Any], title: str, report: Mapping[str, Any]) -> Table:
    about = f"{report['n']} pictures x {report['seeds']} noises, 95 % intervals"
    table = Table(title=f"Edits by {title}", caption=about)
    for head in ("edit", "number", "protected", "random noise", "x random", ""):
        table.add_column(head, overflow="fold")
    for row in model["threats"]:
        name = shown_number(row["numbers"])
        for key in filter(None, (name, "alignment" if "alignment" in row["numbers"] else None)):
            found = row["numbers"][key]
            table.add_row(
                f"{row['threat']} {row['setting']}",
                model["labels"][key],
                _estimate(found["effect"].get(PROTECTED), key == "alignment"),
                _estimate(found["effect"].get(CONTROL), key == "alignment"),
                number_of(found.get("over_random")),
                reading_of(found),
            )
    return table


def _purifier_table(model: Mapping[str, Any], title: str) -> Table:
    table = Table(title=f"Effect left behind purifiers, {title}")
    for head in ("edit", "purifier", "number", "left", "left of random noise", "its own cost"):
        table.add_column(head, overflow="fold")
    for row in model["purifiers"]:
        name = shown_number(row["retention"])
        if name is None:
            continue
        found = row["retention"][name]
        table.add_row(
            f"{row['threat']} {row['setting']}",
            row["purifier"],
            model["labels"][name],
            percent(found[PROTECTED]),
            percent(found[CONTROL]),
            _estimate(row["cost"].get(name)),
        )
    return table


def _mimicry_table(found: Mapping[str, Any], title: str) -> Table:
    table = Table(title=f"Imitation by {found['threat']}, {title}", caption=found["note"])
    for head in ("learnt from", "number", "value", "minus clean"):
        table.add_column(head, overflow="fold")
    for key, row in found["numbers"].items():
        for version, value in row["values"].items():
            change = row["effect"].get(version)
            table.add_row(
                found["sets"][version],
                found["labels"][key],
                _estimate(value),
                _estimate(change, signed=True),
            )
    return table


def _estimate(value: Mapping[str, Any] | None, signed: bool = False) -> str:
    return " ".join(estimate(value, signed))


def estimate(value: Mapping[str, Any] | None, signed: bool = False) -> tuple[str, str]:
    """A number and its interval as text; "–" for what was not measured or is undefined.

    Without an interval it says so: there were fewer than three pictures to draw from.
    """
    if value is None or value["value"] is None:
        return "–", ""
    if value["low"] is None or value["high"] is None:
        return number(value["value"], signed=signed), f"({TOO_FEW})"
    text, interval = estimate_text(value, signed)
    return text, f"[{interval}]"


def number_of(value: Mapping[str, Any] | None) -> str:
    """A ratio with its interval: "2.3× [2.1 to 2.6]"; "–" where there is none."""
    if value is None or value["value"] is None:
        return "–"
    text, interval = estimate(value)
    return f"{text}× {interval}"


def percent(value: Mapping[str, Any] | None) -> str:
    """A share with its interval: "54 % [50 to 58]"."""
    if value is None or value["value"] is None:
        return "n/a"
    shares = {key: None if v is None else 100 * v for key, v in value.items()}
    text, interval = estimate(shares)
    return f"{text} % {interval}"
