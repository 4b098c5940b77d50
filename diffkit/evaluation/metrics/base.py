"""What a metric is: one value a picture, or one value a set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from diffkit.evaluation.extractors import Extractor
from diffkit.evaluation.metrics.tools import Toolbox, networks
from diffkit.evaluation.moments import Moments
from diffkit.evaluation.neighbours import Neighbourhood, neighbourhood
from diffkit.evaluation.reference import MOMENT_ROWS, Reference, as_tensor

__all__ = [
    "Metric",
    "SampleBatch",
    "SampleMetric",
    "SetData",
    "SetMetric",
    "Situation",
    "Statistic",
    "WeightedStatistic",
]

Better = Literal["higher", "lower"] | None
Unit = Literal["pictures", "groups", "reference"]
WeightedStatistic = Callable[[Tensor], Tensor]
"""The statistic of bootstrap resamples: weights (R, n) int64 -> (R,) float64."""

_ABSENT = {
    "prompts": "the pictures have no prompts",
    "reference": "there is no reference; give --data",
    "against": "there is no second set to pair the pictures with; give --against",
}


@dataclass(frozen=True)
class SampleBatch:
    """What a per-picture metric sees.

    Attributes:
        images: (B, 3, H, W) float32 in [-1, 1], on the device of the toolbox.
        prompts: one a picture; empty where the set has none.
        other: the other set's pictures of the same requests, of the same shape; or None.
    """

    images: Tensor
    prompts: tuple[str, ...] = ()
    other: Tensor | None = None


@dataclass(frozen=True)
class SetData:
    """What a set metric sees.

    Attributes:
        features: (n, d) float32, perhaps a memory map.
        extractor: the network they come from.
        groups: (n,) int64, the prompt of each picture.
        reference: features of the real pictures; None only for metrics that need none.
        seed: of the draws that a metric makes.
    """

    features: npt.NDArray[np.float32]
    extractor: Extractor
    groups: Tensor
    reference: Reference | None
    seed: int = 0

    @property
    def rows(self) -> Tensor:
        """The features as a tensor over the same memory."""
        return as_tensor(self.features)

    @property
    def real(self) -> Reference:
        """The reference, where a metric's `needs` has made sure of it."""
        assert self.reference is not None
        return self.reference

    @cached_property
    def moments(self) -> Moments:
        """Mean and covariance of the features."""
        return Moments.of(self.rows, block=MOMENT_ROWS)

    @cached_property
    def neighbours(self) -> Neighbourhood:
        """Nearest-neighbour values against the reference, shared by four metrics."""
        return neighbourhood(as_tensor(self.real.features), self.rows)


@dataclass(frozen=True)
class Statistic:
    """A number of a set and what its interval is made from: `parts` or `of_weights`, never both.

    Attributes:
        value: the number.
        parts: values whose mean is the number.
        unit: what the parts belong to: this set's pictures, its prompts in the order of their
            numbers (those of one picture may be left out), or the pictures of the reference.
        of_weights: the number of bootstrap resamples of the set's pictures.
        note: how the number was made, for the report; "" where there is nothing to say.
    """

    value: float
    parts: Tensor | None = None
    unit: Unit = "pictures"
    of_weights: WeightedStatistic | None = None
    note: str = ""

    @classmethod
    def mean(cls, parts: Tensor, unit: Unit, note: str = "") -> Statistic:
        """The mean of values of one unit each."""
        return cls(float(parts.double().mean()), parts, unit, None, note)


@dataclass(frozen=True)
class Situation:
    """What a run can offer a metric before anything is measured.

    Attributes:
        has: of "prompts", "reference" and "against" what there is.
        prompts: of all pictures, in order.
        groups: (n,) int64 of all pictures.
        n_reference: real pictures, 0 without a reference.
        tools: the networks.
    """

    has: frozenset[str]
    prompts: Sequence[str]
    groups: Tensor
    n_reference: int
    tools: Toolbox


Refusal = Callable[[Situation], str | None]


def _never(situation: Situation) -> str | None:
    return None


@dataclass(frozen=True)
class _Common:
    """Fields of both kinds.

    Attributes:
        name: as the command line takes it.
        label: as a person reads it, without the network's name; see `title`.
        better: which direction is better, None where neither is as such.
        needs: of "prompts", "reference", "against" (inputs) and "features", "scorer", "classifier",
            "latent_lpips", "lpips", "reward:SPEC" (networks).
        about: one sentence for the page: what the number says.
        refuse: why it cannot be computed here though its inputs are there, or None.
        inception_label: what it may be called on Inception features only.
    """

    name: str
    label: str
    better: Better
    needs: frozenset[str]
    about: str
    refuse: Refusal = field(default=_never, kw_only=True)
    inception_label: str | None = field(default=None, kw_only=True)

    def missing(self, situation: Situation) -> str | None:
        """Why the metric cannot be computed in this situation, None when it can be."""
        for need in ("prompts", "reference", "against"):
            if need in self.needs and need not in situation.has:
                return _ABSENT[need]
        return self.refuse(situation)

    def title(self, extractor: Extractor | None, tools: Toolbox) -> str:
        """The label with the network that measures: "FID" on Inception features only."""
        if "features" in self.needs and extractor is not None:
            if self.inception_label is not None and extractor.inception:
                return self.inception_label
            return f"{self.label} ({extractor.label})"
        network = self.network(extractor, tools)
        return f"{self.label} ({network})" if network else self.label

    def network(self, extractor: Extractor | None, tools: Toolbox) -> str:
        """The label of the network that measures, "" for none."""
        if "features" in self.needs:
            return extractor.label if extractor is not None else ""
        return next((tools.label(need) for need in networks(self.needs)), "")

    def resize(self, extractor: Extractor | None, tools: Toolbox) -> str:
        """How that network resizes pictures, "" for none."""
        if "features" in self.needs:
            return extractor.resize if extractor is not None else ""
        return next((tools.resize(need) for need in networks(self.needs)), "")


@dataclass(frozen=True)
class SampleMetric(_Common):
    """One value a picture; the set's number is their mean.

    `run` maps a batch to (B,) float32 on the CPU.
    """

    run: Callable[[SampleBatch, Toolbox], Tensor] = field(kw_only=True)

    @property
    def kind(self) -> Literal["sample"]:
        """The word in reports."""
        return "sample"


@dataclass(frozen=True)
class SetMetric(_Common):
    """One number a set, from features of all its pictures."""

    run: Callable[[SetData], Statistic] = field(kw_only=True)

    @property
    def kind(self) -> Literal["set"]:
        """The word in reports."""
        return "set"


Metric = SampleMetric | SetMetric
