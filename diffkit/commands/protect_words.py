"""What `diffkit protect` says: what to expect before, what was measured after, no verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from diffkit.models.loading import EMBEDDED
from diffkit.models.model_card import public_name
from diffkit.protection.inputs import Skipped
from diffkit.protection.job import Job, Request
from diffkit.protection.notice import notice
from diffkit.protection.run import Outcome
from diffkit.protection.sidecar import Sidecar, read_sidecar

__all__ = ["CLEAR", "closing", "hints", "left_out", "measured", "model_name", "opening"]

CLEAR = 1.5
"""An effect below this many times that of random noise is not clearly above it."""


def model_name(request: Request, source: str) -> str:
    """The attacked model, as a person knows it."""
    if request.settings.row.loss is None:
        return "no model at all"
    names = [public_name(name) for name in (source, *request.settings.ensemble)]
    return " and ".join(names)


def opening(request: Request, source: str, device: str, auto: bool) -> tuple[str, ...]:
    """What is said before anything is done.

    Arguments:
        request: what was asked for.
        source: the attacked model as the user gave it.
        device: where it runs.
        auto: the method was chosen by the device.
    """
    settings, lines = request.settings, []
    if settings.row.loss is None:
        lines.append(
            "The method random is the control that others are compared with: noise that no model "
            "was asked about. It protects nothing."
        )
    elif source == EMBEDDED:
        lines.append(
            "This run protects nothing real: it is computed against the small embedded model, "
            "which nobody imitates pictures with. For real pictures give --model the model that "
            "you fear: a diffusers folder, a .safetensors file or a hub id."
        )
    if auto:
        where = "a CPU" if device == "cpu" else f"the device {device}"
        other = "sdst- on a GPU" if device == "cpu" else "texture on a CPU"
        lines.append(
            f"method: {settings.method} ({settings.row.words}), chosen for {where}; it is {other}, "
            "and --method chooses another."
        )
    else:
        lines.append(f"method: {settings.method} ({settings.row.words})")
    lines.append("What this is, and what it is not:")
    lines.extend(f"  - {line}" for line in notice(model_name(request, source)))
    return tuple(lines)


def hints(job: Job, request: Request, processes: int, measures: bool) -> tuple[str, ...]:
    """What a user may not have meant, once the pictures are known.

    Arguments:
        processes: how many share the work.
        measures: --report or --preview was given.
    """
    lines, units = [], len(job.pending)
    joint = request.settings.row.joint is not None
    if joint and units > 1 and all(len(unit.items) == 1 for unit in job.pending):
        lines.append(
            f"{request.settings.method} trains one surrogate for each of {units} pictures, since "
            "they were given one by one. Give their folder to protect them together, which is "
            "quicker and protects more."
        )
    if processes > max(1, units):
        what = "folders" if joint else "pictures"
        lines.append(f"{processes} processes share {units} {what}: the others wait.")
    kept = sum(item.done for item in job.items)
    if measures and kept:
        lines.append(
            f"--report and --preview are made with a result; {kept} are there already, and "
            "`diffkit audit` measures those."
        )
    return tuple(lines)


def left_out(skipped: Sequence[Skipped], failed: Mapping[str, str]) -> list[str]:
    """Every file that was not protected, with the reason."""
    lines = [f"skipped {item.path}: {item.reason}" for item in skipped]
    return lines + [f"failed {path}: {reason}" for path, reason in failed.items()]


def closing(outcome: Outcome, request: Request, source: str) -> tuple[str, ...]:
    """What is said at the end: counts, what is missing and why, and what was measured.

    Numbers are medians over the pictures of this run, read from their records.
    """
    made = len(outcome.made)
    lines = left_out(outcome.skipped, outcome.failed)
    parts = [f"{made} picture{'' if made == 1 else 's'} protected in {request.output}"]
    if outcome.kept:
        parts.append(f"{outcome.kept} there already")
    if outcome.skipped:
        parts.append(f"{len(outcome.skipped)} files skipped")
    if outcome.failed:
        parts.append(f"{len(outcome.failed)} failed")
    lines.append(", ".join(parts) + ".")
    if made == 0:
        return tuple(lines)
    found = measured(outcome.made)
    lines.extend(_change(found))
    lines.extend(_effect(found, request, source))
    lines.extend(_left(found["purification"]))
    lines.append(notice(model_name(request, source))[-1])
    return tuple(lines)


def measured(outputs: Sequence[Path]) -> dict[str, Any]:
    """Medians over the records of some results; None where none of them has the number.

    "random" is the control, noise of equal budget on the same pictures. "over_random" is how many
    times the effect is that of the control: of the change of encodings ("encoding"), and with
    --report of edits, by distance; "unclear" counts the pictures where it is not clearly above it.
    """
    records = [read_sidecar(path) for path in outputs]
    effects = [record.effect or {} for record in records]
    controls = [effect.get("random_control") or {} for effect in effects]
    gains = [effect.get("encoder_amplification_over_random") for effect in effects]
    return {
        "pictures": len(records),
        "psnr": _median(record.psnr for record in records),
        "ssim": _median(record.ssim for record in records),
        "lpips": _median(record.lpips for record in records),
        "max_delta": max((record.max_delta for record in records), default=None),
        "random": {name: _median(row.get(name) for row in controls) for name in ("psnr", "lpips")},
        "over_random": {"encoding": _ratios(gains)} | _edits(effects),
        "purification": _retention(records),
    }


def _change(found: Mapping[str, Any]) -> list[str]:
    """The cost to the pictures, beside that of the control."""

    def words(row: Mapping[str, Any]) -> str:
        shown = [("PSNR", row["psnr"], ".1f", " dB"), ("LPIPS", row["lpips"], ".3f", "")]
        parts = [f"{name} {value:{form}}{unit}" for name, value, form, unit in shown if value]
        return ", ".join(parts)

    mine = words(found)
    if not mine:
        return ["The pictures are unchanged."]
    lpips = "" if found["lpips"] is not None else " (LPIPS not measured)"
    control = words(found["random"])
    beside = f"; random noise of equal budget: {control}" if control else ""
    return [
        f"Change of the pictures, median: {mine}, at most {found['max_delta']:g} levels{lpips}"
        f"{beside}."
    ]


def _effect(found: Mapping[str, Any], request: Request, source: str) -> list[str]:
    """How far the effects are above those of the control, and a warning where they are not."""
    lines, total = [], found["pictures"]
    names = {"encoding": f"The encodings of {model_name(request, source)} moved"}
    for key, row in found["over_random"].items():
        if row["median"] is None:
            continue
        what = names.get(key, f"Edits changed ({key})")
        lines.append(
            f"{what} {_times(row['median'])} times as much as under random noise of equal budget, "
            f"median of {total} (least {_times(row['least'])})."
        )
        if row["unclear"]:
            lines.append(
                f"warning: on {row['unclear']} of {total} pictures that is not clearly above "
                "random noise; take it for no effect there."
            )
    if len(lines) == 0 and request.settings.row.loss is not None:
        lines.append("The effect was not measured.")
    return lines


def _ratios(values: Sequence[float | None], clear: Sequence[bool] | None = None) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    if clear is None:
        clear = [value >= CLEAR for value in known]
    return {
        "median": _median(known),
        "least": min(known, default=None),
        "unclear": len(clear) - sum(clear),
    }


def _edits(effects: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By distance, what --report measured on edits."""
    rows = [effect.get("sdedit", {}).get("numbers", {}) for effect in effects]
    names = {name: None for row in rows for name, entry in row.items() if "over_random" in entry}
    found = {}
    for name in names:
        entries = [row[name] for row in rows if name in row]
        ratios = [entry["over_random"]["value"] for entry in entries]
        found[name] = _ratios(ratios, [bool(entry["clear"]) for entry in entries])
    return found


