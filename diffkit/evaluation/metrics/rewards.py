"""Rewards as metrics: reward:NAME, with any name that `diffkit.rewards.spec` knows.

A reward that a model was trained on measures how well that worked, not how good the pictures are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffkit.evaluation.metrics.base import SampleBatch, SampleMetric
from diffkit.evaluation.metrics.tools import REWARD, Toolbox
from diffkit.rewards.spec import parse_reward

__all__ = ["reward_metric"]

_BLIND = frozenset({"aesthetic"})
"""Rewards that no prompt counts for."""


def reward_metric(word: str) -> SampleMetric:
    """The metric of "reward:SPEC"; nothing is loaded before it runs.

    Its name leaves the place of the weights out. Raises `UserError` for an unknown reward.
    """
    spec = word.removeprefix(REWARD)
    kind, side, _ = parse_reward(spec)

    def run(batch: SampleBatch, tools: Toolbox) -> Tensor:
        with torch.no_grad():
            rows = tools.reward_prompts(spec, batch.prompts or ("",) * len(batch.images))
            return tools.reward(spec).measure(batch.images, rows).cpu()

    return SampleMetric(
        f"{REWARD}{kind}" + ("" if side is None else f"@{side}"),
        "reward",
        "higher",
        frozenset({word} if kind in _BLIND else {word, "prompts"}),
        "What a scoring network gives the picture; only values of the same network compare.",
        run=run,
    )
