"""The parts of report.json that say what was measured, and the rows of samples.jsonl."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from diffkit import __version__
from diffkit.evaluation.compare import Pairing
from diffkit.evaluation.entrants import Entrant, names_of
from diffkit.evaluation.pictures import PictureSet
from diffkit.evaluation.plan import PromptPlan
from diffkit.evaluation.request import LEVEL, EvaluationRequest

__all__ = ["head", "sample_rows", "set_facts"]


def head(
    request: EvaluationRequest, command: Mapping[str, Any], stamps: Mapping[str, str]
) -> dict[str, Any]:
    """Who made the report, when, and of what: `stamps` tell whether the same files are there."""
    return {
        "diffkit": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": dict(command),
        "sources": dict(stamps),
        "seed": request.seed,
        "level": LEVEL,
        "resamples": request.resamples or 1000,
    }


def set_facts(
    entrants: Mapping[str, Entrant], prompts: PromptPlan, pairing: Pairing
) -> dict[str, Any]:
    """The sets, how many pictures and prompts they have, and how two belong together."""
    names = names_of(entrants)
    first = entrants["model"]
    texts = {text for text in first.prompts if text}
    return {
        "sets": {name: entrant.facts(names[name]) for name, entrant in entrants.items()},
        "n": len(first),
        "prompts": len(texts),
        "prompts_from": prompts.source,
        "per_prompt": prompts.per_prompt,
        "pairing": pairing if len(entrants) > 1 else None,
    }


def sample_rows(
    entrants: Mapping[str, Entrant],
    sets: Mapping[str, PictureSet],
    pairing: Pairing,
    values: Mapping[str, Mapping[str, Tensor]],
    output: Path,
) -> list[dict[str, Any]]:
    """One row a request: its pictures, paths relative to `output`, and their values.

    Sets that do not answer the same requests have rows of their own.
    """
    numbers = {
        metric: {name: found.tolist() for name, found in by_set.items()}
        for metric, by_set in values.items()
    }
    together = [tuple(sets)] if pairing != "none" else [(name,) for name in sets]
    rows: list[dict[str, Any]] = []
    for names in together:
        entrant = entrants[names[0]]
        groups = entrant.groups.tolist()
        for i, prompt in enumerate(entrant.prompts):
            found = {
                metric: {name: by_set[name][i] for name in names if name in by_set}
                for metric, by_set in numbers.items()
            }
            rows.append(
                {
                    "index": i,
                    "prompt": prompt,
                    "group": groups[i],
                    "pictures": {
                        name: os.path.relpath(sets[name].path(i), output) for name in names
                    },
                    "values": {metric: row for metric, row in found.items() if row},
                }
            )
    return rows
