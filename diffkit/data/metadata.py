"""Tables that describe pictures: JSON lines, CSV or parquet, one row a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from diffkit.errors import UserError

__all__ = ["Row", "columns_of", "read_table", "require_columns"]

Row: TypeAlias = dict[str, object]


def read_table(path: Path, needed: Sequence[str] = ()) -> list[Row]:
    """The rows of a .jsonl, .csv or .parquet file in their order.

    CSV values are text, and an empty one is left out of its row; JSON and parquet keep their types.
    Raises `UserError` naming the file and line when it is missing, broken, or lacks one of the
    `needed` columns.
    """
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: a table must be a .jsonl, .csv or .parquet file.")
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    rows = readers[path.suffix.lower()](path)
    require_columns(path, rows, needed)
    return rows


def require_columns(path: Path, rows: Sequence[Row], needed: Sequence[str]) -> None:
    """Raise `UserError` when a table with these rows lacks one of the `needed` columns."""
    columns = sorted(columns_of(path, rows))
    for column in needed:
        if rows and column not in columns:
            raise UserError(
                f'{path}: has no column "{column}". Its columns are: {", ".join(columns)}.'
            )


def columns_of(path: Path, rows: Sequence[Row]) -> list[str]:
    """The columns of a table whose rows were read, each once; of a CSV all those of its header."""
    if path.suffix.lower() == ".csv":
        return list(dict.fromkeys(next(csv.reader(io.StringIO(_text(path))), [])))
    return list(dict.fromkeys(column for row in rows for column in row))


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: must be a JSON object, {{...}}.")
        rows.append(row)
    return rows


def _read_csv(path: Path) -> list[Row]:
    reader = csv.DictReader(io.StringIO(_text(path)), strict=True)
    try:
        rows: list[Row] = []
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path}, line {reader.line_num}: has {_cells(row)} cells, the header has "
                    f"{len(reader.fieldnames or ())}. A comma inside a text needs quotes."
                )
            rows.append({column: value for column, value in row.items() if value != ""})
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: is not CSV ({error}).") from error
    return rows


def _cells(row: dict[str, str]) -> int:
    more = row.get(None, [])  # type: ignore[call-overload] # DictReader puts surplus cells here
    return sum(value is not None for key, value in row.items() if key is not None) + len(more)


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.lib.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a parquet file ({error}).") from error
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start}"
        raise UserError(f"{path}: is not UTF-8 text ({place}).") from error
