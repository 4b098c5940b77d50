"""What an audit was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffkit.audit.mimicry_settings import MimicrySettings
from diffkit.audit.purifiers.registry import DEFAULT_PURIFIERS
from diffkit.audit.sdedit import noise_seeds
from diffkit.audit.threats import Threats
from diffkit.errors import UserError

__all__ = ["FEWEST_SEEDS", "AuditRequest", "purifier_list"]

FEWEST_SEEDS = 8
"""Noises of a single picture: an interval over fewer says little."""


@dataclass(frozen=True)
class AuditRequest:
    """Everything but the pictures.

    Attributes:
        models: where the models come from, the attacked one first.
        threats: see `parse_threats`.
        purify: a list for `parse_purifiers`, or None.
        prompt: of the edits; None is each attack's own.
        mask: a picture, white where it is painted, or a folder of them. Where it is the one of the
            protection, the random control keeps within it too.
        seeds: noises a picture; None is 8 for fewer than 8 pictures, else 4.
        mimicry: how imitators are trained.
        extractor, scorer, lpips: networks that measure.
        seed: of all draws.
        resamples: behind every interval.
        batch_size: pictures at once.
        dtype: name of the models' arithmetic.
        device: where they run.
        command: the flags that were given, for the report.
    """

    models: tuple[str, ...]
    threats: Threats
    purify: str | None = None
    prompt: str | None = None
    mask: Path | None = None
    seeds: int | None = None
    mimicry: MimicrySettings = field(default_factory=MimicrySettings)
    extractor: str = "embedded"
    scorer: str = "embedded"
    lpips: str = "alex"
    seed: int = 0
    resamples: int = 2000
    batch_size: int = 8
    dtype: str = "fp32"
    device: str = "cpu"
    command: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inpaints(self) -> bool:
        """Whether inpainting is among the threats."""
        return any(threat.name == "inpaint" for threat in self.threats.edits)

    def check(self) -> None:
        """Raise `UserError` for impossible values and combinations."""
        for name in ("seeds", "resamples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1.")
        if len(set(self.models)) < len(self.models):
            raise UserError("--model: give each model once.")
        if self.inpaints and self.mask is None:
            raise UserError("--threats inpaint: needs --mask, white where it paints.")
        if self.mask is not None and not self.mask.exists():
            raise UserError(f"--mask {self.mask}: no such file or folder.")
        self.mimicry.check(self.threats.mimicry)

    def noises(self, pictures: int) -> tuple[int, ...]:
        """The seeds of the edits of so many pictures.

        Raises `UserError` for too few seeds of a single picture.
        """
        count = self.seeds or (FEWEST_SEEDS if pictures < FEWEST_SEEDS else 4)
        if pictures == 1 and count < FEWEST_SEEDS:
            raise UserError(
                f"--seeds {count}: one picture needs {FEWEST_SEEDS} at least, or its interval says "
                "nothing."
            )
        return noise_seeds(self.seed, count)


def purifier_list(text: str) -> str | None:
    """--purify in words for `parse_purifiers`: "default" and "none" are replaced."""
    if text.strip() == "none":
        return None
    return DEFAULT_PURIFIERS if text.strip() == "default" else text
