"""A diffusers pipeline that protects pictures: `diffkit.protection` for those who write Python.

    pipeline = MimicryProtectionPipeline.from_pretrained("owner/name")
    result = pipeline(image, method="sdst-", strength="medium")
    result.images[0].save("protected.png")      # JPEG would weaken it

Or from one in memory, with `MimicryProtectionPipeline.from_pipe(pipeline)`. What to expect of it,
and what not: `diffkit.protection.notice`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.families import families
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.in_memory import OUTPUTS, listed, mask_plane, on_white, picture_planes
from diffkit.protection.inputs import image_seed
from diffkit.protection.joint import protect_set
from diffkit.protection.memory import Effort, with_fallback, with_less
from diffkit.protection.protect import ProtectionResult, prepared, protect
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
        clean: Any = None,
        class_images: Any = None,
        ensemble: Sequence[DiffusionPipeline] = (),
        batch_size: int = 1,
        low_vram: bool = False,
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
            clean: pictures of the same subject, unprotected, for fsmg and aspl; default `image`.
            class_images: pictures of what `class_prompt` says, where that has a weight.
            ensemble: pipelines of further models whose autoencoders are attacked too.
            batch_size: pictures of one size at once; lowered where memory runs out.
            low_vram: spare memory from the start; done anyway where it runs out.
            options: further fields of `diffkit.protection.settings.Settings`.

        Raises:
            UserError: options that the method or the model cannot use.
            RunFailed: gradients were not finite, or one picture does not fit the memory.
        """
        if output_type not in OUTPUTS:
            raise UserError(f"output_type {output_type!r}: unknown. Known: {', '.join(OUTPUTS)}.")
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: must be at least 1.")
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
        rows = list(zip(pictures, masks, strict=True))
        if not settings.row.encoder_only:
            _refuse(settings, ensemble=ensemble)
        work = _Work(LatentDiffusion(self._stock()), settings, Effort(batch_size, low_vram))
        if settings.row.joint is None:
            _refuse(settings, clean=clean, class_images=class_images)
            results = work.each(rows, [LatentDiffusion(one) for one in ensemble], self.progress_bar)
        else:
            company = {"clean": _opaque(clean), "class_images": _opaque(class_images)}
            results = work.together(rows, company, self.progress_bar)
        shown = OUTPUTS[output_type]
        images = [
            shown(result.pixels, alpha)
            for result, (_, alpha) in zip(results, pictures, strict=True)
        ]
        stats = [result.stats for result in results]
        return MimicryProtectionOutput(images, stats) if return_dict else (images, stats)

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


Picture = tuple[tuple[Tensor, Tensor | None], Tensor | None]
"""((pixels, alpha), mask) of one picture."""


@dataclass
class _Work:
    """Pictures that one model protects, with less memory where it runs out."""

    model: LatentDiffusion
    settings: Settings
    effort: Effort

    def seeds(self, rows: Sequence[Picture]) -> list[int]:
        """By each picture's bytes."""
        return [image_seed(self.settings.seed, x.numpy().tobytes()) for (x, _), _ in rows]

    def each(
        self, rows: Sequence[Picture], ensemble: Sequence[LatentDiffusion], bars: Callable[..., Any]
    ) -> list[ProtectionResult]:
        """Neighbours of one size together."""
        results: list[ProtectionResult] = []
        steps = max(1, self.settings.rule().steps) * len(rows)
        self.settings.check()
        with (
            prepared(self.model, self.settings, ensemble) as surrogates,
            bars(total=steps) as bar,
        ):

            def attack(batch: Sequence[Picture], lean: bool) -> list[ProtectionResult]:
                return protect(
                    torch.stack([pixels for (pixels, _), _ in batch]),
                    self.model,
                    self.settings,
                    seeds=self.seeds(batch),
                    alpha=_stacked([alpha for (_, alpha), _ in batch]),
                    mask=_stacked([mask for _, mask in batch]),
                    lean=lean,
                    surrogates=surrogates,
                    each=lambda step: bar.update(len(batch)),
                )

            for _, alike in groupby(rows, _kind):
                results += with_fallback(list(alike), self.effort, attack, "image")
        return results

    def together(
        self, rows: Sequence[Picture], company: dict[str, Any], bars: Callable[..., Any]
    ) -> list[ProtectionResult]:
        """All as one set; begun again with less where memory runs out."""
        with bars(total=work_of(self.settings, len(rows))) as bar:

            def attack() -> list[ProtectionResult]:
                return protect_set(
                    [pixels for (pixels, _), _ in rows],
                    self.model,
                    self.settings,
                    seeds=self.seeds(rows),
                    alphas=[alpha for (_, alpha), _ in rows],
                    masks=[mask for _, mask in rows],
                    lean=self.effort.lean,
                    batch_size=self.effort.batch_size,
                    each=bar.update,
                    **company,
                )

            return with_less(self.effort, attack, "image", len(rows))


def _kind(row: Picture) -> tuple[Any, ...]:
    (pixels, alpha), mask = row
    return pixels.shape, alpha is None, mask is None


def _stacked(rows: Sequence[Tensor | None]) -> Tensor | None:
    found = [row for row in rows if row is not None]
    return torch.stack(found) if found else None


def _opaque(images: Any) -> list[Tensor] | None:
    return None if images is None else [on_white(*picture_planes(one)) for one in listed(images)]


def _refuse(settings: Settings, **given: Any) -> None:
    for name, value in given.items():
        if value is not None and len(listed(value)) > 0:
            raise UserError(f"{name}: does nothing for the method {settings.method}; leave it out.")