def _retention(records: Sequence[Sidecar]) -> dict[str, dict[str, Any]] | None:
    """purifier -> distance -> medians of what is left of the effect, and of random noise's."""
    tables = [r.purification for r in records if isinstance(r.purification, Mapping)]
    found: dict[str, dict[str, Any]] = {}
    for name in {name: None for table in tables for name in table}:
        rows = [table[name] for table in tables if name in table]
        for distance in {key: None for row in rows for key in row}:
            entries = [row[distance] for row in rows if distance in row]
            found.setdefault(name, {})[distance] = {
                key: _median((entry.get(key) or {}).get("value") for entry in entries)
                for key in ("protected", "random")
            }
    return found or None


def _left(found: Mapping[str, Mapping[str, Any]] | None) -> list[str]:
    if found is None:
        return [
            "Left after purification: not measured (--report --purify jpeg75,resize measures it)."
        ]
    lines = ["Left of the effect after purification, median (in brackets: of random noise's):"]
    for name, distances in found.items():
        parts = []
        for distance, row in distances.items():
            mine, floor = (_percent(row[key]) for key in ("protected", "random"))
            parts.append(f"{distance} {mine} ({floor})")
        lines.append(f"  {name}: {', '.join(parts)}")
    return lines


def _times(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.0%}"


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
