"""What all tables of the experiment are made of: measures of arms, ratios, Markdown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from runner.experiment import Results

from diffkit.audit.intervals import Interval, ratio
from protection_parts import plan

__all__ = ["Values", "array", "effects", "retention", "table"]

Values = NDArray[np.float64]
"""(seeds, pictures)."""


def array(results: Results, arm: str, seeds: Sequence[int], *keys: str) -> Values:
    """(seeds, pictures) of a measure with a value a picture."""
    rows = []
    for values in (results.values[arm, seed] for seed in seeds):
        for key in keys:
            values = values[key]
        rows.append(values)
    return np.asarray(rows, dtype=np.float64)


def effects(
    results: Results, method: str, levels: int, *keys: str, control: str = "random"
) -> tuple[Values, Values] | None:
    """A measure of a method and of its control, over the seeds that both have."""
    arms = plan.edit_arm(method, levels), plan.edit_arm(control, levels)
    seeds = results.seeds(*arms)
    if not seeds:
        return None
    mine, theirs = (array(results, arm, seeds, *keys) for arm in arms)
    return mine, theirs


def retention(results: Results, method: str, levels: int, purifier: str) -> Interval | None:
    """mean effect behind the purifier / mean effect without it, on latents, at strength 0.3."""
    arm = plan.edit_arm(method, levels)
    seeds = results.seeds(arm)
    if not seeds or method == plan.LATENT:
        return None
    behind = array(results, arm, seeds, "latent", purifier)
    return ratio(behind, array(results, arm, seeds, "latent", f"{plan.SHOWN}"))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
