"""The threats by name, and the reading of `--threats sdedit,inpaint,lora`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffkit.audit.edits import EditThreat, InpaintThreat, SdeditThreat
from diffkit.audit.sdedit import Edit
from diffkit.errors import UserError

__all__ = ["KNOWN", "MIMICRY", "STRENGTHS", "Threats", "parse_threats"]

STRENGTHS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
HONEST_FROM = 0.5
"""From this strength on little of the picture is left, and so little of any protection."""

MIMICRY = ("lora", "dreambooth", "textual-inversion")
"""Threats that train on the whole set."""

KNOWN = ("sdedit", "sdedit:guided", "inpaint", *MIMICRY)
_MAIN = 0.3


@dataclass(frozen=True)
class Threats:
    """What was asked for.

    Attributes:
        edits: one a row of the table, in order.
        main: the row of each threat behind purifiers, by the threat's name.
        mimicry: names of `MIMICRY`.
    """

    edits: tuple[EditThreat, ...]
    main: dict[str, EditThreat]
    mimicry: tuple[str, ...]


def parse_threats(text: str, strengths: Sequence[float] = STRENGTHS) -> Threats:
    """Read a list such as "sdedit,sdedit:guided,lora".

    Raises `UserError` for an unknown name, one that is there twice, an empty list, and impossible
    strengths.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"--threats {text!r}: names no threat. Known: {', '.join(KNOWN)}.")
    for name in names:
        if name not in KNOWN:
            raise UserError(f"--threats {name}: unknown. Known: {', '.join(KNOWN)}.")
        if names.count(name) > 1:
            raise UserError(f"--threats {name}: is there twice; name each once.")
    if "sdedit" in names and (not strengths or len(set(strengths)) < len(strengths)):
        raise UserError("--strengths: give each strength once, such as 0.1 0.3.")
    edits: list[EditThreat] = []
    main: dict[str, EditThreat] = {}
    for name in names:
        rows = _rows(name, sorted(strengths))
        if rows:
            main[name] = _nearest(rows) if name == "sdedit" else rows[0]
        edits += rows
    return Threats(tuple(edits), main, tuple(name for name in names if name in MIMICRY))


def _rows(name: str, strengths: Sequence[float]) -> list[EditThreat]:
    if name == "sdedit":
        return [SdeditThreat(Edit(s), honest=s >= HONEST_FROM) for s in strengths]
    if name == "sdedit:guided":
        return [SdeditThreat(Edit(_MAIN, 50, 7.5), name="sdedit:guided")]
    return [InpaintThreat()] if name == "inpaint" else []


def _nearest(rows: Sequence[EditThreat]) -> EditThreat:
    return min(rows, key=lambda row: abs(row.parameters["strength"] - _MAIN))
