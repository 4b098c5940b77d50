"""One model's part of an audit: every threat plain, then behind purifiers, then the imitators."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from diffkit import __version__
from diffkit.audit.cells import Cell, CellStore, content_digest
from diffkit.audit.distances import Ruler
from diffkit.audit.edits import EditThreat, Measurer, Result, purified_versions, purifying_cost
from diffkit.audit.estimate import Cells, Plan, plan_edits
from diffkit.audit.measures import CLEAN, CONTROL, PROTECTED
from diffkit.audit.mimicry import Learner, imitate
from diffkit.audit.mimicry_scores import score_imitation
from diffkit.audit.outcome import Audit, ModelAudit, ThreatRow, prompt_of, shown_pictures
from diffkit.audit.pictures import AGAIN, AuditPicture, is_attacked, open_versions
from diffkit.audit.purifiers.base import Models, Purifier
from diffkit.audit.purifiers.registry import parse_purifiers
from diffkit.audit.request import AuditRequest
from diffkit.audit.subjects import Subject
from diffkit.console import progress, warn
from diffkit.errors import RunFailed, UserError
from diffkit.files import sha256
from diffkit.generation.engine import weights_digest
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.model_card import public_name
from diffkit.perceptual.pixels import MS_SSIM_SIDE
from diffkit.protection.image_file import Unreadable

__all__ = ["Work"]

_PURIFIED = (CLEAN, PROTECTED, CONTROL)
"""Versions that go through purifiers."""

Job = tuple[EditThreat, Purifier | None]


class Work:
    """What is to be done with one model.

    Raises `UserError` for a purifier that cannot be had, and for a model that can do nothing of
    what was asked for.
    """

    def __init__(
        self,
        request: AuditRequest,
        audit: Audit,
        store: CellStore,
        model: LatentDiffusion,
        ruler: Ruler,
    ) -> None:
        self.request, self.audit, self.store, self.model = request, audit, store, model
        self.name = public_name(model.source)
        self.measure = Measurer(model, ruler, request.batch_size)
        self.weights = weights_digest(model)
        self.learner = Learner.of(model, self.weights)
        self.shown = set(shown_pictures(len(audit.pictures)))
        attacked = is_attacked(audit.pictures, self.name, self.weights)
        self.found = ModelAudit(self.name, attacked)
        self.threats = [t for t in request.threats.edits if self._can(t.name, t.refusal(model))]
        self.kinds = [
            k for k in request.threats.mimicry if self._can(k, self.learner.refusal(k))
        ]  # fmt: skip
        if not self.threats and not self.kinds:
            reasons = "; ".join(f"{key}: {why}" for key, why in self.found.skipped.items())
            raise UserError(f"{self.name}: can do nothing of --threats. {reasons}.")
        self.purifiers = self._purifiers()
        self.purifier_keys = {p.name: self._identity(p) for p in self.purifiers}
        self.jobs = list(self._jobs())

    def _can(self, name: str, reason: str | None) -> bool:
        if reason is not None:
            self.found.skipped[name] = reason
        return reason is None

    def _purifiers(self) -> list[Purifier]:
        request = self.request
        if request.purify is None or not self.threats:
            return []
        self.models = Models(
            self.model,
            prompt=prompt_of(self.audit.pictures[0], request),
            device=self.model.device,
            dtype=self.model.dtype,
        )
        found = parse_purifiers(request.purify, self.models)
        for purifier in found:
            purifier.prepare()
        return found

    def _identity(self, purifier: Purifier) -> dict[str, Any]:
        """What decides its results: a model of its own by its weights, not by where it lies."""
        weights = None
        if purifier.source is not None:
            place = Path(purifier.source).expanduser()
            own = place.exists()
            weights = (
                content_digest(place) if own else weights_digest(self.models.of(purifier.source))
            )
        told = None if purifier.kind.model == "none" else self.models.prompt
        return {
            "name": purifier.name,
            "parameters": purifier.parameters,
            "weights": weights,
            "prompt": told,
        }

    def _jobs(self) -> Iterator[Job]:
        """Rows of the tables: every threat plain, then its main row behind each purifier."""
        for threat in self.threats:
            yield threat, None
        for name in dict.fromkeys(threat.name for threat in self.threats):
            for purifier in self.purifiers:
                yield self.request.threats.main[name], purifier

    def plan(self) -> Plan:
        """How many edits are to be made, and about how long they take."""
        pending: list[Cells] = []
        for threat, purifier in self.jobs:
            for number, picture in enumerate(self.audit.pictures):
                made_of = self._made_of(threat, purifier, picture)
                if self.store.load(made_of, number in self.shown) is None:
                    count = len(_PURIFIED) if purifier else 5 if self._is_main(threat) else 4
                    pending.append(Cells(threat, purifier is not None, count, picture.size))
        present = len(self.jobs) * len(self.audit.pictures) - len(pending)
        return plan_edits(self.request, self.audit, self.model, pending, present, self.kinds)

    def run(self) -> ModelAudit:
        """Make and measure what is not there yet.

        Raises `RunFailed` when nothing at all could be measured.
        """
        cells: dict[int, dict[int, Cell]] = {number: {} for number in range(len(self.jobs))}
        work = [(n, i) for n in cells for i in range(len(self.audit.pictures))]
        for number, i in progress(work, f"editing with {self.name}"):
            cell = self._cell(*self.jobs[number], i)
            if cell is not None:
                cells[number][i] = cell
        for number, (threat, purifier) in enumerate(self.jobs):
            if cells[number]:
                self.found.rows.append(ThreatRow(threat, cells[number], purifier))
        if not self.found.rows and not self.kinds:
            raise RunFailed(f"nothing could be measured: {next(iter(self.found.failed.values()))}")
        self._name_numbers()
        self._imitations()
        return self.found

    def _name_numbers(self) -> None:
        """Labels of what was measured, and why something was not."""
        ruler, found = self.measure.ruler, self.found
        cells = [cell for row in found.rows for cell in row.cells.values()]
        measured = {
            key for cell in cells for key in cell.measured[CLEAN].vs_original
        }  # fmt: skip
        found.labels = {key: ruler.label(key) for key in sorted(measured)}
        found.labels["alignment"] = f"text alignment ({ruler.tools.scorer.label})"
        found.skipped |= ruler.skipped
        if cells and "ms_ssim" not in measured | ruler.skipped.keys():
            found.skipped["ms_ssim"] = f"needs sides of at least {MS_SSIM_SIDE} pixels"

    # -- edits --------------------------------------------------------------------------------

    def _cell(self, threat: EditThreat, purifier: Purifier | None, number: int) -> Cell | None:
        """What is measured of one picture; None where it broke off, which is put on record."""
        picture, shown = self.audit.pictures[number], number in self.shown
        made_of = self._made_of(threat, purifier, picture)
        cell = self.store.load(made_of, shown)
        if cell is not None:
            return cell
        try:
            result, cost = self._measured(threat, purifier, picture)
        except RunFailed as error:
            behind = "" if purifier is None else f", {purifier.name}"
            what = f"{picture.name}, {threat.name} {threat.setting}{behind}"
            self.found.failed[what] = str(error)
            warn(f"{what}: {error}")
            return None
        self.store.save(made_of, result.measured, cost, result.shown if shown else {})
        return self.store.load(made_of, shown)

    def _measured(
        self, threat: EditThreat, purifier: Purifier | None, picture: AuditPicture
    ) -> tuple[Result, dict[str, torch.Tensor]]:
        versions, mask = self._open(picture)
        subject = Subject(versions[CLEAN], self.model)
        seeds, measure = self.audit.seeds, self.measure
        cost: dict[str, torch.Tensor] = {}
        # the clean picture against itself tests the machinery; once a threat is enough
        edited: Any = {n: v for n, v in versions.items() if self._is_main(threat) or n != AGAIN}
        if purifier is not None:
            kept = {name: versions[name] for name in _PURIFIED}
            edited = purified_versions(purifier, kept, seeds)
            cost = purifying_cost(measure.ruler, subject, edited[CLEAN], seeds)
        prompt = prompt_of(picture, self.request)
        return measure(threat, subject, edited, seeds, prompt, mask), cost

    def _open(self, picture: AuditPicture) -> Any:
        try:
            return open_versions(picture, self.request.seed)
        except Unreadable as error:
            raise RunFailed(f"could be read before, not now ({error.reason}).") from error

    def _is_main(self, threat: EditThreat) -> bool:
        return self.request.threats.main[threat.name] == threat

    def _made_of(
        self, threat: EditThreat, purifier: Purifier | None, picture: AuditPicture
    ) -> dict[str, Any]:
        inpaints = picture.mask is not None and threat.name == "inpaint"
        return {
            "diffkit": __version__,
            "model": self.weights,
            "dtype": self.request.dtype,
            "threat": threat.name,
            "parameters": threat.parameters,
            "prompt": prompt_of(picture, self.request),
            "seeds": list(self.audit.seeds),
            **picture.identity(self.request.seed),
            "main": self._is_main(threat),
            "mask": sha256(picture.mask) if picture.mask is not None and inpaints else None,
            "purifier": None if purifier is None else self.purifier_keys[purifier.name],
            "measured with": self.measure.ruler.key,
        }

    # -- imitators ----------------------------------------------------------------------------

    def _imitations(self) -> None:
        """Train imitators, with the editor out of memory: the trainer loads the model anew."""
        if not self.kinds:
            return
        self.purifiers, self.jobs = [], []
        self.models = Models()
        self.measure = Measurer(self.model, self.measure.ruler, self.request.batch_size)
        self.model.to("meta")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        pictures, place = self.audit.pictures, (self.audit.clean, self.store.output)
        originals = [self._open(picture)[0][CLEAN] for picture in pictures]
        for kind in self.kinds:
            made = imitate(self.request, kind, self.learner, pictures, *place)
            entry = score_imitation(
                made, originals, self.measure.ruler, self.request.seed, self.request.resamples
            )
            skipped = entry.pop("skipped")
            self.found.skipped |= {f"{kind}: {key}": why for key, why in skipped.items()}
            self.found.mimicry.append(entry)
