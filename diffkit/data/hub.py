"""Data sets of the hub and local parquet, arrow and tar shards, through the library `datasets`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffkit.data.columns import captions_of, content_hash, encoded_of, find_columns, label_of
from diffkit.data.folder import ImageFolder
from diffkit.data.images import EXTENSIONS
from diffkit.data.layout import TABLES, list_files
from diffkit.data.records import Encoded, ImageSource, Sample
from diffkit.errors import UserError

__all__ = ["HUB_PREFIX", "HubDataset", "is_table", "load_table", "open_source"]

HUB_PREFIX = "hub:"
_SHARDS = {".parquet", ".arrow", ".tar"}


class HubDataset:
    """A `datasets` table of known length as a source of training images.

    Arguments: `table` is a `datasets.Dataset`, `place` what messages call it; the columns are those
    of `columns.find_columns`. All columns that are neither picture, caption nor label become
    extras. Pictures stay encoded on disk until a batch needs them. Raises `UserError`.
    """

    def __init__(
        self,
        table: Any,
        place: str,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        import datasets

        columns = find_columns(table.features, place, image_column, caption_column, label_column)
        self.place = place
        count = len(table)
        captions = list(table[columns.caption]) if columns.caption else [None] * count
        labels = list(table[columns.label]) if columns.label else [None] * count
        self._captions = [captions_of(v, f"{place}, row {i}") for i, v in enumerate(captions)]
        self._labels = [label_of(v, f"{place}, row {i}") for i, v in enumerate(labels)]
        numbers = [label for label in self._labels if label is not None]
        if numbers and len(numbers) < count:
            raise UserError(f"{place}: {count - len(numbers)} of {count} rows have no label.")
        known = range(max(numbers, default=-1) + 1)
        self._class_names = columns.class_names or tuple(str(number) for number in known)
        used = [name for name in (columns.image, columns.caption, columns.label) if name]
        self._extras = table.remove_columns(used)
        pictures = table.select_columns([columns.image])
        self._pictures = pictures.cast_column(columns.image, datasets.Image(decode=False))
        self._column = columns.image

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of their labels."""
        return self._class_names

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, index: int, /) -> Sample:
        extras = self._extras[index] if self._extras.column_names else {}
        name = f"{self.place}, row {index}"
        return Sample(index, name, self._captions[index], self._labels[index], extras)

    def encoded(self, index: int, /) -> Encoded:
        """The picture's bytes, or its file where the table holds only a path."""
        return encoded_of(self._pictures[index][self._column])

    def identity(self, index: int, /) -> str:
        """Hash of the encoded picture; its bytes lie in the table and are read in any case."""
        return content_hash(self.encoded(index))


def open_source(
    data: str | os.PathLike[str],
    *,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
) -> ImageSource:
    """The data set behind what a person typed after `--data`.

    A folder of pictures (see `layout`); a folder of .parquet, .arrow or .tar (webdataset) shards;
    or "hub:OWNER/NAME", optionally "hub:OWNER/NAME@REVISION", downloaded by `datasets` into its own
    cache. `split` and `image_column` belong to shards and hub sets. Raises `UserError`.
    """
    if not is_table(data):
        if image_column is not None:
            raise UserError(f"{data}: is a folder of pictures, which has no image column.")
        return ImageFolder(data, caption_column=caption_column, label_column=label_column)
    return HubDataset(
        load_table(data, split, streaming=False),
        str(data),
        image_column=image_column,
        caption_column=caption_column,
        label_column=label_column,
    )


def load_table(data: str | os.PathLike[str], split: str, *, streaming: bool) -> Any:
    """A `datasets.Dataset`, or `IterableDataset` if streaming, of a hub set or folder of shards.

    Raises `UserError` naming `data` when it is missing, broken, or cannot be reached.
    """
    import datasets

    name = str(data)
    with _named_errors(name):
        if name.startswith(HUB_PREFIX):
            repository, _, revision = name[len(HUB_PREFIX) :].partition("@")
            return datasets.load_dataset(
                repository, split=split, streaming=streaming, revision=revision or None
            )
        if not is_table(data):
            raise UserError(f"{name}: holds no shards ({', '.join(sorted(_SHARDS))}).")
        folder = Path(data)
        if (folder / "dataset_dict.json").is_file():
            folder = folder / split
        if not (folder / "state.json").is_file():
            return datasets.load_dataset(name, split=split, streaming=streaming)
        table = datasets.load_from_disk(folder)  # written by `Dataset.save_to_disk`
        files = len(list(folder.glob("*.arrow")))
        return table.to_iterable_dataset(num_shards=files) if streaming else table


def is_table(data: str | os.PathLike[str]) -> bool:
    """True for a hub name and for a folder of shards, which holds no pictures and no metadata."""
    if str(data).startswith(HUB_PREFIX):
        return True
    if not Path(data).exists():
        raise UserError(
            f"{data}: no such folder. A data set of the Hugging Face hub is written "
            f"{HUB_PREFIX}OWNER/NAME."
        )
    names = list_files(Path(data))
    endings = {os.path.splitext(name)[1].lower() for name in names}
    return bool(endings & _SHARDS) and not endings & EXTENSIONS and not set(TABLES) & set(names)


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    import pyarrow.lib
    from datasets.exceptions import DatasetsError

    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, DatasetsError, pyarrow.lib.ArrowException) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{name}: cannot be loaded as a data set ({reason}).") from error
