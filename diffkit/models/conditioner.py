"""What a denoiser is told: prompts or labels as tensors that can be cached, mixed and dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.fingerprint import describe_config, fingerprint_module

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffkit.models.classes import Classes
    from diffkit.models.families import Family

__all__ = ["Conditioner", "Conditioning", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Micro-conditioning of one picture (Podell et al. 2023): pixels, (height, width) each."""

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


@dataclass(frozen=True)
class Conditioning:
    """Tensors that condition a denoiser; every one has the batch as its first dimension.

    Attributes:
        tokens: (B, L, D) text states for cross or joint attention, or None.
        pooled: (B, P) pooled text embedding, or None (SDXL, SD3).
        time_ids: (B, 6) original size, crop and target size in pixels, or None (SDXL).
        mask: (B, L) attention mask of `tokens`, or None.
        labels: (B,) class labels, int64, or None (DiT, U-Nets without text); zeros for an
            unconditional network, which is not told them.
    """

    tokens: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    mask: Tensor | None = None
    labels: Tensor | None = None

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors that are present, by name: what a cache stores."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    @classmethod
    def from_dict(cls, tensors: dict[str, Tensor]) -> Conditioning:
        """The inverse of `to_dict`."""
        return cls(**tensors)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        return replace(self, **{k: function(v) for k, v in self.to_dict().items()})

    def __len__(self) -> int:
        return next(iter(self.to_dict().values())).shape[0]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Conditioning:
        """Move all tensors; `dtype` applies to the floating ones."""
        return self._map(
            lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None)
        )

    def select(self, rows: Tensor | slice) -> Conditioning:
        """Some rows of the batch."""
        return self._map(lambda x: x[rows])

    def expand(self, n: int) -> Conditioning:
        """A batch of one, repeated n times without copying."""
        return self._map(lambda x: x.expand(n, *x.shape[1:]))

    def chunk(self, parts: int) -> list[Conditioning]:
        """Equal parts of the batch, in order."""
        size = len(self) // parts
        return [self.select(slice(i * size, (i + 1) * size)) for i in range(parts)]

    @staticmethod
    def cat(items: Sequence[Conditioning]) -> Conditioning:
        """One batch after the other; all must hold the same tensors."""
        rows = [item.to_dict() for item in items]
        if any(row.keys() != rows[0].keys() for row in rows):
            raise ValueError("conditionings of different kinds cannot be joined")
        return Conditioning(**{k: torch.cat([row[k] for row in rows]) for k in rows[0]})

    def drop(self, mask: Tensor, null: Conditioning) -> Conditioning:
        """Rows where `mask` (B,) is true are replaced by `null` (a batch of 1 or B).

        `time_ids` say where the picture comes from, not what it shows, and are never dropped.
        """

        def pick(name: str, value: Tensor) -> Tensor:
            other = getattr(null, name)
            if name == "time_ids" or other is None:
                return value
            keep = mask.to(value.device).reshape(-1, *(1,) * (value.ndim - 1))
            return torch.where(keep, other.to(value), value)

        return replace(self, **{k: pick(k, v) for k, v in self.to_dict().items()})


