"""Where preference pairs come from: folders of pictures, shards and hub sets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from diffkit.data.columns import captions_of, content_hash, encoded_of
from diffkit.data.folder import PictureFiles, Record, refuse_faults
from diffkit.data.hub import is_table, load_table
from diffkit.data.preference_columns import Tally, find_pair_columns, none_left, verdict
from diffkit.data.preference_layout import read_pair_layout
from diffkit.data.records import Encoded, ImageSource, Sample
from diffkit.errors import UserError

__all__ = ["Pair", "PairFolder", "PairSource", "PairTable", "open_pairs"]


@dataclass(frozen=True)
class Pair(Sample):
    """Two pictures of one prompt; `winner` and `loser` are their places among the pictures.

    `index` is the row of the table, ties and rows without a label counted, so that draws at its
    address do not change when other rows get a label.
    """

    winner: int = field(default=0, kw_only=True)
    loser: int = field(default=0, kw_only=True)


class PairSource(Tally, Protocol):
    """A set of pairs of known length with random access, and the pictures that they are of.

    A picture may belong to several pairs. `members[i]` are the (winner, loser) of pair i.
    """

    pictures: ImageSource
    members: Sequence[tuple[int, int]]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Pair: ...


class PairFolder:
    """The pairs of a folder; see `preference_layout`.

    Raises `UserError` for what `read_pair_layout` refuses, for rows that name no picture or have a
    wrong label, and when no row prefers a picture.
    """

    def __init__(self, path: str | os.PathLike[str], *, caption_column: str | None = None) -> None:
        layout = read_pair_layout(path, caption_column)
        refuse_faults(layout.root, layout.faults)
        self.rows, self.ties, self.unlabelled = layout.rows, layout.ties, layout.unlabelled
        self.equal = layout.equal
        self.pictures: ImageSource = PictureFiles(
            [Record(i, name, path=layout.root / name) for i, name in enumerate(layout.names)]
        )
        numbers = {name: number for number, name in enumerate(layout.names)}
        self._entries = layout.entries
        self.members: Sequence[tuple[int, int]] = [
            (numbers[entry.winner], numbers[entry.loser]) for entry in self._entries
        ]
        _refuse_none(self, str(layout.root))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int, /) -> Pair:
        entry, (winner, loser) = self._entries[index], self.members[index]
        name = f"{entry.winner} over {entry.loser}"
        return Pair(entry.row, name, entry.captions, None, entry.extras, winner=winner, loser=loser)


class PairTable:
    """The pairs of a `datasets` table of known length, pictures embedded.

    Arguments: `table` is a `datasets.Dataset`, `place` what messages call it; see
    `preference_columns` for its columns. Pictures stay encoded on disk until a batch needs them.
    Raises `UserError`.
    """

    def __init__(self, table: Any, place: str, *, caption_column: str | None = None) -> None:
        columns = find_pair_columns(table.column_names, place, caption_column)
        _require_embedded(table, columns.pictures, place)
        self.place = place
        self.rows = len(table)
        self._extras = table.remove_columns(columns.used)
        captions = list(table[columns.caption]) if columns.caption else [None] * self.rows
        labels = table.select_columns(list(columns.labels)) if columns.labels else None
        cells = labels[:] if labels is not None else {}
        self.ties = self.unlabelled = self.equal = 0
        same = _same(table, columns.pictures)
        members: list[tuple[int, int]] = []
        self._rows: list[int] = []
        self._captions: list[tuple[str, ...]] = []
        for row in range(self.rows):
            try:
                said = verdict({name: values[row] for name, values in cells.items()}, columns)
            except ValueError as error:
                raise UserError(f"{place}, row {row}: {error}.") from error
            self.ties += said == "tie"
            self.unlabelled += said == "no label"
            if said in ("first", "second") and row in same:
                self.equal += 1
            elif said in ("first", "second"):
                first, second = 2 * len(members), 2 * len(members) + 1
                members.append((first, second) if said == "first" else (second, first))
                self._rows.append(row)
                self._captions.append(captions_of(captions[row], f"{place}, row {row}"))
        self.members: Sequence[tuple[int, int]] = members
        self.pictures: ImageSource = TablePictures(table, columns.pictures, self._rows, place)
        _refuse_none(self, place)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Pair:
        row, (winner, loser) = self._rows[index], self.members[index]
        extras = self._extras[row] if self._extras.column_names else {}
        name = f"{self.place}, row {row}"
        return Pair(row, name, self._captions[index], None, extras, winner=winner, loser=loser)


class TablePictures:
    """Both pictures of some `rows`: of rows[i], 2 i is the first column's and 2 i + 1 the other."""

    class_names: tuple[str, ...] = ()

    def __init__(
        self, table: Any, columns: tuple[str, str], rows: Sequence[int], place: str
    ) -> None:
        import datasets

        self.place = place
        self.rows = rows
        self.columns = columns
        self._cells = []
        for name in columns:
            cells = table.select_columns([name])
            self._cells.append(cells.cast_column(name, datasets.Image(decode=False)))

    def __len__(self) -> int:
        return 2 * len(self.rows)

    def __getitem__(self, index: int, /) -> Sample:
        place, column = divmod(index, 2)
        return Sample(index, f"{self.place}, row {self.rows[place]}, {self.columns[column]}")

    def encoded(self, index: int, /) -> Encoded:
        """The picture's bytes, or its file where the table holds only a path."""
        place, column = divmod(index, 2)
        return encoded_of(self._cells[column][self.rows[place]][self.columns[column]])

    def identity(self, index: int, /) -> str:
        """Hash of the encoded picture, so that one of several rows is encoded once."""
        return content_hash(self.encoded(index))


