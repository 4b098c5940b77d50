"""Pictures of a folder with what they show, and the moments of their latents, on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffkit.data.folder import ImageFolder
from diffkit.data.images import read_header
from diffkit.data.transforms import View, render, to_float
from diffkit.errors import UserError
from diffkit.files import read_json, storage_errors, write_json
from diffkit.models.codec import Codec
from diffkit.randomness import normal, uniform

__all__ = ["Pictures", "encoded", "made_of", "moments"]

FEWEST = 8
"""Captions that must have a word for it to be a class."""
_NOTED = 16
LARGEST = 1.3
"""Side of the largest picture that a view is cut from, by the side of the view."""


class Pictures:
    """A folder's pictures at one size; class names or words of captions say what they show.

    Arguments:
        folder: with labels, or with captions; see `ImageFolder`.
        size: sides in pixels.
        label_column: of the metadata.
        classes: of another folder, whose numbering this one takes; words it lacks are left out.

    Raises `UserError` for a folder with neither.
    """

    def __init__(
        self,
        folder: Path,
        size: int,
        label_column: str | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.source = ImageFolder(folder, label_column=label_column)
        self.size = size
        shown = [self._shown(index) for index in range(len(self.source))]
        if not all(shown):
            raise UserError(
                f"{folder}: the trunk learns from class names or captions, and a picture has "
                "neither; put the pictures into one folder a class, or add a metadata.jsonl."
            )
        if classes is None:
            counts = Counter(word for words in shown for word in words)
            labelled = bool(self.source.class_names)
            least = 1 if labelled else min(FEWEST, len(shown) // 2)
            classes = sorted(w for w, n in counts.items() if least <= n < len(shown))
        self.classes = tuple(classes)
        number = {name: i for i, name in enumerate(self.classes)}
        self.present = torch.zeros(len(shown), len(self.classes), dtype=torch.uint8)
        for row, words in enumerate(shown):
            for word in words & number.keys():
                self.present[row, number[word]] = 1

    def _shown(self, index: int) -> set[str]:
        sample = self.source[index]
        if sample.label is not None:
            return {self.source.class_names[sample.label]}
        words = sample.captions[0].lower() if sample.captions else ""
        return {word.strip(".,;:!?\"'()") for word in words.split()} - {""}

    def __len__(self) -> int:
        return len(self.source)

    def view(self, index: int, number: int, seed: int) -> NDArray[np.uint8]:
        """View 0 is the centre; others are mirrored or not, larger, and cut at random."""
        path = self.source.encoded(index)
        original = read_header(path)
        draws = [0.0, 0.5, 0.5, 1.0]
        if number:
            draws = uniform((4,), seed, number, index, "view").tolist()
        side = round(self.size * (1 + (LARGEST - 1) * draws[0]))
        scale = side / min(original)
        resized = (max(side, round(original[0] * scale)), max(side, round(original[1] * scale)))
        corner = (
            int((resized[0] - self.size) * draws[1]),
            int((resized[1] - self.size) * draws[2]),
        )
        flip = draws[3] < 0.5
        return render(path, View(original, resized, corner, (self.size, self.size), flip))

    def batches(self, views: int, seed: int, size: int, first: int = 0) -> Iterator[Tensor]:
        """View 0 of all pictures, view 1, ..., from row `first` on: (b, 3, S, S) in [-1, 1]."""
        for rows in torch.arange(first, views * len(self)).split(size):
            places = (divmod(int(row), len(self)) for row in rows)
            yield to_float([self.view(index, number, seed) for number, index in places])


def made_of(pictures: Pictures, codec: Codec, views: int, seed: int) -> str:
    """Hash of everything that decides `moments`: the autoencoder, the files and their views.

    A file counts as changed by its size or its time of change.
    """
    files = [pictures.source.identity(index) for index in range(len(pictures))]
    told = [codec.fingerprint(), pictures.size, LARGEST, views, seed, files]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


@torch.no_grad()
def moments(
    pictures: Pictures, codec: Codec, views: int, seed: int, file: Path, batch: int = 16
) -> NDArray[np.float16]:
    """Moments of `views` views of each picture, (views N, 2C, h, w), in a memory map.

    They are made once; anew where those in `file` are not of the same pictures, autoencoder and
    views, as the .json beside it says, which also says how many rows there are: a call that was
    stopped loses at most those of `_NOTED` batches.
    """
    note, told = file.with_suffix(".json"), {"made_of": made_of(pictures, codec, views, seed)}
    known = read_json(note) if file.is_file() and note.is_file() else {}
    count = views * len(pictures)
    done = int(known.get("rows", count if known else 0))  # once notes were of whole files alone
    if known.get("made_of") != told["made_of"]:
        note.unlink(missing_ok=True)
        done = 0
    if done < count:
        file.parent.mkdir(parents=True, exist_ok=True)
        channels, *sides = codec.latent_shape(pictures.size, pictures.size)
        shape, mode = (count, 2 * channels, *sides), "r+" if done else "w+"
        with storage_errors(file):
            rows = np.lib.format.open_memmap(file, mode, np.dtype("<f2"), shape)  # type: ignore[no-untyped-call]
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, a crash in a map
                with open(file, "r+b") as whole:
                    os.posix_fallocate(whole.fileno(), 0, file.stat().st_size)
        batches = pictures.batches(views, seed, batch, done)
        for number, images in enumerate(batches, 1):
            found = codec.encode_moments(images.to(codec.device)).half().cpu().numpy()
            rows[done : done + len(found)] = found
            done += len(found)
            if number % _NOTED == 0 or done == count:
                rows.flush()
                write_json(note, told | {"rows": done})
    kept: NDArray[np.float16] = np.load(file, mmap_mode="r")
    return kept


def encoded(kept: NDArray[np.float16], rows: Tensor, codec: Codec, seed: int, step: int) -> Tensor:
    """Latents (b, C, h, w) of rows of `moments`, sampled anew in each step, by address."""
    found = torch.from_numpy(kept[rows.numpy()]).to(codec.device).float()
    eps = normal((len(rows), codec.channels, *kept.shape[2:]), seed, step, "latents")
    return codec.sample(found, eps.to(codec.device))
