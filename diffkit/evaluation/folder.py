"""The output folder of an evaluation: what lies in it, and whether a command may go on in it.

OUTPUT/config.json             the resolved request
OUTPUT/model/, against/        generated pictures with their recipes
OUTPUT/features/, values/      what was computed from the pictures
OUTPUT/reference.safetensors   statistics of the real pictures, for other evaluations
OUTPUT/samples.jsonl           one row a picture
OUTPUT/report.json, .html      the result; the page is written last
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffkit.console import say
from diffkit.errors import UserError
from diffkit.evaluation.selection import COST, Selection
from diffkit.files import check_writable, read_json, write_json

__all__ = ["EvaluationFolder"]

_PICTURES = ("model", "against")
_RESULTS = ("report.html", "report.json", "samples.jsonl", "cost.json")
_PARTS = ("values", "features", "reference.safetensors", *_PICTURES)


class EvaluationFolder:
    """The paths of one evaluation, and the rules for going on in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.report = path / "report.json"
        self.page = path / "report.html"
        self.samples = path / "samples.jsonl"
        self.cost = path / "cost.json"
        self.reference = path / "reference.safetensors"
        self.features = path / "features"
        self.values = path / "values"

    def check(self, config: Mapping[str, Any], overwrite: bool) -> None:
        """Raise `UserError` when something else lies here; writes nothing.

        Metrics may be added to an evaluation; none that a finished report shows may be left out.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file; an output folder is needed here.")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not self._is_ours():
            first = min(entry.name for entry in self.path.iterdir())
            raise UserError(
                f"{self.path}: is not empty and holds no evaluation, but {first}; "
                "choose another --output."
            )
        if overwrite:
            return
        changed = _differing(read_json(self.config), config)
        if not self.page.exists():  # nothing shows the metrics of an earlier, unfinished run
            changed = [line for line in changed if not line.startswith("metrics (")]
        if changed:
            raise UserError(
                f"{self.path}: holds an evaluation with another {'; '.join(changed)}. "
                "Choose another --output, or throw it away with --overwrite."
            )

    def prepare(self, config: Mapping[str, Any], overwrite: bool) -> None:
        """Make the folder, throw away what `overwrite` says, write config.json."""
        check_writable(self.path)
        if overwrite and self.config.exists():
            self._discard()
        if not self.config.exists() or read_json(self.config) != config:
            write_json(self.config, config)

    def finished(self, config: Mapping[str, Any], stamps: Mapping[str, str]) -> Any | None:
        """The report of the same request on the same files, None where there is none yet."""
        if not (self.report.exists() and self.page.exists() and self.config.exists()):
            return None
        report = read_json(self.report)
        same = read_json(self.config) == config and report["sources"] == stamps
        return report if same else None

    def _is_ours(self) -> bool:
        # Model folders have a config.json too, and --overwrite must not empty one.
        return self.config.is_file() and "resamples" in read_json(self.config)

    def _discard(self) -> None:
        # config.json goes last, so that a kill in between leaves a folder that the next command
        # still recognises as an evaluation.
        for name in (*_RESULTS, *_PARTS, "config.json"):
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        say(f"{self.path}: the earlier evaluation was thrown away.")


def _shown(words: Sequence[str]) -> set[str]:
    """The metrics that words of --metrics ask for; none asks for all."""
    selection = Selection.parse(words)
    names = {metric.name for metric in selection.metrics}
    return names | {COST} if selection.cost else names


def _differing(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the values that differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for k in keys for line in _differing(old.get(k), new.get(k), f"{prefix}{k}.")]
    name = prefix.rstrip(".")
    if old == new or (name == "metrics" and _shown(old) <= _shown(new)):
        return []
    return [name if name == "prompts" else f"{name} ({old!r} there, {new!r} now)"]
