"""How a row of a table names two pictures and which of them is better.

The pictures stand in one of these pairs of columns, in a folder's table as paths below the folder,
in shards and hub sets as encoded pictures:

- `winner`, `loser`: the first was preferred to the second;
- `image_0`, `image_1`, or Pick-a-Pic's `jpg_0`, `jpg_1`: `label_0` says how the first one did, 1
  (preferred), 0 (the other one was), 0.5 (a tie). `label_1`, where it is there, is 1 - `label_0`; a
  row has no label where `label_0` is empty or `has_label` is false.

The caption is in `text`, `txt`, `caption` or `prompt`, the first of them that is there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from diffkit.data.columns import CAPTIONS, NUMBERED_PAIRS, RANKED_PAIR
from diffkit.errors import UserError

__all__ = [
    "PairColumns",
    "Verdict",
    "Tally",
    "find_pair_columns",
    "left_out",
    "none_left",
    "verdict",
]

Verdict: TypeAlias = Literal["first", "second", "tie", "no label"]
"""Which picture of a row was preferred."""

_LABELS = ("label_0", "label_1", "has_label")
_KNOWN = (
    "winner and loser, or image_0, image_1 and label_0, or jpg_0, jpg_1 and label_0 "
    "(1 where the first picture is the better one, 0 where the second is, 0.5 for a tie)"
)


class Tally(Protocol):
    """How many `rows` a table has, and which of them are no pairs to learn from.

    `ties` prefer neither picture, `unlabelled` do not say, `equal` prefer a picture to itself.
    """

    rows: int
    ties: int
    unlabelled: int
    equal: int


def left_out(tally: Tally) -> str:
    """The kinds of rows that are left out, with their numbers."""
    text = f"{tally.ties} ties, {tally.unlabelled} without a label"
    return f"{text}, {tally.equal} of a picture with itself" if tally.equal else text


def none_left(tally: Tally) -> str:
    """Why a table with these rows has no pair, for one that has none."""
    if tally.unlabelled == tally.rows:
        return f"none of its {tally.rows} rows has a label"
    return f"none of its {tally.rows} rows prefers a picture ({left_out(tally)})"


@dataclass(frozen=True)
class PairColumns:
    """Names of the columns of the two pictures, of the caption (None without), and of the labels.

    Without labels the first picture of each row is the better one.
    """

    pictures: tuple[str, str]
    caption: str | None
    labels: tuple[str, ...]

    @property
    def used(self) -> tuple[str, ...]:
        """All of them; the other columns of a table are extras."""
        return (*self.pictures, *([self.caption] if self.caption else []), *self.labels)


def find_pair_columns(
    columns: Collection[str], place: str, caption: str | None = None
) -> PairColumns:
    """The columns of pairs among those of a table; see the module for their names.

    Raises `UserError` naming `place` and its columns when the pictures, their labels or the
    `caption` column that was asked for cannot be told.
    """
    listed = f"Its columns: {', '.join(columns)}."
    if caption is not None and caption not in columns:
        raise UserError(f'{place}: has no column "{caption}". {listed}')
    begun = [
        pair for pair in (RANKED_PAIR, *NUMBERED_PAIRS) if any(name in columns for name in pair)
    ]
    if not begun:
        raise UserError(f"{place}: names no pairs of pictures; expected {_KNOWN}. {listed}")
    if len(begun) > 1:
        found = ", ".join(name for pair in begun for name in pair if name in columns)
        raise UserError(f"{place}: holds {found}; keep one pair of them: {_KNOWN}. {listed}")
    pictures = begun[0]
    for name in pictures:
        if name not in columns:
            raise UserError(f'{place}: has no column "{name}"; expected {_KNOWN}. {listed}')
    labels = tuple(name for name in _LABELS if name in columns)
    if pictures == RANKED_PAIR and labels:
        raise UserError(
            f"{place}: has {', '.join(labels)} beside winner and loser, which say already which "
            f"picture is the better one; keep one of the two. {listed}"
        )
    if pictures != RANKED_PAIR and "label_0" not in labels:
        raise UserError(
            f'{place}: has no column "label_0", which says which picture of a row is the better '
            f"one (1 the first, 0 the second, 0.5 a tie). {listed}"
        )
    if caption is None:
        caption = next((name for name in CAPTIONS if name in columns), None)
    return PairColumns(pictures, caption, labels)


def verdict(row: Mapping[str, object], columns: PairColumns) -> Verdict:
    """What a row says of its pictures. Raises ValueError, with the reason, for a wrong label."""
    if not columns.labels:
        return "first"
    if _is_false(row.get("has_label")):
        return "no label"
    value = _number(row.get("label_0"), "label_0")
    if value is None:
        return "no label"
    other = _number(row.get("label_1"), "label_1")
    if other is not None and other + value != 1:
        raise ValueError(f'"label_0" is {value:g} and "label_1" is {other:g}; their sum must be 1')
    if value == 0.5:
        return "tie"
    return "first" if value == 1 else "second"


def _is_false(value: object) -> bool:
    """False as JSON, parquet and CSV write it; where the cell is empty `label_0` decides."""
    if value is None:
        return False
    text = str(value).lower()
    if text not in ("true", "false", "1", "0"):
        raise ValueError(f'"has_label" must be true or false, not {value!r}')
    return text in ("false", "0")


def _number(value: object, column: str) -> float | None:
    """One of 0, 0.5 and 1; None for an empty cell."""
    if value is None:
        return None
    try:
        number = float(str(value))
    except ValueError:
        number = -1.0
    if math.isnan(number):
        return None
    if number not in (0, 0.5, 1) or isinstance(value, bool):
        raise ValueError(f'"{column}" must be 0, 0.5 or 1, not {value!r}')
    return number
