"""A whole audit: pairs, models, threats and purifiers, each measured once and kept."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffkit import __version__
from diffkit.audit.cells import Cell, CellStore, check_output
from diffkit.audit.distances import Ruler
from diffkit.audit.edits import (
    DEFAULT_PROMPT,
    EditThreat,
    Measurer,
    purified_versions,
    purifying_cost,
)
from diffkit.audit.measures import CLEAN, CONTROL, PROTECTED
from diffkit.audit.pairs import Pairing, pair_up
from diffkit.audit.pictures import AGAIN, AuditPicture, inspect, mask_file, open_versions
from diffkit.audit.purifiers.base import Models, Purifier
from diffkit.audit.purifiers.registry import parse_purifiers
from diffkit.audit.request import AuditRequest
from diffkit.audit.subjects import Subject
from diffkit.console import progress, warn
from diffkit.errors import RunFailed, UserError
from diffkit.files import check_writable, sha256
from diffkit.generation.engine import DTYPES, weights_digest
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.model_card import public_name
from diffkit.perceptual.pixels import MS_SSIM_SIDE
from diffkit.protection.image_file import Unreadable
from diffkit.protection.inputs import Skipped
from diffkit.protection.sidecar import parameter_digest

__all__ = ["Audit", "ModelAudit", "ThreatRow", "run_audit", "shown_pictures"]

SHOWN = 6
"""Pictures that the page shows."""


@dataclass(frozen=True)
class ThreatRow:
    """All pictures under one threat, with one cell a picture; `purifier` None for none."""

    threat: EditThreat
    cells: tuple[Cell, ...]
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
        mimicry: results of imitators, see `mimicry.py`.
    """

    name: str
    attacked: bool | None
    rows: list[ThreatRow] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    mimicry: list[Any] = field(default_factory=list)


@dataclass
class Audit:
    """Everything that a report is made from; `clean` is the file or folder of originals."""

    clean: Path
    pairing: Pairing
    pictures: list[AuditPicture]
    refused: list[Skipped]
    seeds: tuple[int, ...]
    models: list[ModelAudit] = field(default_factory=list)


def run_audit(
    request: AuditRequest, clean: Path, protected: Path, output: Path, overwrite: bool = False
) -> Audit:
    """Measure what is not measured yet, and gather everything.

    Raises:
        UserError: impossible flags, no pair, a model or purifier that cannot be had.
        RunFailed: memory or storage ran out; what is finished is kept.
    """
    request.check()
    check_output(output)
    pairing = pair_up(clean, protected, output)
    check_writable(output)
    store = CellStore(output)
    if overwrite:
        store.forget()
    audit: Audit | None = None
    for source in request.models:
        model = LatentDiffusion.load(source, dtype=DTYPES[request.dtype], device=request.device)
        for network in model.networks.values():
            network.requires_grad_(False).eval()
        ruler = Ruler(
            model,
            lpips=request.lpips,
            extractor=request.extractor,
            scorer=request.scorer,
        )
        if audit is None:
            audit = _inspected(request, clean, pairing, ruler)
        work = _Work(request, audit, store, model, ruler)
        audit.models.append(work.run())
        del model, ruler, work
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    assert audit is not None
    return audit


def shown_pictures(count: int) -> list[int]:
    """Numbers of the pictures on the page: at most 6, spread evenly."""
    if count <= SHOWN:
        return list(range(count))
    return [round(i * (count - 1) / (SHOWN - 1)) for i in range(SHOWN)]


def _inspected(request: AuditRequest, clean: Path, pairing: Pairing, ruler: Ruler) -> Audit:
    pictures, refused = [], list(pairing.unreadable)
    perceptual = "lpips" not in ruler.skipped
    for pair in progress(pairing.pairs, "looking at pictures"):
        try:
            mask = mask_file(request.mask, pair.clean)
            pictures.append(inspect(pair, request.seed, ruler.tools, perceptual, mask))
        except Unreadable as error:
            refused.append(Skipped(pair.protected, error.reason))
            warn(f"{pair.protected}: {error.reason}")
    if not pictures:
        raise UserError(f"none of {len(pairing.pairs)} pairs can be measured.")
    return Audit(clean, pairing, pictures, refused, request.noises(len(pictures)))


