"""A folder of pictures as a data set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffkit.data.layout import Layout, Problem, read_layout
from diffkit.data.records import Sample
from diffkit.errors import UserError

__all__ = ["ImageFolder", "PictureFiles", "Record", "refuse_faults"]

_NAMED = 5  # faults that an error message lists before it only counts


@dataclass(frozen=True)
class Record(Sample):
    """A sample that is a file of its own; `name` is its path below the folder."""

    path: Path = field(default=Path(), kw_only=True)


class PictureFiles:
    """Pictures that are files.

    Arguments:
        records: what is known of each.
        class_names: names of the classes in the order of their labels.
    """

    def __init__(self, records: Sequence[Record], class_names: tuple[str, ...] = ()) -> None:
        self.records = records
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> Record:
        return self.records[index]

    def encoded(self, index: int, /) -> Path:
        """The picture's file."""
        return self.records[index].path

    def identity(self, index: int, /) -> str:
        """Name, size and time of change of the file.

        A hash of the bytes would survive a copy of the folder, but costs reading every byte of it
        at each start; a copy that loses the times costs one new encoding.
        """
        record = self.records[index]
        status = record.path.stat()
        return f"{record.name}|{status.st_size}|{status.st_mtime_ns}"


class ImageFolder(PictureFiles):
    """Pictures of a folder with their captions, labels and metadata; see `layout` for the layouts.

    Arguments: `caption_column` and `label_column` name columns of the metadata table; by default
    "text" and "label" are taken where they exist. Number labels are class numbers; names are
    numbered in sorted order. No picture is opened here.

    Raises `UserError` for a missing or empty folder, an unknown column, a caption or a metadata row
    that names no picture, and a row of the wrong type.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        caption_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        layout = read_layout(path, caption_column, label_column)
        refuse_faults(layout.root, layout.faults)
        self.path = layout.root
        class_names = _class_names(layout)
        numbers = {name: number for number, name in enumerate(class_names)}
        records = [
            Record(
                index,
                entry.name,
                entry.captions,
                None if entry.label is None else numbers[str(entry.label)],
                entry.extras,
                path=entry.path,
            )
            for index, entry in enumerate(layout.entries)
        ]
        super().__init__(records, class_names)


def refuse_faults(root: Path, faults: Sequence[Problem]) -> None:
    """Raise `UserError` naming the faults of a folder, if there are any."""
    if faults:
        raise UserError(
            f"{root}: {_listing(faults)}\n"
            f"Mend these, or see everything with: diffkit data check {root}"
        )


def _listing(problems: Sequence[Problem]) -> str:
    lines = [f"{len(problems)} fault(s)", *map(str, problems[:_NAMED])]
    if len(problems) > _NAMED:
        lines.append(f"... and {len(problems) - _NAMED} more")
    return "\n  ".join(lines)


def _class_names(layout: Layout) -> tuple[str, ...]:
    labelled = [entry for entry in layout.entries if entry.label is not None]
    if not labelled:
        return ()
    if len(labelled) < len(layout.entries):
        bare = next(entry for entry in layout.entries if entry.label is None)
        raise UserError(f"{layout.root}: {bare.name} has no label, but other pictures have one.")
    numbers = [entry.label for entry in labelled if isinstance(entry.label, int)]
    if len(numbers) not in (0, len(labelled)):
        raise UserError(f"{layout.root}: labels must be all numbers or all names, not a mixture.")
    if numbers and min(numbers) < 0:
        raise UserError(f"{layout.root}: labels must not be negative; one is {min(numbers)}.")
    if numbers:
        return tuple(str(number) for number in range(max(numbers) + 1))
    return tuple(sorted({str(entry.label) for entry in labelled}))