def _require_embedded(table: Any, columns: tuple[str, str], place: str) -> None:
    for name in columns:
        kind = table.features[name]
        if not (type(kind).__name__ == "Image" or isinstance(kind, dict) or _is_bytes(kind)):
            raise UserError(
                f'{place}: "{name}" holds {kind}; in shards and hub sets the pictures of pairs '
                "are embedded, as images or as their bytes."
            )


def _same(table: Any, columns: tuple[str, str]) -> set[int]:
    """The rows whose two pictures have the same bytes; only those of one length are read."""
    import pyarrow.compute

    def sizes(cells: Any) -> Any:
        if pyarrow.types.is_struct(cells.type):
            cells = pyarrow.compute.struct_field(cells, "bytes")
        return pyarrow.compute.fill_null(pyarrow.compute.binary_length(cells), -1)

    found, start = set(), 0
    for part in table.select_columns(list(columns)).with_format("arrow").iter(1000):
        first, second = (part.column(name) for name in columns)
        alike = pyarrow.compute.equal(sizes(first), sizes(second)).to_pylist()
        for place in (number for number, value in enumerate(alike) if value):
            if _picture(first[place].as_py()) == _picture(second[place].as_py()):
                found.add(start + place)
        start += part.num_rows
    return found


def _picture(value: Any) -> Encoded:
    return value if isinstance(value, bytes) else encoded_of(value)


def _is_bytes(kind: Any) -> bool:
    return getattr(kind, "dtype", "") in ("binary", "large_binary")


def _refuse_none(source: PairSource, place: str) -> None:
    if not len(source):
        raise UserError(f"{place}: {none_left(source)}.")


def open_pairs(
    data: str | os.PathLike[str], *, split: str = "train", caption_column: str | None = None
) -> PairSource:
    """The preference pairs behind what a person typed after `--data`.

    A folder of pictures with a metadata table, a folder of shards, or "hub:OWNER/NAME[@REVISION]";
    `split` belongs to the last two. Raises `UserError`.
    """
    if not is_table(data):
        return PairFolder(data, caption_column=caption_column)
    table = load_table(data, split, streaming=False)
    return PairTable(table, str(data), caption_column=caption_column)
