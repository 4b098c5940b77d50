"""What a protection job consists of: which pictures, in which units, and what is done already.

The unit of work is a file where the surrogate is fixed, and a folder of the command line where one
is trained: its pictures are protected together, all of them or none.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from diffkit import __version__
from diffkit.errors import UserError
from diffkit.files import check_writable, sha256
from diffkit.protection.companions import CLASS_COUNT, folder_digest
from diffkit.protection.inputs import (
    Input,
    Skipped,
    check_originals,
    find_pictures,
    output_names,
)
from diffkit.protection.rounds import attack_rounds, prior_weight, training_steps
from diffkit.protection.settings import Settings
from diffkit.protection.sidecar import (
    is_result,
    parameter_digest,
    remove_leftovers,
    sidecar_path,
    state,
)
from diffkit.protection.targets import target_digest
from diffkit.protection.views import usual_views

__all__ = ["Item", "Job", "Request", "Unit", "plan_job"]

_SHOWN = 5
_LONGEST_NAME = 255  # bytes, on nearly all file systems


@dataclass(frozen=True)
class Request:
    """Everything that `diffkit protect` was asked for, but the model's weights.

    Attributes:
        paths: files and folders.
        output: folder of the results.
        settings: method and options.
        mask: a picture, white where pixels may change, or a folder of them matched by stem.
        keep_jpeg: JPEG files stay JPEG, encoded again.
        max_lpips: the budget is lowered until LPIPS is at most this.
        lpips: backbone of LPIPS, see `diffkit.perceptual.lpips`.
        batch_size: pictures of one size at once.
        lean: spare memory from the start.
        overwrite: replace results of other parameters.
        clean: folder of unprotected pictures of the same subject, for fsmg and aspl.
        class_images: folder of pictures of the class prompt.
    """

    paths: tuple[Path, ...]
    output: Path
    settings: Settings
    mask: Path | None = None
    keep_jpeg: bool = False
    max_lpips: float | None = None
    lpips: str = "alex"
    batch_size: int = 1
    lean: bool = False
    overwrite: bool = False
    clean: Path | None = None
    class_images: Path | None = None

    def check(self) -> None:
        """Raise `UserError` for impossible values and combinations."""
        self.settings.check()
        self._check_companions()
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: must be at least 1.")
        if self.mask is not None and not self.mask.exists():
            raise UserError(f"--mask {self.mask}: no such file or folder.")
        if self.max_lpips is None:
            return
        if not self.max_lpips > 0:
            raise UserError(f"--max-lpips {self.max_lpips}: must be above 0.")
        if self.settings.row.joint is not None:
            raise UserError(
                f"--max-lpips: {self.settings.method} protects all pictures of a folder with one "
                "budget; lower --strength instead."
            )

    def _check_companions(self) -> None:
        settings = self.settings
        if self.clean is not None and settings.row.joint not in ("fsmg", "aspl"):
            raise UserError(
                f"--clean: does nothing for the method {settings.method}; leave it out."
            )
        if self.class_images is not None and settings.class_prompt is None:
            raise UserError("--class-images: say what they show with --class-prompt.")
        if self.class_images is not None and settings.class_count is not None:
            raise UserError(
                "--class-count: no class pictures are made where --class-images gives them; leave "
                "one of the two out."
            )
        for name in ("clean", "class_images"):
            place: Path | None = getattr(self, name)
            if place is not None and not place.is_dir():
                raise UserError(f"--{name.replace('_', '-')} {place}: no such folder.")


@dataclass(frozen=True)
class Item:
    """One picture of a job.

    Attributes:
        source: the file.
        output: where its result goes.
        digest: SHA-256 of the file's bytes.
        parameters: `parameter_digest` of the job for this picture.
        mask: its mask, or None.
        done: the result is there already.
    """

    source: Input
    output: Path
    digest: str
    parameters: str
    mask: Path | None = None
    done: bool = False


@dataclass(frozen=True)
class Unit:
    """Pictures that are protected together: one, or those of a folder."""

    items: tuple[Item, ...]

    @property
    def done(self) -> bool:
        """True when every picture of it is."""
        return all(item.done for item in self.items)


@dataclass(frozen=True)
class Job:
    """All units in a fixed order, and what is left out."""

    units: tuple[Unit, ...]
    skipped: tuple[Skipped, ...] = field(default=())

    @property
    def items(self) -> list[Item]:
        """All pictures."""
        return [item for unit in self.units for item in unit.items]

    @property
    def pending(self) -> list[Unit]:
        """Units with something to do."""
        return [unit for unit in self.units if not unit.done]


def plan_job(request: Request, model: dict[str, Any] | None, on_cpu: bool = True) -> Job:
    """Find the pictures and what of them is done.

    Arguments:
        request: checked.
        model: name, revision, digest of the weights and dtype of the attacked model, and whatever
            else decides bytes. None only looks: nothing is written, nothing counts as done.

    Raises:
        UserError: bad paths, a mask that is missing, or results of other parameters at the place of
            these without `overwrite`.
    """
    inputs, skipped = find_pictures(request.paths, request.output)
    names = output_names(inputs, request.keep_jpeg)
    inputs, too_long = _with_room(inputs, names, request.output)
    skipped = [*skipped, *too_long]
    check_originals(inputs, names, request.output)
    if model is not None:
        check_writable(request.output)
        remove_leftovers(request.output)
    common = _parameters(request, model or {}, on_cpu)
    masks = _masks(request.mask)
    joint = request.settings.row.joint is not None
    found: list[tuple[Input, Path | None, str, str | None]] = []
    for source in inputs:
        mask = _mask_of(source, request.mask, masks)
        masked = None if mask is None else sha256(mask)
        found.append((source, mask, sha256(source.path), masked))
    sets = _set_digests(found) if joint else {}
    items = []
    for source, mask, digest, masked in found:
        own = common | {"mask": masked, "set": sets.get(source.root, "")}
        output = request.output / names[source.relative]
        items.append(Item(source, output, digest, parameter_digest(own), mask))
    if model is not None:
        items = _with_states(items, request.overwrite)
    return Job(tuple(_units(items, joint)), tuple(skipped))


def _parameters(request: Request, model: dict[str, Any], on_cpu: bool) -> dict[str, Any]:
    settings = request.settings
    usual = usual_views(settings.tiles, settings.row.encoder_only, on_cpu)
    target = settings.shown_target
    return {
        **dataclasses.asdict(settings),
        **dataclasses.asdict(settings.rule()),
        **_companions(request),
        "prompt": settings.shown_prompt,
        "views": usual if settings.views is None else settings.views,
        "prior_weight": prior_weight(settings, on_cpu),
        "target": target_digest(target) if target not in ("", "zero") else target,
        "keep_jpeg": request.keep_jpeg,
        "max_lpips": request.max_lpips,
        "lpips": request.lpips if request.max_lpips is not None else None,
        "model": model,
        "tool_version": __version__,
    }


def _companions(request: Request) -> dict[str, Any]:
    """What a surrogate learns from and how, defaults filled in."""
    settings = request.settings
    if settings.row.joint is None:
        return {}
    folders = {"clean": request.clean, "class_images": request.class_images}
    made = settings.class_prompt is not None and request.class_images is None
    return {
        "attack_rounds": attack_rounds(settings),
        "rounds": None,
        "train_steps": training_steps(settings),
        "surrogate": settings.surrogate or "lora",
        "class_count": (settings.class_count or CLASS_COUNT) if made else None,
        **{
            name: None if place is None else folder_digest(place, request.output)
            for name, place in folders.items()
        },
    }


def _set_digests(found: Sequence[tuple[Input, Any, str, str | None]]) -> dict[Path, str]:
    """For each PATH of the command line: what its pictures and their masks are, in any order."""
    groups: dict[Path, list[str]] = {}
    for source, _, digest, masked in found:
        groups.setdefault(source.root, []).append(f"{digest} {masked}")
    return {root: parameter_digest({"set": sorted(group)}) for root, group in groups.items()}


def _masks(place: Path | None) -> dict[str, Path]:
    if place is None or not place.is_dir():
        return {}
    found: dict[str, Path] = {}
    for path in sorted(place.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.stem in found:
            raise UserError(f"--mask: {found[path.stem].name} and {path.name} have one stem.")
        found[path.stem] = path
    return found


def _mask_of(source: Input, place: Path | None, masks: dict[str, Path]) -> Path | None:
    if place is None or not place.is_dir():
        return place
    if source.path.stem not in masks:
        raise UserError(f"--mask {place}: has no mask named {source.path.stem} for {source.path}.")
    return masks[source.path.stem]


def _with_states(items: list[Item], overwrite: bool) -> list[Item]:
    checked, foreign = [], []
    for item in items:
        found = state(item.output, item.digest, item.parameters)
        if found == "other":
            foreign.append(item.output)
        checked.append(dataclasses.replace(item, done=found == "done"))
    if overwrite:
        strangers = [path for path in foreign if not is_result(path)]
        if strangers:
            raise UserError(
                f"{_listed(strangers)}: not made by diffkit protect, so --overwrite does not "
                "replace it. Give another --output, or move it away."
            )
    elif foreign:
        raise UserError(
            f"{_listed(foreign)}: there already, but not made from these pictures with these "
            "settings. Give another --output, or --overwrite to replace them."
        )
    return checked


def _listed(paths: Sequence[Path]) -> str:
    names = ", ".join(os.fspath(path) for path in paths[:_SHOWN])
    return names + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else "")


def _with_room(
    inputs: Sequence[Input], names: Mapping[PurePosixPath, PurePosixPath], output: Path
) -> tuple[list[Input], list[Skipped]]:
    """The inputs whose result and record have names that a disk can hold, and the others."""
    kept, skipped = [], []
    for source in inputs:
        length = len(os.fsencode(sidecar_path(output / names[source.relative]).name))
        if length <= _LONGEST_NAME:
            kept.append(source)
        else:
            reason = f"its name is too long for a record beside it; shorten it by {length - 255}"
            skipped.append(Skipped(source.path, f"{reason} bytes or more"))
    return kept, skipped


def _units(items: list[Item], joint: bool) -> list[Unit]:
    if not joint:
        return [Unit((item,)) for item in items]
    groups: dict[Path, list[Item]] = {}
    for item in items:
        groups.setdefault(item.source.root, []).append(item)
    # by content, so that names and their order do not matter
    return [Unit(tuple(sorted(group, key=lambda item: item.digest))) for group in groups.values()]
