"""audit.html: one self-contained page with the numbers, plots and pictures of an audit."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from torch import Tensor

from diffkit.audit.cells import PICTURES, Cell
from diffkit.audit.distances import DISTANCES
from diffkit.audit.measures import CLEAN, CONTROL, PROTECTED
from diffkit.audit.outcome import Audit, ModelAudit, shown_pictures
from diffkit.audit.pictures import AGAIN, JPEG, LABELS, AuditPicture, open_versions
from diffkit.audit.plots import effect_plot, retention_plot
from diffkit.audit.purifiers.plain import to_pillow
from diffkit.audit.summary import (
    attacked_words,
    estimate,
    number_of,
    percent,
    reading_of,
    shown_number,
)
from diffkit.evaluation.gallery import Pair, Shot, embed
from diffkit.evaluation.templates import render_page
from diffkit.files import atomic_write
from diffkit.perceptual.delta import amplified_difference
from diffkit.protection.sidecar import parameter_digest

__all__ = ["PAGE_NAME", "write_page"]

PAGE_NAME = "audit.html"

_DIFFERENCE = "difference × 8"
_REPEATED = ("model",)
_TRIPLE = (CLEAN, CONTROL, PROTECTED)

_CHANGES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "largest": "largest change, levels",
    "mean": "mean change, levels",
    "shift": "mean shift, levels",
    "high_frequency": "share of its power above half of Nyquist",
}


@dataclass(frozen=True)
class Line:
    """One line of a table: a heading, cells of (value, interval), and what is to be read."""

    name: str
    cells: tuple[tuple[str, str], ...]
    reading: str = ""
    clear: bool = False
    honest: bool = False


@dataclass(frozen=True)
class Part:
    """One number: its label, plot and lines."""

    key: str
    label: str
    about: str
    plot: Markup
    lines: tuple[Line, ...]


def write_page(report: Mapping[str, Any], audit: Audit, folder: Path) -> Path:
    """Write the page of a finished audit into its folder; returns its path.

    The page holds its style, plots and pictures and needs no other file and no network.

    Arguments:
        report: of `build_report`.
        audit: what it was made from, for the pictures.
        folder: of the audit.
    """
    text = render_page("audit.html", _content(report, audit, folder), "diffkit.audit")
    with atomic_write(folder / PAGE_NAME, "w") as file:
        file.write(text)
    return folder / PAGE_NAME


def _content(report: Mapping[str, Any], audit: Audit, folder: Path) -> dict[str, Any]:
    models = [
        {
            "id": f"model-{i}",
            "name": model["name"],
            "attacked": attacked_words(model["attacked"]),
            "edits": _edit_parts(model, i),
            "purifiers": _purifier_parts(model, i),
            "mimicry": [_mimicry_part(found) for found in model["mimicry"]],
            "skipped": model["skipped"],
            "failed": model["failed"],
        }
        for i, model in enumerate(report["models"])
    ]
    return {
        "report": report,
        "level": f"{100 * report['level']:g} %",
        "models": models,
        "changes": [
            Line(label, tuple(estimate(report["change"][v].get(key)) for v in report["change"]))
            for key, label in _CHANGES.items()
            if key in report["change"][PROTECTED]
        ],
        "versions": [LABELS[v] for v in report["change"]],
        "galleries": [_gallery(audit, i, folder, report["seed"]) for i in _shown(audit)],
        "command": _command(report["command"]),
        "methods": sorted({p["method"] for p in report["pictures"] if p["method"]}),
    }


# -- tables -----------------------------------------------------------------------------------


def _edit_parts(model: Mapping[str, Any], number: int) -> list[Part]:
    """One part a number, the shown one first."""
    rows = model["threats"]
    names = list(dict.fromkeys(name for row in rows for name in row["numbers"]))
    first = shown_number(dict.fromkeys(names))
    names.sort(key=lambda name: name != first)
    parts = []
    for name in names:
        having = [row for row in rows if name in row["numbers"]]
        label = model["labels"].get(name, name)
        plot = effect_plot(
            f"effect-{number}-{name}",
            [_short(row) for row in having],
            [row["numbers"][name]["effect"] for row in having],
            label if len(label) < 40 else label.split(" (")[0],
        )
        lines = tuple(_edit_line(row, row["numbers"][name], name) for row in having)
        parts.append(Part(name, label, _about(name), Markup(plot), lines))
    return parts


def _edit_line(row: Mapping[str, Any], found: Mapping[str, Any], name: str) -> Line:
    score = name not in DISTANCES
    effect, original = found["effect"], found["vs_original"]
    cells = [estimate(effect.get(v), score) for v in (PROTECTED, CONTROL)]
    cells.append((number_of(found.get("over_random")), ""))
    cells += [estimate(effect.get(v), score) for v in (JPEG, AGAIN)]
    cells += [estimate(original.get(v)) for v in (PROTECTED, CLEAN)]
    name, reading = f"{row['threat']} {row['setting']}", reading_of(found)
    return Line(name, tuple(cells), reading, bool(found.get("clear")), row["honest"])


def _short(row: Mapping[str, Any]) -> str:
    if row["threat"] == "sdedit":
        return f"{row['parameters']['strength']:g}"
    return str(row["threat"]).replace("sdedit:", "")


def _about(name: str) -> str:
    if name in DISTANCES:
        return DISTANCES[name].about
    return (
        "Cosine of the edit and its prompt: whether the edit still succeeds. The effect is that of "
        "a version's edits minus that of the clean picture's; a protection lowers it."
    )


def _purifier_parts(model: Mapping[str, Any], number: int) -> list[Part]:
    rows = model["purifiers"]
    names = list(dict.fromkeys(name for row in rows for name in row["retention"]))
    first = shown_number(dict.fromkeys(names))
    names.sort(key=lambda name: name != first)
    several = len({row["threat"] for row in rows}) > 1
    parts = []
    for name in names:
        having = [row for row in rows if row["retention"].get(name)]
        titles = [row["purifier"] + (f", {row['threat']}" if several else "") for row in having]
        found = [row["retention"][name] for row in having]
        lines = tuple(
            Line(
                title,
                (
                    (percent(kept[PROTECTED]), ""),
                    (percent(kept[CONTROL]), ""),
                    estimate(kept["effect"][PROTECTED], name not in DISTANCES),
                    estimate(row["cost"].get(name)),
                ),
                f"{row['words']}; before an edit of {row['threat']}, {row['setting']}",
            )
            for title, row, kept in zip(titles, having, found, strict=True)
        )
        plot = retention_plot(f"retention-{number}-{name}", titles, found)
        parts.append(Part(name, model["labels"].get(name, name), _about(name), Markup(plot), lines))
    return parts


def _mimicry_part(found: Mapping[str, Any]) -> dict[str, Any]:
    """A table an imitator: a line a set that was learnt from, for each number."""
    tables = []
    for key, row in found["numbers"].items():
        lines = [
            Line(
                found["sets"][version],
                (estimate(value), estimate(row["effect"].get(version), True)),
            )
            for version, value in row["values"].items()
        ]
        tables.append({"label": found["labels"][key], "about": row["about"], "lines": lines})
    told = {name: _few(found[f"{name}_prompts"]) for name in ("instance", "sample")}
    facts = {key: found[key] for key in ("facts", "note")}
    return {"title": found["threat"], "tables": tables, **told, **facts}


def _few(prompts: Sequence[str]) -> str:
    """The first five, and how many more there are."""
    text = ", ".join(f"“{prompt}”" for prompt in prompts[:5])
    return text if len(prompts) <= 5 else f"{text} and {len(prompts) - 5} more"


# -- pictures ---------------------------------------------------------------------------------


def _shown(audit: Audit) -> list[int]:
    return shown_pictures(len(audit.pictures))


def _gallery(audit: Audit, number: int, folder: Path, seed: int) -> dict[str, Any]:
    """The strips of one picture: its versions, their edits, and the edits of purified ones."""
    picture = audit.pictures[number]
    strips = [Pair(tuple(_version_shots(picture, folder, seed)), "the pictures themselves")]
    for model in audit.models:
        strips += _edit_strips(model, number, folder, len(audit.models) > 1)
    return {"name": picture.name, "strips": strips}


def _edit_strips(model: ModelAudit, number: int, folder: Path, named: bool) -> list[Pair]:
    tail = f", {model.name}" if named else ""
    strips = []
    for row in model.rows:
        if (cell := row.cells.get(number)) is None:
            continue
        what = f"{row.threat.name} {row.threat.setting}"
        if row.purifier is not None:
            what = f"behind {row.purifier.name}, {what}"
        strips.append(Pair(tuple(_shots(cell, folder)), what + tail))
    return strips


def _shots(cell: Cell, folder: Path) -> list[Shot]:
    return [
        embed(folder / cell.pictures[v], folder, LABELS[v], f"edit of the {LABELS[v]} picture")
        for v in _TRIPLE
    ]


def _version_shots(picture: AuditPicture, folder: Path, seed: int) -> list[Shot]:
    """Clean, random and protected as the models see them, and the amplified change."""
    name = parameter_digest(picture.identity(seed))[:24]
    versions: Mapping[str, Tensor] | None = None
    shots = []
    for version in (*_TRIPLE, _DIFFERENCE):
        path = folder / PICTURES / name / f"{version.split()[0]}.png"
        if not path.is_file():
            versions = versions or open_versions(picture, seed)[0]
            pixels = (
                amplified_difference(versions[CLEAN], versions[PROTECTED])
                if version == _DIFFERENCE
                else versions[version]
            )
            with atomic_write(path) as file:
                to_pillow(pixels).save(file, "PNG")
        label = LABELS.get(version, version)
        shots.append(embed(path, folder, label, f"{label}: {picture.name}"))
    return shots


def _command(flags: Mapping[str, Any]) -> str:
    words = ["diffkit", "audit", str(flags.get("clean", "")), str(flags.get("protected", ""))]
    for key, value in flags.items():
        flag = "--" + key.replace("_", "-")
        if key in ("clean", "protected"):
            continue
        if key in _REPEATED:
            words += [word for item in value for word in (flag, str(item))]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            words += [flag, *(str(item) for item in value)]
        else:
            words += [flag, os.fspath(value) if isinstance(value, Path) else str(value)]
    return shlex.join(words)
