"""Distances and scores of edited pictures, each measured on the 8-bit picture.

A `Seen` batch keeps what networks say of it, so one edit that is compared with ten others goes
through each network once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from diffkit.errors import UserError
from diffkit.evaluation.extractors import Extractor, load_extractor
from diffkit.evaluation.metrics import pixels as pixel_metrics
from diffkit.evaluation.metrics.base import SampleBatch
from diffkit.evaluation.metrics.tools import Toolbox
from diffkit.evaluation.pictures import to_float, to_uint8
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.named_weights import optional_module
from diffkit.perceptual.pixels import ms_ssim, why_no_ms_ssim

__all__ = ["DISTANCES", "Distance", "Ruler", "Seen"]


class Seen:
    """A batch of 8-bit pictures of one size and, once asked for, what networks say of them.

    Attributes:
        pixels: (B, 3, H, W) uint8.
    """

    def __init__(self, pixels: Tensor, ruler: Ruler) -> None:
        self.pixels = pixels
        self.ruler = ruler

    def __len__(self) -> int:
        return len(self.pixels)

    @cached_property
    def images(self) -> Tensor:
        """(B, 3, H, W) float32 in [-1, 1] on the ruler's device."""
        return to_float(self.pixels.to(self.ruler.tools.device))

    @cached_property
    def latents(self) -> Tensor:
        """(B, C, h, w) the encoder's mean, scaled and shifted as the denoiser sees it."""
        codec = self.ruler.model.codec
        with torch.no_grad():
            return codec.encode(self.images.to(codec.device)).float()

    @cached_property
    def features(self) -> Tensor:
        """(B, d) unit vectors of the extractor, on the CPU."""
        return F.normalize(self.ruler.extractor(self.images), dim=1)

    @cached_property
    def embeddings(self) -> Tensor:
        """(B, d) unit vectors of the text-image scorer, on the CPU."""
        with torch.no_grad():
            found = self.ruler.tools.scorer.embed_images(self.images)
        return F.normalize(found.float(), dim=1).cpu()


def _pixels(name: str) -> Callable[[Seen, Seen], Tensor]:
    def run(a: Seen, b: Seen) -> Tensor:
        found: Tensor = getattr(pixel_metrics, name)(
            SampleBatch(a.images, other=b.images), a.ruler.tools
        )
        return found

    return run


def _one_minus_ssim(a: Seen, b: Seen) -> Tensor:
    return 1 - _pixels("ssim")(a, b)


def _one_minus_ms_ssim(a: Seen, b: Seen) -> Tensor:
    return 1 - ms_ssim(a.images, b.images).cpu()


def _latent_l2(a: Seen, b: Seen) -> Tensor:
    return (a.latents - b.latents).square().mean((1, 2, 3)).sqrt().cpu()


