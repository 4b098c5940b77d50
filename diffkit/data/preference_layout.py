"""A folder of preference pairs: pictures, and a metadata table that names two of them a row."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffkit.data.columns import CAPTIONS, NUMBERED_PAIRS, RANKED_PAIR, has_pair_columns
from diffkit.data.layout import (
    TABLES,
    Problem,
    find_table,
    named_picture,
    row_fault,
    texts_of,
    unlisted,
)
from diffkit.data.metadata import Row, columns_of, read_table
from diffkit.data.preference_columns import (
    PairColumns,
    find_pair_columns,
    verdict,
)
from diffkit.errors import UserError

__all__ = ["PairEntry", "PairLayout", "is_pair_folder", "read_pair_layout"]


@dataclass(frozen=True)
class PairEntry:
    """A row that prefers one picture to another; names are paths below the folder.

    `row` counts from 0 over all rows of the table.
    """

    row: int
    winner: str
    loser: str
    captions: tuple[str, ...] = ()
    extras: Mapping[str, object] = field(default_factory=dict)


@dataclass
class PairLayout:
    """The pairs of a folder in the order of the table; `names` are their pictures, each once.

    `faults` are rows that make the folder unusable; `remarks` are pairs without a caption, or one
    where none has any, pairs of a picture with itself, and pictures that no row names. Rows that
    are no pairs are counted by their kinds; see `Tally`.
    """

    root: Path
    table: Path
    rows: int
    entries: list[PairEntry] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    faults: list[Problem] = field(default_factory=list)
    remarks: list[Problem] = field(default_factory=list)
    ties: int = 0
    unlabelled: int = 0
    equal: int = 0


def is_pair_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether the metadata table of a folder is about pairs and not about single pictures.

    Both, with columns of either, is for `read_pair_layout` to refuse. Raises `UserError` for a
    missing folder and a table that cannot be read.
    """
    _, table = find_table(Path(folder))
    if table is None:
        return False
    columns = columns_of(table, read_table(table))
    return bool(_whole_pairs(columns)) or (has_pair_columns(columns) and "file_name" not in columns)


def _whole_pairs(columns: Collection[str]) -> list[str]:
    """The names of those pairs of which both are among the columns."""
    pairs = (RANKED_PAIR, *NUMBERED_PAIRS)
    return [name for pair in pairs if all(n in columns for n in pair) for name in pair]


def read_pair_layout(
    folder: str | os.PathLike[str], caption_column: str | None = None
) -> PairLayout:
    """Read the pairs of a folder; see `preference_columns` for the columns of its table.

    Raises `UserError` when the folder or its table is missing, the table cannot be read, or it does
    not have the columns of pairs, or those of single pictures beside them.
    """
    root = Path(folder)
    names, table = find_table(root)
    if table is None:
        raise UserError(
            f"{root}: holds no metadata table; pairs of pictures are named in one of "
            f"{', '.join(TABLES)}."
        )
    rows = read_table(table)
    if not rows:
        raise UserError(f"{table}: has no rows.")
    found = columns_of(table, rows)
    whole = _whole_pairs(found)
    if whole and "file_name" in found:
        raise UserError(
            f"{table}: has the column file_name, of single pictures, beside {', '.join(whole)}, of "
            f"preference pairs; keep one of the two. Its columns: {', '.join(found)}."
        )
    columns = find_pair_columns(found, str(table), caption_column)
    layout, present, listed = PairLayout(root, table, len(rows)), set(names), set()
    for number, row in enumerate(rows):
        try:
            pictures = [named_picture(root, row, name, present) for name in columns.pictures]
            listed.update(pictures)
            _add(layout, number, row, pictures, columns)
        except ValueError as error:
            layout.faults.append(row_fault(table, number + 1, error))
    layout.names = list(dict.fromkeys(name for e in layout.entries for name in (e.winner, e.loser)))
    layout.remarks += _remarks(layout, columns) + unlisted(table, names, listed)
    return layout


def _add(
    layout: PairLayout, number: int, row: Row, pictures: list[str], columns: PairColumns
) -> None:
    captions = texts_of(row, columns.caption, pictures[0]) if columns.caption else ()
    said = verdict(row, columns)
    layout.ties += said == "tie"
    layout.unlabelled += said == "no label"
    if said in ("tie", "no label"):
        return
    if pictures[0] == pictures[1]:
        layout.equal += 1
        place = f"{layout.table.name}, row {number + 1}"
        message = f"prefers {pictures[0]} to itself, so it is not used"
        layout.remarks.append(Problem(place, "equal pictures", message))
    else:
        winner, loser = pictures if said == "first" else pictures[::-1]
        extras = {key: value for key, value in row.items() if key not in columns.used}
        layout.entries.append(PairEntry(number, winner, loser, captions, extras))


def _remarks(layout: PairLayout, columns: PairColumns) -> list[Problem]:
    bare = [entry for entry in layout.entries if not entry.captions]
    if bare and len(bare) == len(layout.entries):
        message = (
            "no pair has a caption, and training on text needs one for each, in a column "
            f"{', '.join(CAPTIONS[:-1])} or {CAPTIONS[-1]}; `--denoising.condition-dropout 1` "
            "trains without"
        )
        return [Problem(layout.table.name, "no captions", message)]
    message = f'has no caption; expected a text in column "{columns.caption}"'
    return [
        Problem(f"{layout.table.name}, row {entry.row + 1}", "pair without caption", message)
        for entry in bare
    ]