class _Work:
    """One model's part of an audit."""

    def __init__(
        self,
        request: AuditRequest,
        audit: Audit,
        store: CellStore,
        model: LatentDiffusion,
        ruler: Ruler,
    ) -> None:
        self.request, self.audit, self.store, self.model = request, audit, store, model
        self.measure = Measurer(model, ruler, request.batch_size)
        self.weights = weights_digest(model)
        self.purifiers = self._purifiers()
        self.shown = set(shown_pictures(len(audit.pictures)))

    def run(self) -> ModelAudit:
        name = public_name(self.model.source)
        attacked = {
            p.pair.record.model for p in self.audit.pictures if p.pair.record is not None
        } - {None}
        found = ModelAudit(name, name in attacked if attacked else None)
        jobs = list(self._jobs(found))
        if not jobs and not self.request.threats.mimicry:
            reasons = "; ".join(f"{key}: {why}" for key, why in found.skipped.items())
            raise UserError(f"{name}: can do nothing of --threats. {reasons}.")
        cells: dict[int, list[Cell]] = {}
        work = [(n, i) for n in range(len(jobs)) for i in range(len(self.audit.pictures))]
        for number, i in progress(work, f"editing with {name}"):
            cells.setdefault(number, []).append(self._cell(*jobs[number], i))
        for number, (threat, purifier) in enumerate(jobs):
            found.rows.append(ThreatRow(threat, tuple(cells[number]), purifier))
        for kind in self.request.threats.mimicry:
            found.mimicry.append(self._imitate(kind, found))
        ruler = self.measure.ruler
        measured = {
            key
            for row in found.rows
            for cell in row.cells
            for key in cell.measured[CLEAN].vs_original
        }
        found.labels = {key: ruler.label(key) for key in measured}
        found.labels["alignment"] = f"text alignment ({ruler.tools.scorer.label})"
        found.skipped |= {key: why for key, why in ruler.skipped.items() if key not in measured}
        if "ms_ssim" not in measured | ruler.skipped.keys():
            found.skipped["ms_ssim"] = f"needs sides of at least {MS_SSIM_SIDE} pixels"
        return found

    def _imitate(self, kind: str, found: ModelAudit) -> dict[str, Any]:
        from diffkit.audit.mimicry import imitate
        from diffkit.audit.mimicry_scores import score_imitation

        pictures, place = self.audit.pictures, (self.audit.clean, self.store.output)
        made = imitate(self.request, kind, self.model.source, self.weights, pictures, *place)
        originals = [self._open(picture)[0][CLEAN] for picture in pictures]
        entry = score_imitation(made, originals, self.measure.ruler, self.request.seed)
        found.skipped |= {f"{kind}: {key}": why for key, why in entry.pop("skipped").items()}
        return entry

    def _purifiers(self) -> list[Purifier]:
        request = self.request
        if request.purify is None or not request.threats.edits:
            return []
        models = Models(
            self.model,
            prompt=self._prompt(self.audit.pictures[0]),
            device=self.model.device,
            dtype=self.model.dtype,
        )
        found = parse_purifiers(request.purify, models)
        for purifier in found:
            purifier.prepare()
        return found

    def _jobs(self, found: ModelAudit) -> Iterator[tuple[EditThreat, Purifier | None]]:
        """Rows of the tables: every threat plain, then its main row behind each purifier."""
        for threat in self.request.threats.edits:
            if reason := threat.refusal(self.model):
                found.skipped[threat.name] = reason
            else:
                yield threat, None
        for threat in self.request.threats.main.values():
            if threat.name not in found.skipped:
                for purifier in self.purifiers:
                    yield threat, purifier

    def _cell(self, threat: EditThreat, purifier: Purifier | None, number: int) -> Cell:
        picture, shown = self.audit.pictures[number], number in self.shown
        prompt = self._prompt(picture)
        made_of = self._made_of(threat, purifier, picture, prompt)
        cell = self.store.load(made_of, shown)
        if cell is not None:
            return cell
        versions, mask = self._open(picture)
        subject = Subject(versions[CLEAN], self.model)
        seeds, measure = self.audit.seeds, self.measure
        cost: dict[str, torch.Tensor] = {}
        # the clean picture against itself tests the machinery; once a threat is enough
        main = self.request.threats.main[threat.name] == threat
        edited: Any = {name: v for name, v in versions.items() if main or name != AGAIN}
        if purifier is not None:
            kept = {name: versions[name] for name in (CLEAN, PROTECTED, CONTROL)}
            edited = purified_versions(purifier, kept, seeds)
            cost = purifying_cost(measure.ruler, subject, edited[CLEAN], seeds)
        result = measure(threat, subject, edited, seeds, prompt, mask)
        pictures: dict[str, torch.Tensor] = result.shown if shown else {}
        self.store.save(made_of, result.measured, cost, pictures)
        kept_cell = self.store.load(made_of, shown)
        assert kept_cell is not None
        return kept_cell

    def _open(self, picture: AuditPicture) -> Any:
        try:
            return open_versions(picture, self.request.seed)
        except Unreadable as error:
            raise RunFailed(
                f"{picture.pair.protected}: could be read before, not now ({error.reason})."
            ) from error

    def _prompt(self, picture: AuditPicture) -> str:
        record = picture.pair.record
        own = None if record is None else record.prompt
        return self.request.prompt or own or DEFAULT_PROMPT

    def _made_of(
        self, threat: EditThreat, purifier: Purifier | None, picture: AuditPicture, prompt: str
    ) -> dict[str, Any]:
        inpaints = picture.mask is not None and threat.name == "inpaint"
        return {
            "diffkit": __version__,
            "model": self.weights,
            "dtype": self.request.dtype,
            "threat": threat.name,
            "parameters": threat.parameters,
            "prompt": prompt,
            "seeds": list(self.audit.seeds),
            "clean": picture.pair.clean_sha256,
            "protected": picture.pair.protected_sha256,
            "control": [picture.levels, self.request.seed],
            "main": self.request.threats.main[threat.name] == threat,
            "mask": sha256(picture.mask) if picture.mask is not None and inpaints else None,
            "purifier": None if purifier is None else _identity(purifier),
            "measured with": self.measure.ruler.key,
        }


def _identity(purifier: Purifier) -> list[Any]:
    """What decides its results; where a model lies is told by a digest, not by a path."""
    place = None if purifier.source is None else str(Path(purifier.source).expanduser().absolute())
    return [purifier.name, purifier.parameters, parameter_digest({"source": place})[:16]]


def prompts_of(audit: Audit, request: AuditRequest) -> Sequence[str]:
    """The distinct prompts of the edits, in order."""
    own = [
        request.prompt or (p.pair.record.prompt if p.pair.record else None) or DEFAULT_PROMPT
        for p in audit.pictures
    ]
    return list(dict.fromkeys(own))
