"""What samples of fixed captions are worth, by the feature network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffkit.models.feature_network import FeatureNetwork
from diffkit.objectives.collapse import within_prompt_diversity
from runner.distances import caption_distance
from runner.scores import SHADED, features_of

__all__ = ["SHADED_MEANING", "Asked", "Judge"]

SHADED_MEANING = (
    "The feature network takes means of pictures for those of the one shaded style, of which a "
    "quarter of all pictures are: of the latents of one concept in all four styles halfway to "
    "their mean, half. So the share of samples that it takes for it tells how much they are such "
    "means, and both kernel distances grow with it."
)
"""Said once in every report with that column."""


@dataclass(frozen=True)
class Asked:
    """A caption, and the concept or the style that it names."""

    caption: str
    concept: str | None = None
    style: str | None = None


class Judge:
    """Measures samples: n of each of P captions, with the same leading dimensions (P, n).

    Arguments:
        network: features, and the gates' classifier.
        asked: what each of the P captions asks for.
        real: pictures (m, 3, H, W) that the teacher was trained on.
        taught: pictures (P, k, 3, H, W) that the teacher makes of the captions, from other noises.
    """

    def __init__(
        self, network: FeatureNetwork, asked: Sequence[Asked], real: Tensor, taught: Tensor
    ) -> None:
        self.network, self.asked = network, list(asked)
        self._real = features_of(network, real)[None]
        self._taught = self._features(taught)
        self._looks = [row for row, one in enumerate(self.asked) if one.concept is None]

    def _features(self, images: Tensor) -> Tensor:
        rows = features_of(self.network, images.flatten(0, 1))
        return rows.unflatten(0, images.shape[:2])

    @torch.no_grad()
    def scores(self, latents: Tensor, images: Tensor) -> dict[str, float]:
        """The numbers of latents (P, n, C, h, w) and their decoded pictures (P, n, 3, H, W).

        `kernel`, `kernel_taught`: `caption_distance` of the features to those of all real pictures
        and to those of the teacher's; `kernel_looks`: the latter of the captions that name a style,
        one at least. `concept`, `style`: parts of those samples whose caption names one, in which
        the classifier finds it among all that are asked for. `shaded`: the part of those that name
        no style which it takes for the shaded one. `diversity`: how much latents of one caption
        differ.
        """
        drawn = self._features(images)
        logits = self.network.classify(images.flatten(0, 1))
        by_caption = {kind: x.unflatten(0, images.shape[:2]) for kind, x in logits.items()}
        return {
            "kernel": caption_distance(drawn, self._real),
            "kernel_taught": caption_distance(drawn, self._taught),
            "kernel_looks": caption_distance(drawn[self._looks], self._taught[self._looks]),
            "concept": self._told("concept", by_caption["concept"]),
            "style": self._told("style", by_caption["style"]),
            "shaded": self._shaded(by_caption["style"]),
            "diversity": float(within_prompt_diversity(latents)),
        }

    def _told(self, kind: str, logits: Tensor) -> float:
        named = [getattr(one, kind) for one in self.asked]
        rows = [row for row, name in enumerate(named) if name is not None]
        classes = sorted({name for name in named if name is not None})
        columns = self.network.concept_indices if kind == "concept" else self.network.style_indices
        wanted = torch.tensor([classes.index(named[row]) for row in rows], device=logits.device)
        found = logits[rows][..., columns(classes).to(logits.device)].argmax(-1)
        return float((found == wanted[:, None]).float().mean())

    def _shaded(self, logits: Tensor) -> float:
        free = [row for row, one in enumerate(self.asked) if one.style is None]
        shaded = self.network.style_indices([SHADED]).to(logits.device)
        return float((logits[free].argmax(-1) == shaded).float().mean())
