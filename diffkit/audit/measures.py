"""From values a picture and seed to numbers with intervals: effects, controls, what is left.

    effect      e(y) = d(E(y), E(x)); of a score S(E(y)) - S(E(x))
    retention   mean d(E(P(y)), E(P(x))) / mean d(E(y), E(x)), a ratio of means

x is the clean picture, y another version, E an edit, d a distance, P a purifier. Everything is
given beside the same number of the control, random noise of the same size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffkit.audit import intervals
from diffkit.audit.intervals import RESAMPLES

__all__ = ["CLEAN", "CONTROL", "PROTECTED", "Values", "effect_summary", "retention_summary"]

CLEAN, PROTECTED, CONTROL = "clean", "protected", "random"
"""Names of versions; the control is random noise of the protection's size."""


@dataclass(frozen=True)
class Values:
    """One number of every version, by the version's name; float (seeds, pictures) each.

    Attributes:
        effect: of every version but the clean one.
        vs_original: d(E(y), x) of a distance, S(E(y)) of a score, of every version.
        information: shown, but no effect in the sense of ratios (PSNR).
        score: effects are differences of scores, which have signs.
    """

    effect: Mapping[str, Tensor]
    vs_original: Mapping[str, Tensor]
    information: bool = False
    score: bool = False

    @property
    def clear(self) -> bool:
        """Whether the protection's effect is clear of the control's."""
        if self.information or CONTROL not in self.effect:
            return False
        return intervals.is_clear(self.effect[PROTECTED], self.effect[CONTROL])


def effect_summary(values: Values, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Every version's effect and vs_original with intervals, and the protection's beside random's.

    "over_random" is the ratio of means (distances only: a score's control lies around zero),
    "minus_random" the difference, "clear" whether the effect is clear of the control (see
    `intervals.is_clear`); absent for numbers of information.
    """
    found: dict[str, Any] = {
        "effect": {
            name: intervals.mean(v, resamples).to_json() for name, v in values.effect.items()
        },
        "vs_original": {
            name: intervals.mean(v, resamples).to_json() for name, v in values.vs_original.items()
        },
    }
    if not values.information and CONTROL in values.effect:
        mine, control = values.effect[PROTECTED], values.effect[CONTROL]
        if not values.score:
            found["over_random"] = intervals.ratio(mine, control, resamples).to_json()
        found["minus_random"] = intervals.difference(mine, control, resamples).to_json()
        found["clear"] = intervals.is_clear(mine, control, resamples)
    return found


def retention_summary(
    purified: Values, plain: Values, resamples: int = RESAMPLES
) -> dict[str, Any] | None:
    """What is left of the protection's effect behind a purifier, and of the control's.

    "protected" is None, read "n/a", where the effect without the purifier is not clear of the
    control: a share of nothing says nothing. "random" is the floor, what is left of the effect of
    mere noise; None of a score whose effect of noise may be zero. None for numbers of information.
    """
    if plain.information:
        return None

    def left(name: str) -> dict[str, float | None]:
        return intervals.ratio(purified.effect[name], plain.effect[name], resamples).to_json()

    floor = not plain.score or intervals.mean(plain.effect[CONTROL], resamples).excludes_zero
    return {
        PROTECTED: left(PROTECTED) if plain.clear else None,
        CONTROL: left(CONTROL) if floor else None,
        "effect": effect_summary(purified, resamples)["effect"],
    }


def stacked(rows: list[Tensor]) -> Tensor:
    """(seeds, pictures) of one (seeds,) a picture."""
    return torch.stack([row.double() for row in rows], 1)
