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
from diffkit.audit.pictures import LABELS, AuditPicture
from diffkit.audit.request import AuditRequest
from diffkit.audit.run import Audit, ModelAudit, ThreatRow, prompts_of
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
        "prompts": list(prompts_of(audit, request)),
        "notice": list(_notice(audit, models, request.resamples)),
        "pictures": [picture.facts() for picture in audit.pictures],
        "change": _changes(audit.pictures, request.resamples),
        "unpaired": {
            "clean": [str(item.path.name) for item in audit.pairing.clean],
            "protected": _reasons(audit.pairing.protected),
        },
        "refused": _reasons(audit.refused),
        "models": models,
    }


def _reasons(items: Sequence[Any]) -> dict[str, str]:
    return {item.path.name: item.reason for item in items}


def _model(found: ModelAudit, resamples: int) -> dict[str, Any]:
    plain = {(row.threat.name, row.threat.setting): row for row in found.rows if not row.purifier}
    return {
        "name": found.name,
        "attacked": found.attacked,
        "labels": found.labels,
        "threats": [_threat(row, resamples) for row in plain.values()],
        "purifiers": [
            _purified(row, plain[row.threat.name, row.threat.setting], resamples)
            for row in found.rows
            if row.purifier
        ],
        "mimicry": found.mimicry,
        "skipped": found.skipped,
    }


def _values(row: ThreatRow) -> dict[str, Values]:
    return gather([cell.measured for cell in row.cells])


def _threat(row: ThreatRow, resamples: int) -> dict[str, Any]:
    return {
        "threat": row.threat.name,
        "setting": row.threat.setting,
        "honest": row.threat.honest,
        "parameters": row.threat.parameters,
        "numbers": {
            name: effect_summary(values, resamples) for name, values in _values(row).items()
        },
    }


def _purified(row: ThreatRow, plain: ThreatRow, resamples: int) -> dict[str, Any]:
    assert row.purifier is not None
    behind, before = _values(row), _values(plain)
    shared = [name for name in before if name in behind and not before[name].information]
    costs = {
        name: intervals.mean(torch.stack([cell.cost[name] for cell in row.cells], 1), resamples)
        for name in row.cells[0].cost
        if all(name in cell.cost for cell in row.cells)
    }
    return {
        "threat": row.threat.name,
        "setting": row.threat.setting,
        "purifier": row.purifier.name,
        "words": row.purifier.words,
        "parameters": row.purifier.parameters,
        "retention": {
            name: retention_summary(behind[name], before[name], resamples) for name in shared
        },
        "cost": {name: interval.to_json() for name, interval in costs.items()},
    }


def _changes(pictures: Sequence[AuditPicture], resamples: int) -> dict[str, dict[str, Any]]:
    """What the change looks like, mean over the pictures, by version and number."""
    found: dict[str, dict[str, Any]] = {}
    for version in pictures[0].change:
        rows = [picture.change[version] for picture in pictures]
        found[version] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                found[version][name] = intervals.mean([known], resamples).to_json()
    return found


def _notice(audit: Audit, models: Sequence[Mapping[str, Any]], resamples: int) -> tuple[str, ...]:
    """The mandatory sentences with what this audit measured."""
    named = sorted({p.pair.record.model or "" for p in audit.pictures if p.pair.record} - {""})
    change = _changes(audit.pictures, resamples)[PROTECTED]
    parts = [f"PSNR {change['psnr']['value']:.1f} dB"]
    if "lpips" in change:
        parts.append(f"LPIPS {change['lpips']['value']:.3f}")
    largest = max(picture.change[PROTECTED]["largest"] or 0 for picture in audit.pictures)
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


def version_label(name: str) -> str:
    """A version as a person reads it."""
    return LABELS.get(name, name)
