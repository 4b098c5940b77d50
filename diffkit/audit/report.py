"""audit.json: every number with its interval and its control, and what it was measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from diffkit import __version__
from diffkit.audit import intervals
from diffkit.audit.edits import gather
from diffkit.audit.intervals import CLEAR_RATIO, LEVEL
from diffkit.audit.measures import PROTECTED, Values, effect_summary, retention_summary
from diffkit.audit.outcome import Audit, ModelAudit, ThreatRow, prompt_of
from diffkit.audit.pictures import attacked_names
from diffkit.audit.purifiers.naming import public_text
from diffkit.audit.request import AuditRequest
from diffkit.protection.inputs import Skipped
from diffkit.protection.notice import notice

__all__ = ["SHOWN_NUMBER", "build_report"]

SHOWN_NUMBER = ("lpips", "latent_l2")
"""Numbers that summaries show, the first one that was measured."""


def build_report(audit: Audit, request: AuditRequest) -> dict[str, Any]:
    """Everything that was measured, as JSON values."""
    models = [_model(found, request.resamples) for found in audit.models]
    return {
        "kind": "diffkit audit",
        "diffkit": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": dict(request.command),
        "seed": request.seed,
        "level": LEVEL,
        "resamples": request.resamples,
        "clear_ratio": CLEAR_RATIO,
        "n": len(audit.pictures),
        "seeds": len(audit.seeds),
        "prompts": list(dict.fromkeys(prompt_of(p, request) for p in audit.pictures)),
        "notice": list(_notice(audit, models, request.resamples)),
        "pictures": [
            {**picture.facts(), "change": change}
            for picture, change in zip(audit.pictures, audit.changes, strict=True)
        ],
        "change": _changes(audit, request.resamples),
        "control": _control(audit),
        "unpaired": {
            "clean": list(_reasons(audit.pairing.clean, audit)),
            "protected": _reasons(audit.pairing.protected, audit),
        },
        "refused": _reasons(audit.refused, audit),
        "passed_over": _reasons(audit.pairing.links, audit),
        "models": models,
    }


def _reasons(items: Sequence[Skipped], audit: Audit) -> dict[str, str]:
    """Reasons by the path below PROTECTED; what lies below CLEAN is called so."""
    found = {}
    for item in items:
        inside = item.path.is_relative_to(audit.protected)
        root = audit.protected if inside else audit.clean
        name = item.path.name if item.path == root else item.path.relative_to(root).as_posix()
        found[name if inside else f"{name} (clean)"] = public_text(item.reason)
    return found


def _control(audit: Audit) -> list[str]:
    """What the random noise is, in sentences; the last ones say where it falls short."""
    controls = [picture.control for picture in audit.pictures]
    n, said = len(controls), []

    def some(count: int) -> str:
        return "all pictures" if count == n else f"{count} of {n} pictures"

    if recorded := sum(c.recorded for c in controls):
        said.append(f"its budget is that of the record ({some(recorded)})")
    if guessed := n - recorded:
        said.append(
            "its budget is the 99.5 % quantile of the change, as no record names one "
            f"({some(guessed)})"
        )
    if weighted := sum(c.contrast for c in controls):
        said.append(f"it is shared out by local contrast like the protection ({some(weighted)})")
    if masked := sum(c.masked for c in controls):
        said.append(f"it keeps within the mask of the protection ({some(masked)})")
    if unmasked := sum(c.unmasked for c in controls):
        said.append(
            "it lies everywhere although the protection had a mask, so it is too strong a control; "
            f"give that mask with --mask ({some(unmasked)})"
        )
    return said


def _model(found: ModelAudit, resamples: int) -> dict[str, Any]:
    plain = {_key(row): row for row in found.rows if not row.purifier}

    def plainly(reasons: Mapping[str, str]) -> dict[str, str]:
        return {key: public_text(why) for key, why in reasons.items()}

    return {
        "name": found.name,
        "attacked": found.attacked,
        "labels": found.labels,
        "threats": [_threat(row, resamples) for row in plain.values()],
        "purifiers": [
            _purified(row, plain[_key(row)], resamples)
            for row in found.rows
            if row.purifier and row.cells.keys() & plain[_key(row)].cells.keys()
        ],
        "mimicry": found.mimicry,
        "skipped": plainly(found.skipped),
        "failed": plainly(found.failed),
    }


def _key(row: ThreatRow) -> tuple[str, str]:
    return row.threat.name, row.threat.setting


def _values(row: ThreatRow, only: Sequence[int] | None = None) -> dict[str, Values]:
    numbers = sorted(row.cells) if only is None else only
    return gather([row.cells[number].measured for number in numbers])


def _threat(row: ThreatRow, resamples: int) -> dict[str, Any]:
    return {
        "threat": row.threat.name,
        "setting": row.threat.setting,
        "honest": row.threat.honest,
        "parameters": row.threat.parameters,
        "n": len(row.cells),
        "numbers": {
            name: effect_summary(values, resamples) for name, values in _values(row).items()
        },
    }


def _purified(row: ThreatRow, plain: ThreatRow, resamples: int) -> dict[str, Any]:
    assert row.purifier is not None
    both = sorted(row.cells.keys() & plain.cells.keys())
    behind, before = _values(row, both), _values(plain, both)
    cells = [row.cells[number] for number in both]
    shared = [name for name in before if name in behind and not before[name].information]
    costs = {
        name: intervals.mean(torch.stack([cell.cost[name] for cell in cells], 1), resamples)
        for name in cells[0].cost
        if all(name in cell.cost for cell in cells)
    }
    return {
        "threat": row.threat.name,
        "setting": row.threat.setting,
        "purifier": row.purifier.name,
        "words": row.purifier.words,
        "parameters": row.purifier.parameters,
        "n": len(both),
        "retention": {
            name: retention_summary(behind[name], before[name], resamples) for name in shared
        },
        "cost": {name: interval.to_json() for name, interval in costs.items()},
    }


def _changes(audit: Audit, resamples: int) -> dict[str, dict[str, Any]]:
    """What the change looks like, mean over the pictures, by version and number."""
    found: dict[str, dict[str, Any]] = {}
    for version in audit.changes[0]:
        rows = [change[version] for change in audit.changes]
        found[version] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                found[version][name] = intervals.mean([known], resamples).to_json()
    return found


def _notice(audit: Audit, models: Sequence[Mapping[str, Any]], resamples: int) -> tuple[str, ...]:
    """The mandatory sentences with what this audit measured."""
    named = sorted(attacked_names(audit.pictures))
    change = _changes(audit, resamples)[PROTECTED]
    parts = [f"PSNR {change['psnr']['value']:.1f} dB"]
    if "lpips" in change:
        parts.append(f"LPIPS {change['lpips']['value']:.3f}")
    largest = max(one[PROTECTED]["largest"] or 0 for one in audit.changes)
    parts.append(f"largest change {largest:g} levels")
    attacked = " and ".join(named) or "a model that no record names"
    return notice(attacked, retention=_left(models), cost=", ".join(parts) + " (means)")


def _left(models: Sequence[Mapping[str, Any]]) -> str | None:
    """Retention by purifier of the first model's first threat, in a few words."""
    rows = models[0]["purifiers"]
    rows = [row for row in rows if row["threat"] == rows[0]["threat"]]
    if not rows:
        return None
    name = next((key for key in SHOWN_NUMBER if key in rows[0]["retention"]), None)
    if name is None:
        return None
    words = []
    for row in rows:
        left = row["retention"][name][PROTECTED]
        value = None if left is None else left["value"]
        words.append(f"{row['purifier']} {'n/a' if value is None else f'{value:.0%}'}")
    label = models[0]["labels"].get(name, name)
    return f"{', '.join(words)} of the effect on {label}"
