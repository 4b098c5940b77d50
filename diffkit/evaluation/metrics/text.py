"""Does a picture show what its prompt says? By the similarity of a text-image model."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkit.evaluation.metrics.base import SampleBatch, SampleMetric, Situation
from diffkit.evaluation.metrics.tools import Toolbox

__all__ = ["ALIGNMENT", "RETRIEVAL"]

_NEEDS = frozenset({"prompts", "scorer"})


def _similarities(batch: SampleBatch, tools: Toolbox) -> tuple[Tensor, Tensor]:
    """Cosines (B, P) of the pictures and all prompts of the run, and the own prompt's column."""
    with torch.no_grad():
        images = tools.scorer.embed_images(batch.images)
    numbers = [tools.prompt_numbers[text] for text in batch.prompts]
    own = torch.tensor(numbers, device=images.device)
    return images @ tools.prompt_embeddings.T, own


def alignment(batch: SampleBatch, tools: Toolbox) -> Tensor:
    """Cosine (B,) in [-1, 1] of each picture and its prompt."""
    cosines, own = _similarities(batch, tools)
    return cosines.gather(1, own[:, None])[:, 0].float().cpu()


def retrieval(batch: SampleBatch, tools: Toolbox) -> Tensor:
    """1 (B,) where no other prompt of the run fits the picture better than its own, else 0."""
    cosines, own = _similarities(batch, tools)
    return (cosines.argmax(1) == own).float().cpu()


def _one_prompt(situation: Situation) -> str | None:
    if len(set(situation.prompts)) < 2:
        return "all pictures have the same prompt; there is nothing to confuse it with"
    return None


ALIGNMENT = SampleMetric(
    "alignment",
    "text-image cosine",
    "higher",
    _NEEDS,
    "How well the picture fits its prompt, as a cosine of two learned vectors.",
    run=alignment,
)
RETRIEVAL = SampleMetric(
    "retrieval",
    "own prompt found (top 1)",
    "higher",
    _NEEDS,
    "Share of pictures whose own prompt fits them better than every other prompt of the run.",
    refuse=_one_prompt,
    run=retrieval,
)