def _one_minus_cosine(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2 / 2 of unit vectors, which is exactly 0 for equal ones; 1 - a.b need not be."""
    return (a - b).square().sum(1) / 2


def _feature_distance(a: Seen, b: Seen) -> Tensor:
    return _one_minus_cosine(a.features, b.features)


def _image_distance(a: Seen, b: Seen) -> Tensor:
    return _one_minus_cosine(a.embeddings, b.embeddings)


@dataclass(frozen=True)
class Distance:
    """One number of two pictures of equal size.

    Attributes:
        name: in reports and files.
        label: as a person reads it.
        about: what it says, one sentence.
        run: two batches of B -> (B,) float32 on the CPU.
        information: True for a number that grows as pictures get closer (PSNR): it is shown, and
            takes part in no ratio.
    """

    name: str
    label: str
    about: str
    run: Callable[[Seen, Seen], Tensor]
    information: bool = False


_ROWS = (
    Distance(
        "lpips",
        "LPIPS",
        "How different two pictures look to a network trained on human judgements; 0 is equal.",
        _pixels("lpips"),
    ),
    Distance(
        "ssim",
        "1 − SSIM",
        "How much local structure differs; 0 is equal.",
        _one_minus_ssim,
    ),
    Distance(
        "ms_ssim",
        "1 − MS-SSIM",
        "How much structure differs at five scales; 0 is equal.",
        _one_minus_ms_ssim,
    ),
    Distance(
        "latent_l2",
        "latent distance",
        "Root mean square difference of the two pictures' latents in this model; 0 is equal.",
        _latent_l2,
    ),
    Distance(
        "feature_distance",
        "feature distance",
        "1 minus the cosine of the two pictures' feature vectors; 0 is the same direction.",
        _feature_distance,
    ),
    Distance(
        "image_distance",
        "1 − image cosine",
        "1 minus the cosine of the two pictures' vectors in a space of texts and pictures; 0 is "
        "the same direction.",
        _image_distance,
    ),
    Distance(
        "psnr",
        "PSNR, dB",
        "Pixel-by-pixel nearness, at most 100 dB; for information, more is closer.",
        _pixels("psnr"),
        information=True,
    ),
)
DISTANCES: dict[str, Distance] = {row.name: row for row in _ROWS}


class Ruler:
    """The distances that can be computed here, and why others cannot.

    A network whose weights are missing is left out by name; nothing takes its place.

    Attributes:
        tools: the evaluation harness' networks.
        skipped: name -> reason of what is left out.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        *,
        lpips: str = "alex",
        extractor: str = "embedded",
        scorer: str = "embedded",
        device: str | torch.device | None = None,
    ) -> None:
        """`model` gives the latents; `device` is the model's own by default.

        Raises `UserError` for an unknown extractor or scorer; a missing LPIPS is skipped.
        """
        self.model = model
        self.tools = Toolbox(device or model.device, scorer=scorer, lpips=lpips)
        self.extractor: Extractor = load_extractor(extractor, self.tools.device)
        self.skipped: dict[str, str] = {}
        for name, load in (("lpips", lambda: self.tools.lpips), ("ssim", _torchmetrics)):
            try:
                load()
            except UserError as error:
                self.skipped[name] = str(error)
        if "ssim" in self.skipped:
            self.skipped["ms_ssim"] = self.skipped["ssim"]

    def see(self, pixels: Tensor) -> Seen:
        """Pictures (B, 3, H, W) uint8, ready to be compared."""
        return Seen(pixels, self)

    def see_images(self, images: Tensor) -> Seen:
        """Pictures (B, 3, H, W) float in [-1, 1], rounded to 8 bits first, as files hold them."""
        return Seen(to_uint8(images.cpu()), self)

    def label(self, name: str) -> str:
        """A distance's label with the network that measures it."""
        known = {
            "lpips": lambda: self.tools.label("lpips"),
            "feature_distance": lambda: self.extractor.label,
            "image_distance": lambda: self.tools.scorer.label,
        }
        base = DISTANCES[name].label
        return f"{base} ({known[name]()})" if name in known else base

    def names(self, height: int, width: int) -> list[str]:
        """The distances that pictures of this size have; small ones have no MS-SSIM."""
        gone = set(self.skipped)
        if why_no_ms_ssim(height, width):
            gone.add("ms_ssim")
        return [name for name in DISTANCES if name not in gone]

    def distances(self, a: Seen, b: Seen) -> dict[str, Tensor]:
        """Every distance (B,) float32 of two batches of B pictures."""
        with torch.no_grad():
            return {
                name: DISTANCES[name].run(a, b).float() for name in self.names(*a.pixels.shape[-2:])
            }

    def alignment(self, seen: Seen, prompt: str) -> Tensor:
        """Cosine (B,) of picture and prompt by the text-image scorer: does the edit succeed?"""
        with torch.no_grad():
            text = F.normalize(self.tools.scorer.embed_texts([prompt]).float(), dim=1)
        return (seen.embeddings @ text.cpu().T).reshape(-1)

    @cached_property
    def key(self) -> str:
        """A digest of all networks that measure: values of another key are not comparable."""
        kept = ["scorer", *({"lpips"} - self.skipped.keys())]
        parts = [self.extractor.key, *(self.tools.key(need) for need in kept)]
        return hashlib.blake2b("\n".join([*parts, *DISTANCES]).encode(), digest_size=8).hexdigest()


def _torchmetrics() -> None:
    optional_module("torchmetrics.functional.image", "evaluate", "SSIM and PSNR")
