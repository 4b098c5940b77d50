"""Which protected picture belongs to which clean one: by its record, else by its path.

The record `x.png.json` of `diffkit protect` names the SHA-256 of the file that was protected, so
pairs are found whatever the files are called now. A picture without a record belongs to the clean
one of the same relative path, or to the one whose result `diffkit protect` would have called so.
Everything else is listed and never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from diffkit.errors import UserError
from diffkit.files import sha256
from diffkit.protection.image_file import FORMATS
from diffkit.protection.inputs import Input, Skipped, find_pictures, output_names
from diffkit.protection.sidecar import Sidecar, read_sidecar, sidecar_path

__all__ = ["Pair", "Pairing", "pair_up"]

_PREVIEWS = "previews"


@dataclass(frozen=True)
class Pair:
    """A clean file and a protected one.

    Attributes:
        name: the protected picture's relative path.
        clean, protected: the files.
        clean_sha256, protected_sha256: of their bytes.
        record: what `diffkit protect` wrote beside it, None where there is no record.
        changed: the protected file is not the one that the record names any more.
    """

    name: str
    clean: Path
    protected: Path
    clean_sha256: str
    protected_sha256: str
    record: Sidecar | None

    @property
    def changed(self) -> bool:
        """Compressed, cropped or otherwise changed since it was protected."""
        return self.record is not None and self.record.output_sha256 != self.protected_sha256


@dataclass(frozen=True)
class Pairing:
    """All pairs, ordered by name, and what is left over, with reasons.

    Attributes:
        pairs: what can be measured.
        clean, protected: pictures without a partner.
        unreadable: broken pictures of either folder.
        links: symbolic links, which nobody follows; no fault.
    """

    pairs: tuple[Pair, ...]
    clean: tuple[Skipped, ...]
    protected: tuple[Skipped, ...]
    unreadable: tuple[Skipped, ...]
    links: tuple[Skipped, ...] = ()


def pair_up(clean: Path, protected: Path, output: Path) -> Pairing:
    """Pair two files, or the pictures of two folders.

    Arguments:
        clean, protected: both files or both folders.
        output: where the audit goes; outside both folders.

    Raises:
        UserError: a path that is missing, a file beside a folder, an output inside one of them, or
            not a single pair.
    """
    for path in (clean, protected):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder.")
    if clean.is_dir() != protected.is_dir():
        raise UserError(f"{clean} and {protected}: give two pictures or two folders.")
    originals, bad = find_pictures([clean], output)
    results, worse = find_pictures([protected], output)
    bad, worse = _pictures(bad), _pictures(worse)
    if not clean.is_dir():
        if not (originals and results):
            reasons = "; ".join(f"{item.path}: {item.reason}" for item in (*bad, *worse))
            raise UserError(f"cannot be read: {reasons}.")
        return Pairing((_pair(originals[0], results[0]),), (), (), ())
    results = _without_previews(results)
    found = _matched(originals, results)
    pairs, left = [], []
    for item in results:
        match = found[item.relative]
        if isinstance(match, str):
            left.append(Skipped(item.path, match))
        else:
            pairs.append(_pair(match, item))
    used = {pair.clean_sha256 for pair in pairs}
    lone = [item for item in originals if sha256(item.path) not in used]
    missing = tuple(Skipped(item.path, "has no protected picture") for item in lone)
    if not pairs:
        raise UserError(
            f"{clean} and {protected}: no picture of one belongs to a picture of the other, by "
            f"record or by path ({len(originals)} and {len(results)} pictures)."
        )
    linked = tuple(item for item in (*bad, *worse) if item.path.is_symlink())
    broken = tuple(item for item in (*bad, *worse) if not item.path.is_symlink())
    return Pairing(tuple(pairs), missing, tuple(left), broken, linked)


def _pictures(skipped: Sequence[Skipped]) -> list[Skipped]:
    """Those that are pictures by their names; records and other files are none of our business."""
    endings = {ending for known in FORMATS.values() for ending in known}
    return [item for item in skipped if item.path.suffix.lower() in endings]


def _matched(
    originals: Sequence[Input], results: Sequence[Input]
) -> Mapping[PurePosixPath, Input | str]:
    """The clean picture of every protected one, or why there is none."""
    by_digest: dict[str, list[Input]] = {}
    for item in originals:
        by_digest.setdefault(sha256(item.path), []).append(item)
    by_path = {item.relative: item for item in originals}
    for kept in (True, False):  # later names win: without --keep-jpeg, as is usual
        for relative, name in output_names(originals, kept).items():
            if name not in {item.relative for item in originals} or name == relative:
                by_path[name] = next(item for item in originals if item.relative == relative)
    found: dict[PurePosixPath, Input | str] = {}
    for item in results:
        record = _record(item.path)
        if record is None:
            found[item.relative] = by_path.get(
                item.relative, "has no record, and no clean picture has its path"
            )
        elif record.input_sha256 in by_digest:
            twins = by_digest[record.input_sha256]  # equal bytes: any of them is right
            same = [twin for twin in twins if twin.relative.stem == item.relative.stem]
            found[item.relative] = (same or twins)[0]
        else:
            found[item.relative] = "its record names an original that is not among the clean ones"
    return found


def _without_previews(results: Sequence[Input]) -> list[Input]:
    """Without those that `diffkit protect --preview` put beside its results."""
    names = {item.relative.as_posix() for item in results}

    def is_preview(relative: PurePosixPath) -> bool:
        inner = relative.relative_to(_PREVIEWS) if relative.parts[0] == _PREVIEWS else None
        return (
            inner is not None
            and {inner.as_posix(), inner.with_suffix("").as_posix()} & names != set()
        )

    return [item for item in results if not is_preview(item.relative)]


def _record(picture: Path) -> Sidecar | None:
    if not sidecar_path(picture).is_file():
        return None
    try:
        return read_sidecar(picture)
    except UserError:
        return None  # somebody else's JSON


def _pair(clean: Input, protected: Input) -> Pair:
    return Pair(
        protected.relative.as_posix(),
        clean.path,
        protected.path,
        sha256(clean.path),
        sha256(protected.path),
        _record(protected.path),
    )
