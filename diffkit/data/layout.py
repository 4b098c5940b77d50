"""How a folder of pictures is laid out, read without opening a picture.

Three layouts are known, tried in this order:

1. `metadata.jsonl`, `metadata.csv` or `metadata.parquet` in the folder, with a column `file_name`
   (a path below the folder) and, by default, `text` (a text or a list of texts) and `label`;
2. `NAME.txt` beside pictures `NAME.*`, each line that is not empty being one caption;
3. plain pictures.

In the last two, pictures that all lie in two or more subfolders have these as classes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffkit.data.columns import has_pair_columns, pairs_of_columns
from diffkit.data.images import EXTENSIONS
from diffkit.data.metadata import Row, columns_of, read_table, require_columns
from diffkit.data.trajectory_store import is_trajectory_folder
from diffkit.errors import UserError

__all__ = [
    "TABLES",
    "Entry",
    "Layout",
    "Problem",
    "find_table",
    "list_files",
    "named_picture",
    "read_layout",
    "row_fault",
    "texts_of",
    "unlisted",
]

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_NOT_CAPTIONS = {"readme", "license", "licence", "notice", "copying"}


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file of a data set: its path, the kind of fault, and a sentence."""

    path: str
    kind: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


@dataclass(frozen=True)
class Entry:
    """One picture of a folder: its path, its name below the folder, and what is said about it."""

    path: Path
    name: str
    captions: tuple[str, ...] = ()
    label: str | int | None = None
    extras: Mapping[str, object] = field(default_factory=dict)


@dataclass
class Layout:
    """The pictures of a folder, sorted by name or in the order of the table.

    `faults` are contradictions that make the folder unusable (a caption for no picture, a broken
    row); `remarks` are pictures that may have been forgotten (no caption, not in the table).
    `captioned` tells whether the folder is meant to have captions.
    """

    root: Path
    table: Path | None
    captioned: bool
    entries: list[Entry] = field(default_factory=list)
    faults: list[Problem] = field(default_factory=list)
    remarks: list[Problem] = field(default_factory=list)


def read_layout(
    folder: str | os.PathLike[str],
    caption_column: str | None = None,
    label_column: str | None = None,
) -> Layout:
    """Read the layout of `folder`; a column of None means "text" or "label" where it exists.

    Raises `UserError` when the folder is missing, holds no pictures, or its table cannot be read or
    lacks a column that was asked for.
    """
    root = Path(folder)
    names, table = find_table(root)
    if table:
        return _from_table(root, table, names, caption_column, label_column)
    if caption_column or label_column:
        raise UserError(
            f"{root}: a column was named, but there is no metadata table; "
            f"expected one of {', '.join(TABLES)}."
        )
    return _from_files(root, names)


