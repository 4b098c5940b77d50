"""A whole audit: pairs, models, threats and purifiers, each measured once and kept."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from diffkit import __version__
from diffkit.audit.cells import CellStore, check_output
from diffkit.audit.distances import Ruler
from diffkit.audit.mimicry_settings import check_device
from diffkit.audit.outcome import Audit
from diffkit.audit.pairs import Pairing, pair_up
from diffkit.audit.pictures import change_of, inspect, mask_file
from diffkit.audit.request import AuditRequest
from diffkit.audit.work import Work
from diffkit.console import progress, say, warn
from diffkit.errors import UserError
from diffkit.files import check_writable
from diffkit.generation.engine import DTYPES
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.image_file import Unreadable
from diffkit.protection.inputs import Skipped

__all__ = ["run_audit"]


def run_audit(
    request: AuditRequest,
    clean: Path,
    protected: Path,
    output: Path,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Audit:
    """Say what will be made, measure what is not measured yet, and gather everything.

    With `dry_run` nothing is measured: the audit that is returned holds its pictures only.

    Raises:
        UserError: impossible flags, no pair, a model or purifier that cannot be had.
        RunFailed: storage ran out, or nothing could be measured; what is finished is kept.
    """
    request.check()
    check_output(output)
    pairing = pair_up(clean, protected, output)
    _check_imitators(request, len(pairing.pairs))
    check_writable(output)
    store = CellStore(output)
    if overwrite and not dry_run:
        store.forget()
    audit = _looked_at(request, clean, protected, pairing)
    for source in request.models:
        model = LatentDiffusion.load(source, dtype=DTYPES[request.dtype], device=request.device)
        for network in model.networks.values():
            network.requires_grad_(False).eval()
        tools = {"lpips": request.lpips, "extractor": request.extractor, "scorer": request.scorer}
        ruler = Ruler(model, **tools)
        work = Work(request, audit, store, model, ruler)
        plan = work.plan()
        audit.plans.append(plan.as_json())
        say(plan.words)
        if not dry_run:
            if not audit.changes:
                _measure_changes(request, audit, store, ruler)
            audit.models.append(work.run())
        del model, ruler, work
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return audit


def _check_imitators(request: AuditRequest, pictures: int) -> None:
    """What imitators need of the pictures and the machine, before anything else is done."""
    for kind in request.threats.mimicry:
        if pictures < 2:
            raise UserError(f"--threats {kind}: learns from a folder of pictures; there is one.")
    if request.threats.mimicry:
        check_device(request.device)


def _looked_at(request: AuditRequest, clean: Path, protected: Path, pairing: Pairing) -> Audit:
    pictures, refused = [], list(pairing.unreadable)
    for pair in progress(pairing.pairs, "looking at pictures"):
        try:
            mask = mask_file(request.mask, pair.clean)
            pictures.append(inspect(pair, mask, request.inpaints))
        except Unreadable as error:
            refused.append(Skipped(pair.protected, error.reason))
            warn(f"{pair.protected}: {error.reason}")
    if not pictures:
        reasons = "; ".join(sorted({item.reason for item in refused}))
        raise UserError(f"none of {len(pairing.pairs)} pairs can be measured: {reasons}.")
    _check_imitators(request, len(pictures))
    used = request.inpaints or any(picture.control.masked for picture in pictures)
    if request.mask is not None and not used:
        raise UserError(
            f"--mask {request.mask}: is for inpainting, or the mask of the protection, which no "
            "record names; add inpaint to --threats, or leave it out."
        )
    seeds = request.noises(len(pictures))
    return Audit(clean, protected, pairing, pictures, refused, seeds)


def _measure_changes(request: AuditRequest, audit: Audit, store: CellStore, ruler: Ruler) -> None:
    """What the change of every picture looks like, at the pictures' own size."""
    tools = None if "lpips" in ruler.skipped else ruler.tools
    key = None if tools is None else tools.key("lpips")
    for picture in progress(audit.pictures, "measuring the change"):
        made_of = {"diffkit": __version__, "lpips": key, **picture.identity(request.seed)}
        measured = store.change(made_of, lambda: change_of(picture, request.seed, tools))  # noqa: B023
        audit.changes.append(measured)
