"""Which metrics a run measures: those asked for that its inputs allow, and why not the others."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffkit.errors import UserError
from diffkit.evaluation.metrics.base import Metric, SampleMetric, SetMetric, Situation
from diffkit.evaluation.metrics.registry import GROUPS, METRICS, select
from diffkit.evaluation.metrics.tools import REWARD

__all__ = ["COST", "Chosen", "Selection", "choose"]

COST = "cost"
"""Time, memory, parameters and MACs: asked for like a metric, reported apart."""


@dataclass(frozen=True)
class Selection:
    """What `--metrics` asks for.

    Attributes:
        metrics: in the order of the registry, groups resolved.
        named: names given one by one: these are refused, not skipped, where they cannot be had.
        cost: whether the costs are measured too.
    """

    metrics: tuple[Metric, ...]
    named: frozenset[str]
    cost: bool

    @classmethod
    def parse(cls, words: Sequence[str]) -> Selection:
        """Names and groups; none is everything. Raises `UserError` for an unknown one."""
        known = (*METRICS, *GROUPS, COST)
        for word in words:
            if word not in known and not word.startswith(REWARD):
                raise UserError(f"--metrics {word}: unknown. {_nearest(word, known)}")
        others = [word for word in words if word != COST]
        metrics = select(others) if others or not words else ()
        rewards = (metric.name for metric in metrics if metric.name.startswith(REWARD))
        named = frozenset([*rewards, *(w for w in words if w in METRICS or w == COST)])
        return cls(metrics, named, not words or COST in words or "all" in words)

    def uses(self, need: str) -> bool:
        """Whether a selected metric needs it: an input or a network, see `Metric.needs`."""
        return any(need in metric.needs for metric in self.metrics)


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(known)}, {REWARD}NAME."


@dataclass(frozen=True)
class Chosen:
    """The metrics that are measured, by kind, and (name, reason) of those that cannot be."""

    sample: tuple[SampleMetric, ...]
    sets: tuple[SetMetric, ...]
    skipped: tuple[tuple[str, str], ...]

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All that are measured."""
        return (*self.sample, *self.sets)


def choose(selection: Selection, situations: Mapping[str, Situation], unpaired: str) -> Chosen:
    """Keep what every set allows.

    Args:
        situations: one a set.
        unpaired: why two sets cannot be compared picture by picture, "" where they can.

    Raises:
        UserError: a metric that was asked for by its name cannot be computed.
    """
    kept: list[Metric] = []
    skipped = []
    for metric in selection.metrics:
        reason = _reason(metric, situations, unpaired)
        if reason is None:
            kept.append(metric)
        elif metric.name in selection.named:
            raise UserError(f"--metrics {metric.name}: cannot be measured: {reason}.")
        else:
            skipped.append((metric.name, reason))
    return Chosen(
        tuple(metric for metric in kept if isinstance(metric, SampleMetric)),
        tuple(metric for metric in kept if isinstance(metric, SetMetric)),
        tuple(skipped),
    )


def _numbered(situation: Situation) -> bool:
    return all(text.isdecimal() for text in situation.prompts)


def _reason(metric: Metric, situations: Mapping[str, Situation], unpaired: str) -> str | None:
    if "against" in metric.needs and unpaired:
        return unpaired
    reads = "prompts" in metric.needs and metric.name.startswith(REWARD)
    if ("scorer" in metric.needs or reads) and all(
        _numbered(given) for given in situations.values()
    ):
        return "the prompts are numbers of classes, which no text-image network can read"
    for situation in situations.values():
        reason = metric.missing(situation)
        if reason is not None:
            return reason.rstrip(".")
    return None
