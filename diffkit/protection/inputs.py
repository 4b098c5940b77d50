"""Which files a protection job takes, in which order, and what their results are called."""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffkit.errors import UserError
from diffkit.protection.image_file import FORMATS, Header, Unreadable, probe, saved_format

__all__ = [
    "Input",
    "Skipped",
    "check_originals",
    "find_pictures",
    "image_seed",
    "output_names",
]


@dataclass(frozen=True)
class Input:
    """A picture file that was found.

    Attributes:
        path: the file.
        relative: its place below the folder that was given; its name when the file was given.
        root: the PATH of the command line that it came from; a joint job is one such folder.
        header: its format.
    """

    path: Path
    relative: PurePosixPath
    root: Path
    header: Header


@dataclass(frozen=True)
class Skipped:
    """A file that is not protected, and why."""

    path: Path
    reason: str


def find_pictures(
    paths: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> tuple[list[Input], list[Skipped]]:
    """The pictures among files and folders, ordered by their relative paths, and what is left out.

    Folders are searched to the bottom. Hidden files and folders are passed over in silence; links
    inside a folder, other files and broken pictures are listed. A file that breaks off behind its
    header is found only when it is opened.

    Arguments:
        paths: files and folders; they may be links.
        output: where results will go.

    Raises `UserError` for a path that does not exist, an output folder that is an input folder or
    lies in one, and two pictures that have the same relative path.
    """
    if not paths:
        raise UserError("no picture given; name files or folders.")
    roots = [Path(path) for path in paths]
    for root in roots:
        if not root.exists():
            raise UserError(f"{root}: no such file or folder.")
        if root.is_dir():
            _check_outside(Path(output), root)
    skipped: list[Skipped] = []
    found: dict[PurePosixPath, Input] = {}
    for root in roots:
        for path in _files(root, skipped):
            relative = PurePosixPath(
                path.relative_to(root).as_posix() if path != root else path.name
            )
            try:
                item = Input(path, relative, root, probe(path))
            except Unreadable as error:
                skipped.append(Skipped(path, error.reason))
                continue
            _add(found, item)
    unique = {(item.path, item.reason): item for item in skipped}
    inputs = [found[relative] for relative in sorted(found, key=str)]
    return inputs, sorted(unique.values(), key=lambda item: str(item.path))


def _add(found: dict[PurePosixPath, Input], item: Input) -> None:
    other = found.setdefault(item.relative, item)
    if other is not item and not other.path.samefile(item.path):
        raise UserError(
            f"{other.path} and {item.path}: both would be saved as {item.relative}. Protect them "
            "in two runs with two output folders, or rename one."
        )


def _check_outside(output: Path, folder: Path) -> None:
    inner, outer = output.resolve(), folder.resolve()
    if inner == outer or outer in inner.parents:
        where = "is the input folder" if inner == outer else f"lies in the input folder {folder}"
        raise UserError(
            f"--output {output}: {where}. Originals are kept apart; choose another one."
        )


def _files(root: Path, skipped: list[Skipped]) -> Iterator[Path]:
    """Regular files of a folder, or the file itself."""
    if not root.is_dir():
        if not stat.S_ISREG(root.stat().st_mode):
            skipped.append(Skipped(root, "not a regular file"))
            return
        yield root
        return

    def refused(error: OSError) -> None:
        skipped.append(Skipped(Path(error.filename), f"cannot be listed ({error.strerror})"))

    for folder, folders, names in os.walk(root, onerror=refused):
        here = Path(folder)
        for name in (*folders, *names):
            if not name.startswith(".") and (here / name).is_symlink():
                skipped.append(Skipped(here / name, "a symbolic link"))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = here / name
            if name.startswith(".") or path.is_symlink():
                continue
            if path.is_file():
                yield path
            else:
                skipped.append(Skipped(path, "not a regular file"))


def output_names(
    inputs: Iterable[Input], keep_jpeg: bool = False
) -> dict[PurePosixPath, PurePosixPath]:
    """The relative path of each result by the relative path of its input.

    A picture that stays in its format keeps its name. The others are named STEM.png (or the ending
    of their format); where that is taken by another input's result, or wanted by several, all of
    these are named STEM_jpg.png, after their old ending. If that is taken too a number follows. The
    mapping does not depend on the order of the inputs, nor on the case of letters.
    """
    names: dict[PurePosixPath, PurePosixPath] = {}
    wanted: dict[str, list[tuple[PurePosixPath, str]]] = {}
    for item in inputs:
        endings = FORMATS[saved_format(item.header, keep_jpeg)]
        if item.relative.suffix.lower() in endings:
            names[item.relative] = item.relative
        else:
            stem, _ = _split(item.relative)
            preferred = _key(item.relative.with_name(stem + endings[0]))
            wanted.setdefault(preferred, []).append((item.relative, endings[0]))
    taken = {_key(name) for name in names.values()}
    crowded: list[tuple[PurePosixPath, str]] = []
    alone = {key for key, group in wanted.items() if len(group) == 1 and key not in taken}
    for key, group in wanted.items():
        if key not in alone:
            crowded.extend(group)
            continue
        relative, ending = group[0]
        names[relative] = relative.with_name(_split(relative)[0] + ending)
    taken |= alone
    for relative, ending in sorted(crowded, key=lambda pair: str(pair[0])):
        stem, old = _split(relative)
        base, number = f"{stem}_{old}" if old else f"{stem}_2", 2
        name = relative.with_name(base + ending)
        while _key(name) in taken:
            name = relative.with_name(f"{base}_{number}{ending}")
            number += 1
        names[relative] = name
        taken.add(_key(name))
    return names


def _key(relative: PurePosixPath) -> str:
    """Equal for names that some disks take for one: by case, or by how accents are spelt."""
    return unicodedata.normalize("NFC", str(relative)).casefold()


def _split(relative: PurePosixPath) -> tuple[str, str]:
    """(stem, old ending without dot); only the ending of a picture format is cut off."""
    known = {ending for endings in FORMATS.values() for ending in endings}
    if relative.suffix.lower() in known:
        return relative.stem, relative.suffix[1:]
    return relative.name, ""


def check_originals(
    inputs: Iterable[Input],
    names: Mapping[PurePosixPath, PurePosixPath],
    output: str | os.PathLike[str],
) -> None:
    """Raise `UserError` when a result would replace an input or lie in an input folder.

    That happens when the output folder is above an input, or holds it. Files are compared by their
    identity on the disk, so links and the case of letters do not matter.
    """
    items = list(inputs)
    originals = {_identity(item.path): item.path for item in items}
    folders = {item.root for item in items if item.root.is_dir()}
    for place in {(Path(output) / name).parent for name in names.values()}:
        for folder in folders:
            _check_outside(place, folder)
    for name in names.values():
        target = Path(output) / name
        for path in (target, target.with_name(target.name + ".json")):
            if path.exists() and _identity(path) in originals:
                original = originals[_identity(path)]
                raise UserError(
                    f"--output {os.fspath(output)}: the result {name} would replace the original "
                    f"{original}. Choose a folder apart from the originals."
                )


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def image_seed(seed: int, file_bytes: bytes) -> int:
    """The seed of one picture: the first 8 bytes, big-endian, of SHA-256("S:" + file bytes).

    S is `seed` in decimal digits. The result, 0 to 2^64 - 1, is a part of an address of
    `diffkit.randomness`; it depends neither on names nor on the order of files.
    """
    digest = hashlib.sha256(f"{seed}:".encode() + file_bytes).digest()
    return int.from_bytes(digest[:8], "big")
