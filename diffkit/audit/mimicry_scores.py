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
from diffkit.audit.intervals import CLEAR_RATIO, LEVEL
from diffkit.audit.measures import CLEAN, CONTROL, PROTECTED
from diffkit.audit.mimicry import Imitation
from diffkit.evaluation.compare import Comparison, Estimate, Resampling
from diffkit.evaluation.metrics import sets
from diffkit.evaluation.metrics.base import SetData, SetMetric, Situation, Statistic
from diffkit.evaluation.pictures import to_float
from diffkit.evaluation.reference import Reference

__all__ = ["score_imitation"]

_METRICS: tuple[SetMetric, ...] = (sets.FRECHET, sets.KERNEL, sets.PRECISION)
_CLEAR, _NOT_CLEAR = "clear of random noise", "not clear of random noise"
_ALIGNMENT = "Cosine of the drawn picture and its prompt: whether the imitator still obeys."


def score_imitation(
    found: Imitation, originals: Sequence[Tensor], ruler: Ruler, seed: int
) -> dict[str, Any]:
    """The numbers of one kind of imitator, as the report holds them.

    Arguments:
        originals: the clean pictures, uint8 (3, H, W).
        ruler: gives the extractor and the scorer.
        seed: of the resamples.
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
        entry["numbers"][metric.name] = _numbers(statistics, groups, seed, metric.about)
    aligned = {
        version: Statistic.mean(_alignment(ruler, drawn, found.prompts), "pictures")
        for version, drawn in found.samples.items()
    }
    entry["labels"]["alignment"] = f"text alignment ({ruler.tools.scorer.label})"
    entry["numbers"]["alignment"] = _numbers(aligned, groups, seed, _ALIGNMENT)
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
    statistics: Mapping[str, Statistic], groups: Tensor, seed: int, about: str
) -> dict[str, Any]:
    """Every version's value, its difference from the clean one's, and what that says."""

    def compared(a: str, b: str) -> Comparison:
        both = {"model": groups, "against": groups}
        resampling = Resampling(both, "noises", seed, LEVEL, None)
        return resampling.of_statistics({"model": statistics[a], "against": statistics[b]})

    values: dict[str, Any] = {}
    effects: dict[str, Estimate] = {}
    for version in statistics:
        found = compared(version, CLEAN)
        values[version] = found.values["model"].to_json()
        if version != CLEAN and found.difference is not None:
            effects[version] = found.difference
    readings = {
        version: _reading(effect, effects[CONTROL], compared(version, CONTROL).difference)
        for version, effect in effects.items()
        if version != CONTROL
    }
    return {
        "about": about,
        "values": values,
        "effect": {version: effect.to_json() for version, effect in effects.items()},
        "readings": readings,
        "clear": readings[PROTECTED] == _CLEAR,
    }


def _reading(effect: Estimate, control: Estimate, apart: Estimate | None) -> str:
    """As `intervals.is_clear` has it, for numbers of sets."""
    assert apart is not None
    excluded = all(e.interval.low > 0 or e.interval.high < 0 for e in (effect, apart))
    far = abs(effect.value) >= CLEAR_RATIO * abs(control.value)
    return _CLEAR if excluded and far else _NOT_CLEAR
