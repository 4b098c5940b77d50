"""Small inputs of evaluations: captioned real pictures, prompts, a command on a CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diffkit.assets import path as assets

from diffkit.cli import main

CONCEPTS = ("watermelon", "owl", "penguin")
COLOURS = ("white", "red", "green", "blue")


def real_pictures(folder: Path) -> Path:
    """Twelve captioned pictures of three concepts, of the sample that diffkit carries."""
    folder.mkdir(parents=True)
    sample = assets("sample")
    rows = [json.loads(line) for line in (sample / "metadata.jsonl").read_text().splitlines()]
    kept = [r for r in rows if r["concept"] in CONCEPTS and r["background"] in COLOURS]
    for row in kept:
        shutil.copy(sample / row["file_name"], folder / row["file_name"])
    lines = (json.dumps({"file_name": r["file_name"], "text": r["text"]}) + "\n" for r in kept)
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


def evaluate(*words: object) -> int:
    """The exit code of one command on a CPU, with two steps unless told or no model draws."""
    return main(["evaluate", *map(str, words), "--device", "cpu"])


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def rows_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The report's metrics by name."""
    return {row["name"]: row for row in report["metrics"]}


def times(folder: Path) -> dict[str, int]:
    """When each file below the folder was last written."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in files}