class Conditioner:
    """Prompts -> `Conditioning`, through the text encoders of a stock diffusers pipeline.

    Only the family's text components of `pipeline` are used; the others may be None. `free` drops
    the encoders from memory once everything is cached. For a model without text `classes` says
    which labels there are, and a prompt is the name or the number of a class.
    """

    def __init__(
        self, family: Family, pipeline: DiffusionPipeline, classes: Classes | None = None
    ) -> None:
        self.family = family
        self.pipeline = pipeline
        self.classes = classes

    @property
    def components(self) -> dict[str, Any]:
        """Tokenizers and encoders by component name; a missing or freed one is None."""
        return {name: getattr(self.pipeline, name) for name in self.family.text_components}

    @property
    def encoders(self) -> dict[str, nn.Module]:
        """The text encoders that are in memory, by component name."""
        return {k: v for k, v in self.components.items() if isinstance(v, nn.Module)}

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], sizes: Sequence[Sizes] | tuple[int, int] | None = None
    ) -> Conditioning:
        """Conditioning of B prompts.

        Args:
            prompts: one text a picture.
            sizes: one `Sizes` a prompt, or one (height, width) in pixels for all. Needed by models
                with micro-conditioning, unused by the others.

        Raises:
            UserError: the encoders were freed, `sizes` is missing where it is needed, or there is
                no such class.
        """
        if self.classes is not None:
            return self.encode_labels(torch.tensor(self.classes.numbers(prompts)), len(prompts))
        self._need_encoders()
        assert self.family.encode_prompts is not None
        cond = self.family.encode_prompts(self.pipeline, list(prompts))
        return self.with_sizes(cond, sizes)

    def encode_labels(self, labels: Tensor | None, n: int) -> Conditioning:
        """Conditioning of n class numbers (n,), on the denoiser's device.

        An unconditional model reads none. Raises `UserError` for a model conditioned on text, and
        for missing labels.
        """
        if self.classes is None:
            self.family.require("labels")
        elif self.classes.count == 0:
            labels = torch.zeros(n, dtype=torch.int64)
        elif labels is None:
            raise UserError(f"{self.family.name} models need a class label for every picture.")
        assert labels is not None
        network: Any = getattr(self.pipeline, self.family.denoiser)
        return Conditioning(labels=labels.to(network.device))

    @torch.no_grad()
    def null(
        self, n: int = 1, sizes: Sequence[Sizes] | tuple[int, int] | None = None
    ) -> Conditioning:
        """The unconditional input, as the stock pipeline makes it without a negative prompt.

        Of a class-conditional model it is the null class; `UserError` where there is none.
        """
        if self.classes is not None:
            if self.classes.null is None:
                raise UserError(
                    f"{self.family.name}: this model has no null class to be guided away from, so "
                    "its guidance scale is 1. A null class is an embedding row of its own, named "
                    "by null_class in diffkit.json."
                )
            return self.encode_labels(torch.full((n,), self.classes.null), n)
        self._need_encoders()
        assert self.family.encode_null is not None
        return self.with_sizes(self.family.encode_null(self.pipeline).expand(n), sizes)

    @property
    def example(self) -> str:
        """A prompt that the model understands, for counting and trying out."""
        if self.classes is None:
            return "a"
        return "0" if self.classes.count else ""

    def _need_encoders(self) -> None:
        if not self.encoders:
            raise UserError("the text encoders were freed; load the model again to encode prompts.")

    def with_sizes(
        self, cond: Conditioning, sizes: Sequence[Sizes] | tuple[int, int] | None
    ) -> Conditioning:
        """Add the micro-conditioning `time_ids`; unchanged for a model that has none."""
        if not self.family.micro_conditioning:
            return cond
        if sizes is None:
            raise UserError(f"{self.family.name} needs picture sizes: give sizes=(height, width).")
        if isinstance(sizes, tuple) and isinstance(sizes[0], int):
            sizes = [Sizes(sizes, (0, 0), sizes)] * len(cond)
        rows = [[*s.original, *s.crop, *s.target] for s in cast(Sequence[Sizes], sizes)]
        device = next(iter(cond.to_dict().values())).device
        return replace(cond, time_ids=torch.tensor(rows, dtype=torch.float32, device=device))

    def free(self) -> None:
        """Drop the encoders from memory; `LatentDiffusion.save` reads them again."""
        for name in self.encoders:
            setattr(self.pipeline, name, None)

    def fingerprint(self) -> str:
        """Hexadecimal key of the encoders' weights and configs, of the tokenizers, and of how the
        family cuts and cleans prompts.

        Raises `UserError` where there are none: freed, or a model without text.
        """
        if self.classes is not None:
            raise UserError(
                f"{self.family.name} models have no text encoder, so there are no embeddings to "
                "cache; leave cache_embeddings out."
            )
        self._need_encoders()
        digest = hashlib.blake2b(digest_size=16)
        for name, part in sorted(self.components.items()):
            if isinstance(part, nn.Module):
                config: Any = part.config
                described = f"{name}:{describe_config(config.to_dict())}"
                digest.update(fingerprint_module(part, extra=described).encode())
            elif part is not None:
                words = sorted(part.get_vocab().items())
                limit = self.family.prompt_limits.get(name, part.model_max_length)
                digest.update(f"{name}:{limit}:{words}".encode())
        digest.update(self.family.prompt_rules().encode())
        return digest.hexdigest()
