"""What an audit found, as reports and pages read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffkit.audit.cells import Cell
from diffkit.audit.edits import DEFAULT_PROMPT, EditThreat
from diffkit.audit.pairs import Pairing
from diffkit.audit.pictures import AuditPicture
from diffkit.audit.purifiers.base import Purifier
from diffkit.audit.request import AuditRequest
from diffkit.protection.inputs import Skipped

__all__ = ["Audit", "ModelAudit", "ThreatRow", "prompt_of", "shown_pictures"]

SHOWN = 6
"""Pictures that the page shows."""


@dataclass(frozen=True)
class ThreatRow:
    """The pictures under one threat: number of the picture -> its cell; `purifier` None for none.

    Pictures that broke off under this threat are not there.
    """

    threat: EditThreat
    cells: Mapping[int, Cell]
    purifier: Purifier | None = None


@dataclass
class ModelAudit:
    """What was measured with one model.

    Attributes:
        name: as reports have it.
        attacked: whether the records name it; None where there are no records.
        rows: see `ThreatRow`.
        labels: of distances and scores.
        skipped: (what, why) of what could not be measured with it.
        failed: (picture and edit, why) of what broke off; the rest was measured.
        mimicry: results of imitators, see `mimicry.py`.
    """

    name: str
    attacked: bool | None
    rows: list[ThreatRow] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    mimicry: list[Any] = field(default_factory=list)


@dataclass
class Audit:
    """Everything that a report is made from.

    Attributes:
        clean, protected: the files or folders.
        pairing: of their pictures.
        pictures: those that can be measured.
        refused: the others.
        seeds: of the noises.
        changes: what the change of each picture looks like, by version; see `change_of`.
        plans: what was to be made with each model, see `Plan.as_json`.
        models: what was measured with each.
    """

    clean: Path
    protected: Path
    pairing: Pairing
    pictures: list[AuditPicture]
    refused: list[Skipped]
    seeds: tuple[int, ...]
    changes: list[dict[str, dict[str, float | None]]] = field(default_factory=list)
    plans: list[dict[str, Any]] = field(default_factory=list)
    models: list[ModelAudit] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether nothing was refused and nothing broke off."""
        return not self.refused and not any(model.failed for model in self.models)


def shown_pictures(count: int) -> list[int]:
    """Numbers of the pictures on the page: at most 6, spread evenly."""
    if count <= SHOWN:
        return list(range(count))
    return [round(i * (count - 1) / (SHOWN - 1)) for i in range(SHOWN)]


def prompt_of(picture: AuditPicture, request: AuditRequest) -> str:
    """What the edits of a picture are asked for: the given prompt, the attack's own, a default."""
    record = picture.pair.record
    own = None if record is None else record.prompt
    return request.prompt or own or DEFAULT_PROMPT
