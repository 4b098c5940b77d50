"""A diffusers pipeline that protects pictures: `diffkit.protection` for those who write Python.

    pipeline = MimicryProtectionPipeline.from_pretrained("owner/name")
    result = pipeline(image, method="sdst-", strength="medium")
    result.images[0].save("protected.png")      # JPEG would weaken it

Or from one in memory, with `MimicryProtectionPipeline.from_pipe(pipeline)`. What to expect of it,
and what not: `diffkit.protection.notice`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.families import families
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.in_memory import OUTPUTS, listed, mask_plane, picture_planes
from diffkit.protection.inputs import image_seed
from diffkit.protection.joint import protect_set
from diffkit.protection.protect import ProtectionResult, protect
from diffkit.protection.rounds import work_of
from diffkit.protection.settings import STRENGTHS, Settings

__all__ = ["MimicryProtectionOutput", "MimicryProtectionPipeline"]


@dataclass
class MimicryProtectionOutput(BaseOutput):  # type: ignore[misc]
    """What a call gives.

    Attributes:
        images: as `output_type` says, in the order given.
        stats: of each picture: steps, first and last score, largest and mean change in levels.
    """

    images: list[Any]
    stats: list[dict[str, Any]]


class MimicryProtectionPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Protects pictures against imitation by the model whose components it is given.

    Any model of a family that diffkit knows, by the names its own pipeline has for the components.
    The networks come out of a call as they went in.
    """

    _optional_components = [
        *("unet", "transformer", "image_encoder", "feature_extractor"),
        *(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")),
    ]

    def __init__(
        self,
        vae: Any,
        scheduler: Any,
        unet: Any = None,
        transformer: Any = None,
        text_encoder: Any = None,
        text_encoder_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer: Any = None,
        tokenizer_2: Any = None,
        tokenizer_3: Any = None,
        image_encoder: Any = None,
        feature_extractor: Any = None,
    ) -> None:
        super().__init__()
        parts = {name: part for name, part in locals().items() if name not in ("self", "__class__")}
        self.register_modules(**parts)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **more: Any) -> MimicryProtectionPipeline:
        """One that shares a pipeline's components, in their own dtypes; `more` replaces some."""
        known = cls._get_signature_types()
        parts = {**pipeline.components, **more}
        return cls(**{name: part for name, part in parts.items() if name in known})

    def __call__(
        self,
        image: Any,
        method: str = "texture",
        strength: str | int | None = None,
        steps: int | None = None,
        prompt: str | None = None,
        mask: Any = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **options: Any,
    ) -> MimicryProtectionOutput | tuple[list[Any], list[dict[str, Any]]]:
        """Protect one picture or several, each at its own size.

        Args:
            image: a PIL picture, an array (H, W, C) or (B, H, W, C), a tensor (C, H, W) or
                (B, C, H, W), or a list of these; uint8, or floats in [0, 1]; C 1 or 3. A PIL
                picture may have an alpha channel, which stays as it is.
            method: a name of `diffkit.protection.methods.METHODS`. Those that train a surrogate
                protect all pictures of the call together.
            strength: "low" (4), "medium" (8), "high" (16) or levels of 255.
            steps, prompt: default the method's.
            mask: one picture, white where pixels may change, for all; or a list of them.
            seed: of all draws, together with each picture's pixels.
            generator: where given, the seed is drawn from it.
            output_type: "pil", "np" (float arrays (H, W, C) in [0, 1]), "pt" (float tensors
                (C, H, W) in [0, 1]) or "uint8" (tensors).
            return_dict: False gives a tuple.
            options: further fields of `diffkit.protection.settings.Settings`.

        Raises:
            UserError: options that the method or the model cannot use.
            RunFailed: gradients were not finite.
        """
        if output_type not in OUTPUTS:
            raise UserError(f"output_type {output_type!r}: unknown. Known: {', '.join(OUTPUTS)}.")
        if generator is not None:
            draw = torch.randint(2**62, (), generator=generator, device=generator.device)
            seed = int(draw)
        levels = STRENGTHS.get(strength, strength) if isinstance(strength, str) else strength
        if isinstance(levels, str):
            raise UserError(f"strength {strength!r}: give {', '.join(STRENGTHS)}, or whole levels.")
        chosen = {"levels": levels, "steps": steps, "prompt": prompt, "seed": seed}
        settings = Settings(method, **chosen, **options)
        pictures = [picture_planes(one) for one in listed(image)]
        masks = [None if one is None else mask_plane(one) for one in listed(mask)] or [None]
        if len(masks) not in (1, len(pictures)):
            raise UserError(f"mask: {len(masks)} for {len(pictures)} pictures; give one, or each.")
        masks = masks * (len(pictures) // len(masks))
        results = self._protected(pictures, masks, settings)
        shown = OUTPUTS[output_type]
        images = [
            shown(result.pixels, alpha)
            for result, (_, alpha) in zip(results, pictures, strict=True)
        ]
        stats = [result.stats for result in results]
        return MimicryProtectionOutput(images, stats) if return_dict else (images, stats)

    def _protected(
        self,
        pictures: Sequence[tuple[Tensor, Tensor | None]],
        masks: Sequence[Tensor | None],
        settings: Settings,
    ) -> list[ProtectionResult]:
        model = LatentDiffusion(self._stock())
        seeds = [image_seed(settings.seed, pixels.numpy().tobytes()) for pixels, _ in pictures]
        steps = max(1, settings.rule().steps) * len(pictures)
        if settings.row.joint is not None:
            steps = work_of(settings, len(pictures))
        with self.progress_bar(total=steps) as bar:
            if settings.row.joint is not None:
                pixels, alphas = zip(*pictures, strict=True)
                many: dict[str, Any] = {"alphas": alphas, "masks": masks, "each": bar.update}
                return protect_set(pixels, model, settings, seeds=seeds, **many)
            results = []
            for (pixels, alpha), mask, seed in zip(pictures, masks, seeds, strict=True):
                one: dict[str, Any] = {
                    "alpha": None if alpha is None else alpha[None],
                    "mask": None if mask is None else mask[None],
                    "each": lambda step: bar.update(),
                }
                results += protect(pixels[None], model, settings, seeds=[seed], **one)
            return results

    def _stock(self) -> DiffusionPipeline:
        """The stock pipeline of these components, sharing them."""
        given = {name: part for name, part in self.components.items() if part is not None}
        for family in families():
            if family.codec != "vae" or family.denoiser not in given:
                continue
            cls = family.loader("")
            types = cls._get_signature_types()
            fits = type(given[family.denoiser]) in types[family.denoiser]
            if fits and given.keys() <= types.keys():
                blank = dict.fromkeys(set(cls._get_signature_keys(cls)[0]) - given.keys())
                more = {"requires_safety_checker": False} if "safety_checker" in blank else {}
                return cls(**given, **blank, **more)
        raise UserError(f"no model that diffkit knows has the components {', '.join(given)}.")
