"""The JSON file beside every protected picture, and what it proves about a run.

`x.png` has `x.png.json`. Before the picture is written a hidden marker names the bytes that will
come and the job they belong to; it goes when picture and sidecar are both there. A picture without
a sidecar is therefore ours only if the marker names exactly its bytes: a run that was killed goes
on without being asked, and a stranger's picture is never replaced.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from diffkit import __version__
from diffkit.errors import UserError
from diffkit.files import TEMPORARY_PREFIX, atomic_write, read_json, sha256, write_json

__all__ = [
    "NOT_MEASURED",
    "Sidecar",
    "State",
    "parameter_digest",
    "is_result",
    "publish",
    "read_sidecar",
    "remove_leftovers",
    "sidecar_path",
    "state",
    "without_folders",
]

State = Literal["missing", "done", "other"]
NOT_MEASURED = "not measured"

_KIND = "diffkit protection"
_MARKER = ".diffkit-part"
_DIGESTS = ("input_sha256", "parameter_sha256", "output_sha256")
_AGE = 600.0  # seconds; no write of another run takes that long between two of its bytes
_FOLDERS = re.compile(r"(?<![\w./:])(?:[A-Za-z]:[\\/]|~?/)(?:[^\s/\\]+[\\/])*(?=[^\s/\\])")


@dataclass(frozen=True)
class Sidecar:
    """What was done to one picture. Levels are 8-bit steps.

    Attributes:
        method, levels, steps, model, model_revision, target, prompt, seed: the job; `seed` is the
            run's, not the picture's.
        input_sha256, output_sha256: of the file's bytes.
        parameter_sha256: `parameter_digest` of the job.
        views: views a step.
        working_sizes: (height, width) that the model saw.
        psnr, ssim, lpips: against the original; None where a measure is not available. PSNR is
            also None for an unchanged picture, whose `max_delta` is 0.
        max_delta, mean_delta: of |change| in levels.
        skipped_steps: steps left out because a gradient was not finite.
        loss_first, loss_last: the method's own loss.
        model_weights: digests of what was loaded of the attacked models, by which a copy of one
            under another name is known.
        ensemble: further models whose autoencoders were attacked.
        contrast: whether local contrast shared out the budget.
        mask_sha256: of the mask's file bytes; None without a mask.
        effect: "random_control": PSNR and LPIPS of random noise of equal budget;
            "encoder_amplification_over_random"; effects on edits with intervals, if measured.
        purification: retention by purifier, or "not measured".
        notices: what the user was told.
        tool_version: of diffkit.
    """

    method: str
    levels: int
    steps: int
    model: str | None
    model_revision: str | None
    target: str | None
    prompt: str | None
    seed: int
    input_sha256: str
    output_sha256: str
    parameter_sha256: str
    views: int
    working_sizes: tuple[tuple[int, int], ...]
    max_delta: float
    mean_delta: float
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    skipped_steps: int = 0
    loss_first: float | None = None
    loss_last: float | None = None
    surrogate_change: Sequence[float] | None = None
    model_weights: Sequence[str] = ()
    ensemble: Sequence[str] = ()
    contrast: bool = False
    mask_sha256: str | None = None
    effect: Mapping[str, Any] | None = None
    purification: Mapping[str, Any] | str = NOT_MEASURED
    notices: tuple[str, ...] = ()
    tool_version: str = __version__

    def as_json(self) -> dict[str, Any]:
        """The sidecar as JSON values: no absolute path, no number that JSON does not know.

        Only `prompt` is the user's own words and stays as it is.
        """
        values = dataclasses.asdict(self)
        plain = {key: _plain(value) for key, value in values.items()}
        plain |= {key: _last_part(values[key]) for key in ("model", "target")}
        return {"kind": _KIND} | plain | {"prompt": self.prompt}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return without_folders(value) if isinstance(value, str) else value


def without_folders(text: str) -> str:
    """Text without the folders of absolute paths: "/drive/mine/x.png is red" -> "x.png is red"."""
    return _FOLDERS.sub("", text)


def _last_part(text: str | None) -> str | None:
    """The name at the end of an absolute path; other text as it is."""
    if text is None:
        return None
    for path in (PurePosixPath(os.path.expanduser(text)), PureWindowsPath(text)):
        if path.is_absolute():
            return path.name
    return text


def sidecar_path(output: str | os.PathLike[str]) -> Path:
    """`x.png` -> `x.png.json`."""
    path = Path(output)
    return path.with_name(path.name + ".json")


def _marker_path(output: Path) -> Path:
    # A digest, since the picture's own name may be as long as the disk allows.
    digest = hashlib.sha256(os.fsencode(output.name)).hexdigest()
    return output.with_name(f".{digest[:16]}{_MARKER}")


def read_sidecar(output: str | os.PathLike[str]) -> Sidecar:
    """The sidecar of a protected picture.

    Raises `UserError` when there is none, or when it was not written by `diffkit protect`.
    """
    path = sidecar_path(output)
    values = read_json(path)
    if not isinstance(values, dict) or values.pop("kind", None) != _KIND:
        raise UserError(f"{path}: is not the record of a protected picture.")
    known = {field.name for field in dataclasses.fields(Sidecar)}
    try:
        record = Sidecar(**{key: value for key, value in values.items() if key in known})
        sizes = tuple((int(height), int(width)) for height, width in record.working_sizes)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: misses entries of a protected picture ({error}).") from error
    return dataclasses.replace(
        record,
        working_sizes=sizes,
        notices=tuple(record.notices),
        ensemble=tuple(record.ensemble),
        model_weights=tuple(record.model_weights),
    )


def parameter_digest(parameters: Mapping[str, Any]) -> str:
    """Hexadecimal SHA-256 of the canonical JSON of what decides the result of a job.

    Keys are sorted, 8 and 8.0 are the same, tuples are lists; the order of entries does not matter.
    Put in: method, levels, steps, model and revision, target, prompt, seed, tool version, and every
    other option that changes bytes. Raises TypeError for values that are no JSON, ValueError for
    numbers that are not finite.
    """
    text = json.dumps(
        _canonical(parameters),
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
    )
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("names of parameters must be text")
        return {key: _canonical(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def state(output: str | os.PathLike[str], input_sha256: str, parameter_sha256: str) -> State:
    """What is at a result's place.

    "missing": nothing, or what a killed run of this very job left; make it. "done": the finished
    result of this input and these parameters; skip it. "other": anything else (other parameters,
    another input, a picture that was changed since, a stranger's file); refuse unless the user
    allows to overwrite. Nothing is changed here.
    """
    picture, record = Path(output), sidecar_path(output)
    if not os.path.lexists(picture):
        return "other" if _is_foreign(record) else "missing"
    if not picture.is_file():
        return "other"
    job = (input_sha256, parameter_sha256)
    known = [_claims(record), _claims(_marker_path(picture))]
    if not any(claims is not None and claims[:2] == job for claims in known):
        return "other"
    present = sha256(picture)
    if known[0] == (*job, present):
        return "done"
    return "missing" if known[1] == (*job, present) else "other"


def is_result(output: str | os.PathLike[str]) -> bool:
    """Whether a sidecar or marker of ours stands beside what is there; a stranger's file has none.

    A sidecar without its picture is a result, too; a whole JSON file that is not ours is none.
    """
    picture, record = Path(output), sidecar_path(output)
    if _is_foreign(record) or (os.path.lexists(picture) and not picture.is_file()):
        return False
    claimed = [_claims(record), _claims(_marker_path(picture))]
    return any(claim is not None for claim in claimed)


def _claims(path: Path) -> tuple[str, str, str] | None:
    """(input, parameter, output digest) that a sidecar or marker names; None if it is torn."""
    try:
        values = read_json(path)
    except (UserError, OSError):
        return None
    if not isinstance(values, dict) or values.get("kind") != _KIND:
        return None
    first, second, third = (str(values.get(key)) for key in _DIGESTS)
    return first, second, third


def _is_foreign(record: Path) -> bool:
    """Whether a sidecar's name is taken by whole JSON, or a folder, that is not ours."""
    if not os.path.lexists(record):
        return False
    if not record.is_file():
        return True
    try:
        values = read_json(record)
    except UserError:
        return False  # torn
    return not (isinstance(values, dict) and values.get("kind") == _KIND)


def publish(output: str | os.PathLike[str], data: bytes, record: Sidecar) -> None:
    """Write a picture and its sidecar so that a kill at any moment can be told from a finish.

    The order: marker, picture, sidecar, marker away. Raises ValueError when the record is not that
    of `data`, and what `diffkit.files.atomic_write` raises.
    """
    if hashlib.sha256(data).hexdigest() != record.output_sha256:
        raise ValueError("the record names other output bytes")
    picture = Path(output)
    marker = _marker_path(picture)
    claims = {key: getattr(record, key) for key in _DIGESTS}
    write_json(marker, {"kind": _KIND, "picture": picture.name} | claims)
    with atomic_write(picture) as file:
        file.write(data)
    write_json(sidecar_path(picture), record.as_json())
    marker.unlink(missing_ok=True)


def remove_leftovers(output: str | os.PathLike[str], age: float = _AGE) -> int:
    """Remove what killed runs left in an output folder; returns how many files.

    These are temporary files, and markers that prove nothing any more: their picture never came, or
    its sidecar is there. Files changed in the last `age` seconds may belong to a run at work and
    stay, so two runs can share a folder.
    """
    removed = 0
    for path in list(_hidden(Path(output))):
        try:
            old = time.time() - path.stat().st_mtime >= age
            if old and (path.name.startswith(TEMPORARY_PREFIX) or _is_spent(path)):
                path.unlink()
                removed += 1
        except FileNotFoundError:
            continue  # its own run was quicker
    return removed


def _hidden(folder: Path) -> Iterator[Path]:
    for here, _, names in os.walk(folder):
        for name in names:
            part = name.startswith(".") and name.endswith(_MARKER)
            if name.startswith(TEMPORARY_PREFIX) or part:
                yield Path(here) / name


def _is_spent(marker: Path) -> bool:
    claims = _claims(marker)
    if claims is None:
        return False  # not ours
    picture = marker.with_name(str(read_json(marker).get("picture")))
    if not picture.is_file() or _claims(sidecar_path(picture)) == claims:
        return True
    return sha256(picture) != claims[2]
