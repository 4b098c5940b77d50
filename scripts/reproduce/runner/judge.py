"""What samples of fixed captions are worth, in the features of two networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.text_image_scorer import TextImageScorer
from diffkit.objectives.collapse import within_prompt_diversity
from runner.distances import caption_distance
from runner.scores import BATCH, SHADED, features_of

__all__ = ["SHADED_MEANING", "Asked", "Distances", "Judge", "scorer_features"]

SHADED_MEANING = (
    "The feature network takes blurred pictures for those of the one shaded style, of which a "
    "quarter of all pictures are; the share of samples that it takes for it tells of that, and "
    "blur adds to the kernel distances in its features too."
)
"""Said once in every report with that column."""


@dataclass(frozen=True)
class Asked:
    """A caption, and the concept or the style that it names."""

    caption: str
    concept: str | None = None
    style: str | None = None


Embedding = Callable[[Tensor], Tensor]
"""Features (n, d) of pictures (n, 3, H, W) in [-1, 1]."""


class Distances:
    """Kernel distances of samples, n of each of P captions, in the features of one network.

    Arguments:
        embedding: the features.
        asked: what each of the P captions asks for.
        real: pictures (m, 3, H, W) that the teacher was trained on.
        taught: pictures (P, k, 3, H, W) that the teacher makes of the captions, from other noises.
        prefix: of the names.
    """

    def __init__(
        self,
        embedding: Embedding,
        asked: Sequence[Asked],
        real: Tensor,
        taught: Tensor,
        prefix: str = "kernel",
    ) -> None:
        self._embedding, self._prefix = embedding, prefix
        self._looks = [row for row, one in enumerate(asked) if one.concept is None]
        self._real = embedding(real)[None]
        self._taught = self._rows(taught)

    def _rows(self, images: Tensor) -> Tensor:
        return self._embedding(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def of(self, images: Tensor) -> dict[str, float]:
        """`caption_distance` of pictures (P, n, 3, H, W) by name.

        `kernel`: to all real pictures. `kernel_taught`: to the teacher's. `kernel_looks`: the same
        of the captions that name a style, one at least.
        """
        drawn, taught, looks = self._rows(images), self._taught, self._looks
        return {
            self._prefix: caption_distance(drawn, self._real),
            f"{self._prefix}_taught": caption_distance(drawn, taught),
            f"{self._prefix}_looks": caption_distance(drawn[looks], taught[looks]),
        }


@torch.no_grad()
def scorer_features(scorer: TextImageScorer, images: Tensor) -> Tensor:
    """Embeddings (n, d) of images (n, 3, H, W) in [-1, 1], scaled to a mean square of 1.

    A kernel distance of a network that was trained on captions, as CMMD is one with CLIP.
    """
    rows = torch.cat([scorer.embed_images(part) for part in images.split(BATCH)])
    return rows * rows.shape[1] ** 0.5


class Judge:
    """Measures samples: n of each of P captions, with the same leading dimensions (P, n).

    Arguments:
        network: features, and the gates' classifier.
        asked: what each of the P captions asks for.
        real, taught: see `Distances`.
    """

    def __init__(
        self, network: FeatureNetwork, asked: Sequence[Asked], real: Tensor, taught: Tensor
    ) -> None:
        self.network, self.asked = network, list(asked)
        self._distances = Distances(partial(features_of, network), asked, real, taught)

    @torch.no_grad()
    def scores(self, latents: Tensor, images: Tensor) -> dict[str, float]:
        """The numbers of latents (P, n, C, h, w) and their decoded pictures (P, n, 3, H, W).

        Those of `Distances`. `concept`, `style`: parts of those samples whose caption names one,
        in which the classifier finds it among all that are asked for. `shaded`: the part of those
        that name no style which it takes for the shaded one. `diversity`: how much latents of one
        caption differ.
        """
        logits = self.network.classify(images.flatten(0, 1))
        by_caption = {kind: x.unflatten(0, images.shape[:2]) for kind, x in logits.items()}
        return {
            **self._distances.of(images),
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
