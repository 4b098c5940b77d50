"""How near imitators come to the clean pictures: S(y) - S(x), S a number of a set of pictures.

x is the set drawn by the imitator of the clean pictures, y that of another version's; picture i of
both has the same prompt and noise, so resamples draw the same pictures of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkit.audit.distances import Ruler
from diffkit.audit.intervals import LEVEL
from diffkit.audit.measures import CLEAN
from diffkit.audit.mimicry import Imitation
from diffkit.evaluation.compare import Resampling
from diffkit.evaluation.metrics import sets
from diffkit.evaluation.metrics.base import SetData, SetMetric, Situation, Statistic
from diffkit.evaluation.pictures import to_float
from diffkit.evaluation.reference import Reference

__all__ = ["NOTE", "score_imitation"]

_METRICS: tuple[SetMetric, ...] = (sets.FRECHET, sets.KERNEL, sets.PRECISION)
NOTE = (
    "Each line is one training. The intervals draw the pictures of the trained imitators anew and "
    "leave out what another training seed would change, which may be as much as the differences "
    "seen here."
)
"""To be read beside every number of imitators."""

_ALIGNMENT = "Cosine of the drawn picture and its prompt: whether the imitator still obeys."


def score_imitation(
    found: Imitation,
    originals: Sequence[Tensor],
    ruler: Ruler,
    seed: int,
    resamples: int | None = None,
) -> dict[str, Any]:
    """The numbers of one kind of imitator, as the report holds them.

    Arguments:
        originals: the clean pictures, uint8 (3, H, W).
        ruler: gives the extractor and the scorer.
        seed, resamples: of the intervals; see `Resampling` for None.
    """
    extractor = ruler.extractor
    real = _features(ruler, [picture[None] for picture in originals])
    reference = Reference.of(real, extractor, "pictures at their own size", "the clean pictures")
    groups = torch.arange(len(found.prompts))
    features = {
        version: _features(ruler, list(drawn.split(16))) for version, drawn in found.samples.items()
    }
    data = {
        version: SetData(rows, extractor, groups, reference, seed)
        for version, rows in features.items()
    }
    entry: dict[str, Any] = {
        "threat": found.kind,
        "facts": found.facts,
        "note": NOTE,
        "instance_prompts": list(found.captions),
        "sample_prompts": list(dict.fromkeys(found.prompts)),
        "sets": found.labels,
        "labels": {},
        "numbers": {},
        "skipped": {},
    }
    situation = Situation(
        frozenset({"reference", "prompts"}), found.prompts, groups, len(real), ruler.tools
    )
    for metric in _METRICS:
        if reason := metric.refuse(situation):
            entry["skipped"][metric.label] = reason
            continue
        statistics = {version: metric.run(one) for version, one in data.items()}
        entry["labels"][metric.name] = metric.title(extractor, ruler.tools)
        entry["numbers"][metric.name] = _numbers(statistics, groups, seed, resamples, metric.about)
    aligned = {
        version: Statistic.mean(_alignment(ruler, drawn, found.prompts), "pictures")
        for version, drawn in found.samples.items()
    }
    entry["labels"]["alignment"] = f"text alignment ({ruler.tools.scorer.label})"
    entry["numbers"]["alignment"] = _numbers(aligned, groups, seed, resamples, _ALIGNMENT)
    return entry


def _features(ruler: Ruler, batches: Sequence[Tensor]) -> Any:
    rows = [ruler.extractor(to_float(batch.to(ruler.tools.device))) for batch in batches]
    return torch.cat(rows).numpy().astype(np.float32)


def _alignment(ruler: Ruler, drawn: Tensor, prompts: Sequence[str]) -> Tensor:
    values = torch.empty(len(drawn))
    for prompt in dict.fromkeys(prompts):
        rows = [i for i, text in enumerate(prompts) if text == prompt]
        values[rows] = ruler.alignment(ruler.see(drawn[rows]), prompt)
    return values


def _numbers(
    statistics: Mapping[str, Statistic],
    groups: Tensor,
    seed: int,
    resamples: int | None,
    about: str,
) -> dict[str, Any]:
    """Every version's value, and its difference from the clean one's."""
    both = {"model": groups, "against": groups}
    resampling = Resampling(both, "noises", seed, LEVEL, resamples)
    values: dict[str, Any] = {}
    effects: dict[str, Any] = {}
    for version, statistic in statistics.items():
        pair = {"model": statistic, "against": statistics[CLEAN]}
        found = resampling.of_statistics(pair)
        values[version] = found.values["model"].to_json()
        if version != CLEAN and found.difference is not None:
            effects[version] = found.difference.to_json()
    return {"about": about, "values": values, "effect": effects}
