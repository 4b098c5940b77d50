"""What an evaluation is asked for: one or two sets of pictures, measured against real ones."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from diffkit.data.images import EXTENSIONS
from diffkit.data.layout import list_files
from diffkit.errors import UserError
from diffkit.generation.plan import Request
from diffkit.models.loading import resolve

__all__ = ["DEFAULT_NUM", "DEFAULT_PER_PROMPT", "LEVEL", "EvaluationRequest", "Side", "stamp"]

DEFAULT_NUM = 64
DEFAULT_PER_PROMPT = 4
LEVEL = 0.95
"""Confidence of every interval."""

SetName = Literal["model", "against"]


@dataclass(frozen=True)
class Side:
    """One of the two sets: a model and how it is sampled, or a folder of pictures.

    Attributes:
        name: "model", the candidate, or "against", the baseline.
        source: "embedded", a model folder, a .safetensors file, a hub id, or a picture folder.
        steps, guidance, scheduler: the sampler; None is the model's own default.
        loras: (path or hub id, weight).
    """

    name: SetName
    source: str
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    loras: tuple[tuple[str, float], ...] = ()

    @cached_property
    def kind(self) -> Literal["model", "pictures"]:
        """ "pictures" for a folder with pictures and without a model_index.json, else "model"."""
        folder = Path(resolve(self.source)).expanduser()
        if not folder.is_dir() or (folder / "model_index.json").is_file():
            return "model"
        names = (os.path.splitext(name)[1].lower() for name in list_files(folder))
        return "pictures" if any(ending in EXTENSIONS for ending in names) else "model"

    def describe(self) -> dict[str, Any]:
        """JSON-ready values for config.json."""
        path = Path(self.source)
        return {
            "source": os.path.abspath(path) if path.exists() else self.source,
            "kind": self.kind,
            "steps": self.steps,
            "guidance": self.guidance,
            "scheduler": self.scheduler,
            "loras": [list(lora) for lora in self.loras],
        }


@dataclass(frozen=True)
class EvaluationRequest:
    """An evaluation as asked for; None is a default that depends on the models or the data.

    Attributes:
        model, against: the sets; a difference is model - against.
        data: a folder of real pictures, or a reference saved by an earlier evaluation.
        prompts: a file of prompts; else the captions of `data`, else those of the model's card.
        metrics: names or groups of names; empty for everything that the inputs allow.
        num: pictures of each set; None is `DEFAULT_NUM`, for picture folders all.
        per_prompt: pictures a prompt; None is `DEFAULT_PER_PROMPT`.
        size, seed, dtype: of the generated pictures; the seed also draws the resamples.
        extractor: the feature network of the set metrics, see `load_extractor`.
        scorer, lpips: the text-image network and the perceptual one, see `Toolbox`.
        resamples: bootstrap resamples of each interval; None is 1000 for means over pictures,
            fewer for numbers of whole sets.
        batch_size, device: how the work is done; they enter the costs, no other number.
    """

    model: Side
    against: Side | None = None
    data: Path | None = None
    prompts: Path | None = None
    metrics: tuple[str, ...] = ()
    num: int | None = None
    per_prompt: int | None = None
    size: str | None = None
    seed: int = 0
    dtype: str = "fp32"
    extractor: str = "embedded"
    scorer: str = "embedded"
    lpips: str = "alex"
    resamples: int | None = None
    batch_size: int = 4
    device: str = "cpu"

    @property
    def sides(self) -> tuple[Side, ...]:
        """The one or two sets."""
        return (self.model,) if self.against is None else (self.model, self.against)

    @property
    def generated(self) -> tuple[Side, ...]:
        """The sets that a model has to draw."""
        return tuple(side for side in self.sides if side.kind == "model")

    def check(self) -> None:
        """Refuse wrong numbers and options without effect with `UserError`; loads nothing."""
        for name, least in (("num", 2), ("per_prompt", 1), ("batch_size", 1), ("resamples", 100)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{_flag(name)} {value}: must be at least {least}.")
        if self.per_prompt is not None and self.per_prompt > (num := self.num or DEFAULT_NUM):
            raise UserError(f"--per-prompt {self.per_prompt}: more than --num, which is {num}.")
        for side in self.sides:
            self._check_sampler(side)
        if not self.generated:
            self._refuse_idle("a folder of pictures is measured as it is; leave it out.")
        if self.data is not None and not self.data.exists():
            raise UserError(
                f"--data {self.data}: no such folder or file; give a folder of pictures, or the "
                "reference.safetensors of an earlier evaluation."
            )

    def _check_sampler(self, side: Side) -> None:
        asked = Request(
            prompts=("",),
            model=side.source,
            steps=side.steps,
            guidance=side.guidance,
            size=self.size,
            seed=self.seed,
        )
        try:
            asked.check()
        except UserError as error:
            raise UserError(
                f"for {side.name}: {error}" if len(self.sides) > 1 else str(error)
            ) from None

    def _refuse_idle(self, reason: str) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("prompts", "per_prompt", "size", "dtype"):
            if getattr(self, name) != defaults[name]:
                raise UserError(f"{_flag(name)}: does nothing here, {reason}")

    def describe(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What decides the numbers, as it lies in config.json, the prompts as a digest."""
        digest = hashlib.blake2b("\n".join(prompts).encode(), digest_size=8).hexdigest()
        return {
            "model": self.model.describe(),
            "against": None if self.against is None else self.against.describe(),
            "data": None if self.data is None else os.path.abspath(self.data),
            "prompts": digest,
            "metrics": list(self.metrics),
            "num": self.num,
            "per_prompt": self.per_prompt,
            "size": self.size,
            "seed": self.seed,
            "dtype": self.dtype,
            "extractor": self.extractor,
            "scorer": self.scorer,
            "lpips": self.lpips,
            "resamples": self.resamples,
        }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def stamp(source: str | os.PathLike[str]) -> str:
    """Digest of the names, sizes and times of a local file or folder; a hub id stays a name."""
    path = Path(resolve(os.fspath(source))).expanduser()
    if not path.exists():
        return os.fspath(source)
    files = [path] if path.is_file() else [path / name for name in list_files(path)]
    rows = ((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return hashlib.blake2b(repr(sorted(rows)).encode(), digest_size=16).hexdigest()
