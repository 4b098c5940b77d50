"""One clean picture as an editor works on it: its working views, and the edits of its versions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from diffkit.audit.sdedit import Edit, Editor, edit_noise
from diffkit.errors import RunFailed, UserError
from diffkit.evaluation.pictures import to_float, to_uint8
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.views import View, plan_views

__all__ = [
    "Subject",
    "Version",
    "in_pieces",
    "on_white",
    "per_seed",
    "picture_key",
    "sdedit_versions",
    "working_views",
]

Version = Tensor | Sequence[Tensor]
"""A version of a picture, (C, H, W) uint8: one for all seeds, or one a seed."""


def picture_key(pixels: Tensor) -> str:
    """Digest of the pixels (C, H, W) uint8 and their size: names a picture whatever its file."""
    digest = hashlib.blake2b(repr(tuple(pixels.shape)).encode(), digest_size=8)
    digest.update(pixels.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def working_views(model: LatentDiffusion, height: int, width: int) -> list[View]:
    """The whole picture as this model's users and trainers see it: one view, or windows of one.

    The short side becomes the model's own size; a picture that fits already is left as it is.
    """
    plan = plan_views(
        height,
        width,
        model.default_size,
        model.working_multiple,
        square=model.family.square,
        views=1,
    )
    return list(plan.whole)


def on_white(pixels: Tensor, alpha: Tensor | None) -> Tensor:
    """What a model sees of a picture with transparency, uint8 (3, H, W).

    Arguments:
        pixels: uint8 (C, H, W), C 1 or 3, straight colour.
        alpha: uint8 (1, H, W), or None for an opaque picture.
    """
    colour = _rgb(pixels)
    if alpha is None:
        return colour.contiguous()
    share = alpha.float() / 255
    return (colour * share + 255 * (1 - share)).round().to(torch.uint8)


class Subject:
    """A clean picture and how this model sees any version of it.

    Attributes:
        pixels: (3, H, W) uint8.
        key: of `picture_key`; the address of its noises.
        views: of `working_views`.
    """

    def __init__(self, pixels: Tensor, model: LatentDiffusion) -> None:
        """`pixels` (C, H, W) uint8 with one channel or three."""
        self.pixels = _rgb(pixels)
        self.model = model
        self.key = picture_key(self.pixels)
        self.views = working_views(model, *self.pixels.shape[-2:])

    @cached_property
    def clean(self) -> list[Tensor]:
        """The clean picture in each view, (1, 3, h, w) float32 in [-1, 1]."""
        return self.working(self.pixels)

    def working(self, pixels: Tensor) -> list[Tensor]:
        """A version (C, H, W) uint8 in each view; `UserError` where its size is another."""
        if pixels.shape[-2:] != self.pixels.shape[-2:]:
            raise UserError(
                f"a version of {_size(pixels)} pixels cannot be paired with {_size(self.pixels)}."
            )
        image = to_float(_rgb(pixels))[None]
        return [view.apply(image) for view in self.views]

    def noise(self, view: View, images: Tensor, seed: int) -> Tensor:
        """(C, h, w) noise of one seed for a view whose pictures are `images` (1, 3, H, W)."""
        factor, channels = self.model.codec.factor, self.model.codec.channels
        height, width = images.shape[-2:]
        shape = (channels, height // factor, width // factor)
        return edit_noise(shape, f"{self.key} {view.name}", seed)


def sdedit_versions(
    editor: Editor,
    edit: Edit,
    subject: Subject,
    versions: Mapping[str, Version],
    seeds: Sequence[int],
    batch_size: int = 8,
) -> dict[str, list[Tensor]]:
    """Edits of several versions of one picture, all from the same noises.

    Each version goes through the editor by itself, in batches of the same sizes, so that its edits
    do not depend, not even by rounding, on which other versions there are.

    Args:
        versions: name -> (C, H, W) uint8 of the clean picture's size, or one a seed.
        seeds: one edit a seed.
        batch_size: pictures at once.

    Returns:
        name -> one (K, 3, h, w) uint8 a view, K seeds, rounded as a saved edit would be.
    """
    height, width = subject.pixels.shape[-2:]
    found: dict[str, list[Tensor]] = {}
    for name, version in versions.items():
        seen = [subject.working(pixels) for pixels in per_seed(version, seeds)]
        found[name] = []
        for number, view in enumerate(subject.views):
            images = torch.cat([views[number] for views in seen])
            noise = torch.stack([subject.noise(view, images[:1], seed) for seed in seeds])
            sizes = [view.sizes(height, width)] * len(images)

            def make(rows: slice) -> Tensor:
                made = editor(images[rows], noise[rows], edit, sizes[rows])  # noqa: B023
                return to_uint8(made.cpu())

            found[name].append(in_pieces(make, len(images), batch_size))
    return found


def per_seed(version: Version, seeds: Sequence[int]) -> list[Tensor]:
    """One picture a seed: the same one where there is only one."""
    pictures = [version] * len(seeds) if isinstance(version, Tensor) else list(version)
    if len(pictures) != len(seeds):
        raise ValueError(f"{len(pictures)} pictures for {len(seeds)} seeds")
    return pictures


def in_pieces(make: Callable[[slice], Tensor], count: int, batch_size: int) -> Tensor:
    """`make` over rows 0..count, `batch_size` at once; what does not fit in memory is halved.

    Raises `RunFailed` when not even one fits.
    """
    parts: list[Tensor] = []
    done = 0
    while done < count:
        rows = slice(done, min(count, done + batch_size))
        try:
            parts.append(make(rows))
        except torch.OutOfMemoryError as error:
            if rows.stop - rows.start == 1:
                raise RunFailed(
                    "out of memory with one picture; try --dtype bf16. What is finished is kept."
                ) from error
        else:
            done = rows.stop
            continue
        batch_size = max(1, (rows.stop - rows.start) // 2)
        torch.cuda.empty_cache()
    return torch.cat(parts)


def _rgb(pixels: Tensor) -> Tensor:
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(f"uint8 (1 or 3, H, W) is needed, not {pixels.dtype} {pixels.shape}")
    return pixels.expand(3, -1, -1) if pixels.shape[0] == 1 else pixels


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[-1]}x{pixels.shape[-2]}"
