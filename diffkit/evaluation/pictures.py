"""A folder of pictures as evaluation sees it: an ordered list that is streamed, never held.

Rules, which every report names:

- Pixels are read as training reads them: upright by EXIF, transparency over white, 16-bit grey
  scaled to 8 bits, palettes and CMYK converted, the first frame of an animation.
- Without `size` every picture keeps its own size, and a network resizes it once, by its own rule.
  With `size` a picture of another size is scaled by Lanczos to cover it and its middle is cropped.
- The contact sheet of `diffkit generate` is no picture of the set.
- A picture that cannot be decoded is named and left out, when the set is opened; `skipped` counts.
- A picture that changes or disappears after that ends the run: numbers of half a set are no use.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffkit.console import progress, warn
from diffkit.data.images import BadImage, decode
from diffkit.data.layout import read_layout
from diffkit.data.prefetch import prefetch
from diffkit.data.records import Size
from diffkit.errors import RunFailed, UserError
from diffkit.generation.recipe import RECIPE_KEY
from diffkit.generation.run import SHEET_NAME

__all__ = ["Batch", "PictureSet", "resize_rule", "to_float", "to_uint8"]

_THREADS = 4
_AHEAD = 1
_PIXELS = 1 << 22
_WINDOW = 256  # files looked at between two results
_SHOWN = 5  # bad pictures that are named before they are only counted


def to_float(pixels: Tensor) -> Tensor:
    """8-bit pixels as float32 in [-1, 1]: x / 127.5 - 1."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as 8-bit pixels, rounded to nearest; undoes `to_float` exactly."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Batch:
    """Pictures of one size: their places in the set, and uint8 pixels (B, 3, H, W)."""

    indices: tuple[int, ...]
    pixels: Tensor

    @property
    def images(self) -> Tensor:
        """The pictures as float32 in [-1, 1]."""
        return to_float(self.pixels)

    def pieces(self) -> Iterator[Batch]:
        """The batch in parts of at most 2^22 pixels (four of 1024x1024), or of one picture.

        What is computed with the pixels as such (spectra, SSIM) takes some 250 bytes a pixel.
        """
        height, width = self.pixels.shape[-2:]
        most = max(1, _PIXELS // (height * width))
        for start in range(0, len(self.indices), most):
            part = slice(start, start + most)
            yield Batch(self.indices[part], self.pixels[part])


@dataclass(frozen=True)
class _Look:
    """What one look at a file told: (height, width), bytes, time of change; prompt or fault."""

    numbers: tuple[int, int, int, int] = (0, 0, 0, 0)
    prompt: str | None = None
    fault: str | None = None


def resize_rule(size: Size | None) -> str:
    """What `PictureSet.open(..., size=size)` does to pictures, in words for a report."""
    if size is None:
        return "pictures at their own size"
    height, width = size
    return f"pictures scaled to cover {width}x{height} (Lanczos), middle cropped"


class PictureSet:
    """The readable pictures of a folder in the order of their names or of their metadata table.

    Attributes:
        root: the folder.
        names: paths below it.
        prompts: one text a picture: the recipe inside a PNG of `diffkit generate`, else the first
            caption of the folder's metadata or text file, else "".
        sizes: int32 (n, 2), height and width of each picture as `batches` gives it.
        skipped: (name, reason) of every picture that could not be decoded.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        prompts: Sequence[str],
        numbers: npt.NDArray[np.int64],
        size: Size | None,
        skipped: Sequence[tuple[str, str]],
    ) -> None:
        self.root = root
        self.names = tuple(names)
        self.prompts = tuple(prompts)
        self.sizes = numbers[:, :2].astype(np.int32)
        if size is not None:
            self.sizes[:] = size
        self.skipped = tuple(skipped)
        self._marks = np.ascontiguousarray(numbers[:, 2:])
        self._size = size

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        size: Size | None = None,
        num: int | None = None,
    ) -> PictureSet:
        """Look at every picture once, and list those that can be decoded.

        Arguments:
            size: (height, width) that every picture is brought to; None keeps each one's own.
            num: the first so many pictures only.

        Raises `UserError` for a folder that is missing or holds no readable picture, and for one
        whose captions or metadata contradict its files.
        """
        root = Path(folder)
        names, prompts = _listing(root, num)
        numbers = np.zeros((len(names), 4), dtype=np.int64)
        faults: dict[int, str] = {}
        for index, look in enumerate(_looks(root, names)):
            numbers[index] = look.numbers
            prompts[index] = look.prompt or prompts[index]
            if look.fault is not None:
                faults[index] = look.fault
        skipped = [(names[index], fault) for index, fault in faults.items()]
        _report(root, skipped, len(names))
        kept = [index for index in range(len(names)) if index not in faults]
        texts: dict[str, str] = {}  # one object for equal prompts: most have several pictures
        return cls(
            root,
            [names[index] for index in kept],
            [texts.setdefault(prompts[index], prompts[index]) for index in kept],
            numbers[kept],
            size,
            skipped,
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_prompts(self) -> bool:
        """Whether every picture has a text."""
        return all(self.prompts)

    @property
    def groups(self) -> Tensor:
        """int64 (n,): pictures of one prompt share a number; without prompts each has its own.

        The numbers count the distinct prompts in the order of their first picture.
        """
        if not self.has_prompts:
            return torch.arange(len(self))
        numbers = {text: i for i, text in enumerate(dict.fromkeys(self.prompts))}
        return torch.tensor([numbers[text] for text in self.prompts])

    @property
    def size(self) -> Size | None:
        """(height, width) that all pictures share; None when they differ."""
        distinct = np.unique(self.sizes, axis=0)
        return (int(distinct[0, 0]), int(distinct[0, 1])) if len(distinct) == 1 else None

    @property
    def resize(self) -> str:
        """How pictures are brought to the size that the networks get, for the report."""
        return resize_rule(self._size)

    def path(self, index: int) -> Path:
        """The file of picture `index`."""
        return self.root / self.names[index]

    def identity(self, start: int, stop: int) -> str:
        """A digest of the names, bytes, times of change and resize rule of pictures start..stop-1.

        It stands for their contents: whoever changes a picture changes one of these.
        """
        digest = hashlib.blake2b(self.resize.encode(), digest_size=16)
        digest.update("\n".join(self.names[start:stop]).encode())
        digest.update(self._marks[start:stop].tobytes())
        return digest.hexdigest()

    def read(self, index: int) -> Tensor:
        """uint8 (3, H, W) of picture `index`.

        Raises `RunFailed` when the file changed, disappeared or broke since the set was opened.
        """
        path = self.path(index)
        try:
            rgb, _ = decode(path)
            status = path.stat()
        except (BadImage, OSError) as error:
            raise RunFailed(f"{path}: could be read before, not now ({error}).") from error
        if (status.st_size, status.st_mtime_ns) != tuple(self._marks[index].tolist()):
            raise RunFailed(
                f"{path}: changed while it was measured. Run the same command again once "
                "the folder is at rest."
            )
        if self._size is not None and rgb.size != (self._size[1], self._size[0]):
            rgb = ImageOps.fit(rgb, (self._size[1], self._size[0]), Image.Resampling.LANCZOS)
        # A copy, since Pillow's buffer is read-only.
        return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Batch]:
        """Pictures start, start + 1, ... decoded by threads a little ahead, in windows.

        Each window of `batch_size` pictures is one batch, or one a size where sizes differ; the
        windows follow the order of the set. Memory does not grow with the set.
        """
        places = range(start, len(self), batch_size)
        windows = (range(place, min(place + batch_size, len(self))) for place in places)

        def begin(window: range, pool: Executor) -> Sequence[Future[Tensor]]:
            return [pool.submit(self.read, index) for index in window]

        pixels = prefetch(windows, begin, list[Tensor], workers=_THREADS, ahead=_AHEAD)
        for place, read in zip(places, pixels):
            yield from _by_size(range(place, place + len(read)), read)


def _by_size(indices: range, pictures: Sequence[Tensor]) -> Iterator[Batch]:
    sizes: dict[tuple[int, ...], list[int]] = {}
    for row, picture in enumerate(pictures):
        sizes.setdefault(tuple(picture.shape), []).append(row)
    for rows in sizes.values():
        stacked = torch.stack([pictures[row] for row in rows])
        yield Batch(tuple(indices[row] for row in rows), stacked)


def _listing(folder: Path, num: int | None) -> tuple[list[str], list[str]]:
    """Names and first captions; of the layout's own records none is kept."""
    layout = read_layout(folder)
    if layout.faults:
        raise UserError(
            f"{folder}: {layout.faults[0]} ({len(layout.faults)} fault(s) in all). "
            f"See everything with: diffkit data check {folder}"
        )
    entries = [entry for entry in layout.entries if entry.name != SHEET_NAME][:num]
    return (
        [entry.name for entry in entries],
        [entry.captions[0] if entry.captions else "" for entry in entries],
    )


def _looks(root: Path, names: Sequence[str]) -> Iterator[_Look]:
    """One look a name, in order. In windows: a future a picture would outweigh its features."""
    windows = range(0, len(names), _WINDOW)

    def begin(start: int, pool: Executor) -> Sequence[Future[_Look]]:
        return [pool.submit(_look, root / name) for name in names[start : start + _WINDOW]]

    ahead = prefetch(windows, begin, list[_Look], workers=_THREADS, ahead=_AHEAD)
    yield from progress(chain.from_iterable(ahead), "looking at pictures", total=len(names))


def _look(path: Path) -> _Look:
    try:
        status = path.stat()
        rgb, (height, width) = decode(path)
        rgb.close()
    except (BadImage, OSError) as error:
        return _Look(fault=str(error))
    return _Look((height, width, status.st_size, status.st_mtime_ns), _prompt_inside(path))


def _prompt_inside(path: Path) -> str | None:
    """The prompt of a recipe in a PNG of any version of diffkit; None where there is none."""
    if path.suffix.lower() != ".png":
        return None
    with Image.open(path) as image:
        text = image.info.get(RECIPE_KEY)
    if not isinstance(text, str):
        return None
    try:
        prompt = json.loads(text)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
    return prompt if isinstance(prompt, str) else None


def _report(root: Path, skipped: Sequence[tuple[str, str]], total: int) -> None:
    for name, reason in skipped[:_SHOWN]:
        warn(f"{root / name}: left out, {reason}")
    if len(skipped) > _SHOWN:
        warn(f"{root}: {len(skipped)} pictures of {total} left out in all")
    if len(skipped) == total:
        raise UserError(f"{root}: none of its {total} pictures can be read.")
