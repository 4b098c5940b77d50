"""Everything that is wrong with a folder of pictures, found before a training meets it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from diffkit.data.images import BadImage, decode
from diffkit.data.layout import Problem, read_layout
from diffkit.data.preference_columns import none_left
from diffkit.data.preference_layout import is_pair_folder, read_pair_layout
from diffkit.data.scan import threaded
from diffkit.data.trajectory_check import check_trajectories
from diffkit.data.trajectory_store import is_trajectory_folder

__all__ = ["Problem", "Report", "check"]


@dataclass(frozen=True)
class Report:
    """The problems of a folder, worst kinds first, and its counts by name.

    `counts` holds "images" (files or rows looked at), "captions", "classes" and "good" (images
    without a problem of their own); of a folder of preference pairs the numbers of "pairs", "ties"
    and "unlabelled" rows in place of "classes". Of a folder of noise-image pairs it holds "pairs",
    "dropped" and "prompts".
    """

    folder: str
    problems: tuple[Problem, ...]
    counts: dict[str, int]

    @property
    def kinds(self) -> dict[str, int]:
        """Number of problems of each kind."""
        return dict(Counter(problem.kind for problem in self.problems))

    def summary(self) -> str:
        """A short text for a person: what was looked at, each kind of problem with its files."""
        counts = self.counts
        if "dropped" in counts:
            lines = [
                f"{self.folder}: {counts['pairs']} noise-image pairs of {counts['prompts']} "
                f"prompts, {counts['dropped']} left out as not finite."
            ]
            return "\n".join([*lines, *self._listed()])
        seen = f"{counts['images']} images, {counts['captions']} captions, "
        if "pairs" in counts:
            seen += (
                f"{counts['pairs']} pairs, {counts['ties']} ties, "
                f"{counts['unlabelled']} rows without a label"
            )
        else:
            seen += f"{counts['classes']} classes"
        first = f"{self.folder}: {seen}; {counts['good']} images without a problem."
        return "\n".join([first, *self._listed()])

    def _listed(self) -> list[str]:
        lines = []
        for kind, number in self.kinds.items():
            lines.append(f"\n{kind} ({number})")
            lines += [f"  {problem}" for problem in self.problems if problem.kind == kind]
        return lines or ["Nothing is wrong."]


def check(
    folder: str | os.PathLike[str],
    *,
    caption_column: str | None = None,
    label_column: str | None = None,
    smallest: int = 32,
) -> Report:
    """Read and decode every picture of `folder`, by several threads and with progress.

    A folder whose table names pairs of pictures is read as one of preference pairs, and one that
    `diffkit trajectories` made as `check_trajectories` does. The kinds of problem of pictures, in
    the order of the report: "corrupt" (missing, empty, truncated, not a picture, of a mode or a
    size that is not read), "caption without image", "bad caption", "bad row", "no pair" (no row of
    a table of pairs prefers a picture), "no captions" (of pairs), "image without caption", "pair
    without caption", "equal pictures" (a pair of a picture with itself), "unlisted image", "too
    small" (a side below `smallest` pixels), "duplicate" (the same bytes, or the same file named
    twice). Raises `UserError` when there is no such folder, no picture in it, or its table as a
    whole cannot be read.
    """
    if is_trajectory_folder(folder):
        found, counts = check_trajectories(Path(folder))
        return Report(str(folder), tuple(found), counts)
    if is_pair_folder(folder):
        return _check_pairs(Path(folder), caption_column, smallest)
    layout = read_layout(folder, caption_column, label_column)
    files = [(entry.name, entry.path) for entry in layout.entries]
    problems = _pictures(files, smallest) + layout.faults + layout.remarks
    counts = {
        "captions": sum(len(entry.captions) for entry in layout.entries),
        "classes": len({entry.label for entry in layout.entries if entry.label is not None}),
    }
    return _report(layout.root, files, problems, counts)


def _check_pairs(root: Path, caption_column: str | None, smallest: int) -> Report:
    layout = read_pair_layout(root, caption_column)
    files = [(name, root / name) for name in layout.names]
    problems = _pictures(files, smallest) + layout.faults + layout.remarks
    if not layout.entries and not layout.faults:
        problems.append(Problem(layout.table.name, "no pair", none_left(layout)))
    counts = {
        "captions": sum(len(entry.captions) for entry in layout.entries),
        "pairs": len(layout.entries),
        "ties": layout.ties,
        "unlabelled": layout.unlabelled,
    }
    return _report(root, files, problems, counts)


def _report(
    root: Path, files: list[tuple[str, Path]], problems: list[Problem], counts: dict[str, int]
) -> Report:
    bad = {problem.path for problem in problems}
    good = sum(name not in bad for name, _ in files)
    rank = {kind: place for place, kind in enumerate(_ORDER)}
    problems.sort(key=lambda problem: rank[problem.kind])
    return Report(str(root), tuple(problems), {"images": len(files), **counts, "good": good})


_ORDER = (
    "corrupt",
    "caption without image",
    "bad caption",
    "bad row",
    "no pair",
    "no captions",
    "image without caption",
    "pair without caption",
    "equal pictures",
    "unlisted image",
    "too small",
    "duplicate",
)


def _pictures(files: list[tuple[str, Path]], smallest: int) -> list[Problem]:
    """What is wrong with the pictures themselves, given by name and path."""
    looks = list(threaded(lambda i: _look(files[i][1], smallest), len(files), "Checking"))
    problems = [
        Problem(name, kind, message)
        for (name, _), (_, kind, message) in zip(files, looks, strict=True)
        if kind
    ]
    return problems + _duplicates([name for name, _ in files], [digest for digest, _, _ in looks])


def _look(path: Path, smallest: int) -> tuple[str, str, str]:
    """The digest of a file's bytes, and the kind and text of its problem or two empty texts."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return "", "corrupt", f"cannot be opened ({error.strerror})"
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    try:
        _, (height, width) = decode(data)
    except BadImage as error:
        return digest, "corrupt", f"cannot be read: {error}"
    if min(height, width) < smallest:
        return digest, "too small", f"has only {width} x {height} pixels"
    return digest, "", ""


def _duplicates(names: list[str], digests: list[str]) -> list[Problem]:
    first: dict[str, str] = {}
    problems = []
    for name, digest in zip(names, digests, strict=True):
        if not digest:
            continue
        twin = first.setdefault(digest, name)
        if twin is not name:
            message = "is named twice" if twin == name else f"has the same bytes as {twin}"
            problems.append(Problem(name, "duplicate", message))
    return problems