def find_table(root: Path) -> tuple[list[str], Path | None]:
    """The names below a folder, and its metadata table, if it has one.

    Raises `UserError` when there is no such folder, or several tables.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "no such folder"
        raise UserError(f"{root}: {what}. Give a folder of pictures.")
    names = list_files(root)
    tables = [root / name for name in TABLES if name in names]
    if len(tables) > 1:
        found = ", ".join(table.name for table in tables)
        raise UserError(f"{root}: holds {found}. Only one metadata table can count; keep one.")
    return names, tables[0] if tables else None


def list_files(root: Path) -> list[str]:
    """Names below `root`, sorted, links followed, hidden ones left out."""
    names: list[str] = []
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up the tree
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if relative == "." else relative + "/"
        names += [prefix + name for name in files if not name.startswith(".")]
    return sorted(names)


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _from_files(root: Path, names: list[str]) -> Layout:
    pictures = [name for name in names if _is_picture(name)]
    if not pictures:
        raise UserError(_no_pictures(root, names))
    nested = next((name for name in names if name.rsplit("/", 1)[-1] in TABLES), None)
    if nested:
        raise UserError(
            f"{root}: the metadata table lies in a subfolder, {nested}. "
            f"Give the folder {(root / nested).parent}, or move the table up and extend its paths."
        )
    texts = {
        os.path.splitext(name)[0]: name
        for name in names
        if name.lower().endswith(".txt")
        and name.lower().rsplit("/", 1)[-1].split(".")[0] not in _NOT_CAPTIONS
    }
    layout = Layout(root, None, captioned=bool(texts))
    folders = {name.split("/", 1)[0] if "/" in name else "" for name in pictures}
    classes = len(folders) > 1 and "" not in folders
    for name in pictures:
        text = texts.get(os.path.splitext(name)[0])
        captions = _read_captions(root / text, layout) if text else ()
        label = name.split("/", 1)[0] if classes else None
        _add(layout, Entry(root / name, name, captions, label), f"{Path(name).stem}.txt")
    stems = {os.path.splitext(name)[0] for name in pictures}
    layout.faults += [
        Problem(
            text,
            "caption without image",
            f"is a caption, but there is no picture {stem}.png (or .jpg, .webp ...) beside it",
        )
        for stem, text in texts.items()
        if stem not in stems
    ]
    return layout


def _no_pictures(root: Path, names: list[str]) -> str:
    known = ", ".join(sorted(EXTENSIONS))
    if not names:
        return f"{root}: is empty. Put pictures into it ({known})."
    if is_trajectory_folder(root):
        return f"{root}: holds noise-image pairs, not pictures; they are for `diffkit train gan`."
    endings = sorted({os.path.splitext(name)[1] or name for name in names})[:8]
    return f"{root}: holds no pictures ({known}), only {', '.join(endings)}."


def _read_captions(path: Path, layout: Layout) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        name = path.relative_to(layout.root).as_posix()
        layout.faults.append(Problem(name, "bad caption", "is not UTF-8 text"))
        return ()
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _add(layout: Layout, entry: Entry, place: str) -> None:
    layout.entries.append(entry)
    if layout.captioned and not entry.captions:
        message = f"has no caption; expected a text in {place}"
        layout.remarks.append(Problem(entry.name, "image without caption", message))


def _from_table(
    root: Path,
    table: Path,
    names: list[str],
    caption_column: str | None,
    label_column: str | None,
) -> Layout:
    needed = ["file_name", *(column for column in (caption_column, label_column) if column)]
    rows = read_table(table)
    columns = columns_of(table, rows)
    if "file_name" not in columns and has_pair_columns(columns):
        raise pairs_of_columns(columns, str(table))
    require_columns(table, rows, needed)
    if not rows:
        raise UserError(f"{table}: has no rows.")
    caption_column, label_column = caption_column or "text", label_column or "label"
    layout = Layout(root, table, captioned=any(caption_column in row for row in rows))
    present = set(names)
    for number, row in enumerate(rows, start=1):
        try:
            entry = _read_row(root, row, (caption_column, label_column), present)
            _add(layout, entry, f'column "{caption_column}" of {table.name}')
        except ValueError as error:
            layout.faults.append(row_fault(table, number, error))
    labels = [entry.label for entry in layout.entries]
    if all(isinstance(label, str) and label.isdecimal() for label in labels):  # CSV knows only text
        layout.entries = [replace(entry, label=int(entry.label or 0)) for entry in layout.entries]
    listed = {entry.name for entry in layout.entries}
    layout.remarks += unlisted(table, names, listed)
    return layout


def row_fault(table: Path, number: int, error: ValueError) -> Problem:
    """What is wrong with row `number` = 1, 2, ... of a table, as `named_picture` and others say."""
    kind = "caption without image" if "no such picture" in str(error) else "bad row"
    return Problem(f"{table.name}, row {number}", kind, str(error))


def unlisted(table: Path, names: Sequence[str], listed: Collection[str]) -> list[Problem]:
    """The pictures of a folder that its table does not name."""
    return [
        Problem(name, "unlisted image", f"is not listed in {table.name}, so it is not used")
        for name in names
        if _is_picture(name) and name not in listed
    ]


def named_picture(root: Path, row: Row, column: str, present: Collection[str]) -> str:
    """The picture that a column names; raises ValueError with the reason if there is none."""
    name = row.get(column)
    if not isinstance(name, str) or not name:
        raise ValueError(f'"{column}" must be a path below the folder, not {name!r}')
    name = os.path.normpath(name).replace(os.sep, "/")
    if name not in present and not (root / name).is_file():
        raise ValueError(f"names {name}, but there is no such picture")
    return name


def texts_of(row: Row, column: str, name: str) -> tuple[str, ...]:
    """The captions in a column of the row of `name`; raises ValueError for anything but texts."""
    texts = row.get(column)
    if isinstance(texts, str) or texts is None:
        texts = [texts or ""]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'"{column}" of {name} must be a text or a list of texts, not {texts!r}')
    return tuple(text.strip() for text in texts if text.strip())


def _read_row(root: Path, row: Row, columns: tuple[str, str], present: set[str]) -> Entry:
    name = named_picture(root, row, "file_name", present)
    captions = texts_of(row, columns[0], name)
    label = row.get(columns[1])
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise ValueError(
            f'"{columns[1]}" of {name} must be a whole number or a name, not {label!r}'
        )
    extras = {key: value for key, value in row.items() if key not in ("file_name", *columns)}
    return Entry(root / name, name, captions, label, extras)
