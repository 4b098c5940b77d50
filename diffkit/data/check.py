"""Everything that is wrong with a folder of pictures, found before a training meets it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from diffkit.data.images import BadImage, decode
from diffkit.data.layout import Entry, Problem, read_layout
from diffkit.data.scan import threaded

__all__ = ["Problem", "Report", "check"]


@dataclass(frozen=True)
class Report:
    """The problems of a folder, worst kinds first, and its counts by name.

    `counts` holds "images" (files or rows looked at), "captions", "classes" and "good" (images
    without a problem of their own).
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
        lines = [
            f"{self.folder}: {counts['images']} images, {counts['captions']} captions, "
            f"{counts['classes']} classes; {counts['good']} images without a problem."
        ]
        for kind, number in self.kinds.items():
            lines.append(f"\n{kind} ({number})")
            lines += [f"  {problem}" for problem in self.problems if problem.kind == kind]
        if not self.problems:
            lines.append("Nothing is wrong.")
        return "\n".join(lines)


def check(
    folder: str | os.PathLike[str],
    *,
    caption_column: str | None = None,
    label_column: str | None = None,
    smallest: int = 32,
) -> Report:
    """Read and decode every picture of `folder`, by several threads and with progress.

    The kinds of problem, in the order of the report: "corrupt" (missing, empty, truncated, not a
    picture, of a mode or a size that is not read), "caption without image", "bad caption", "bad
    row", "image without caption", "unlisted image", "too small" (a side below `smallest` pixels),
    "duplicate" (the same bytes, or the same file named twice). Raises `UserError` when there is no
    such folder, no picture in it, or its table as a whole cannot be read.
    """
    layout = read_layout(folder, caption_column, label_column)
    entries = layout.entries
    looks = list(
        threaded(lambda index: _look(entries[index].path, smallest), len(entries), "Checking")
    )
    problems = [
        Problem(entry.name, kind, message)
        for entry, (_, kind, message) in zip(entries, looks, strict=True)
        if kind
    ]
    problems += layout.faults + layout.remarks
    problems += _duplicates(entries, [digest for digest, _, _ in looks])
    bad = {problem.path for problem in problems}
    counts = {
        "images": len(entries),
        "captions": sum(len(entry.captions) for entry in entries),
        "classes": len({entry.label for entry in entries if entry.label is not None}),
        "good": sum(entry.name not in bad for entry in entries),
    }
    rank = {kind: place for place, kind in enumerate(_ORDER)}
    problems.sort(key=lambda problem: rank[problem.kind])
    return Report(str(layout.root), tuple(problems), counts)


_ORDER = (
    "corrupt",
    "caption without image",
    "bad caption",
    "bad row",
    "image without caption",
    "unlisted image",
    "too small",
    "duplicate",
)


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


def _duplicates(entries: list[Entry], digests: list[str]) -> list[Problem]:
    first: dict[str, str] = {}
    problems = []
    for entry, digest in zip(entries, digests, strict=True):
        if not digest:
            continue
        twin = first.setdefault(digest, entry.name)
        if twin is not entry.name:
            message = "is named twice" if twin == entry.name else f"has the same bytes as {twin}"
            problems.append(Problem(entry.name, "duplicate", message))
    return problems
