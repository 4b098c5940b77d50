"""Purification by a latent model: through its autoencoder and back, and SDEdit at low strength.

The whole picture is taken at the model's own size (long ones in windows, whose results are averaged
where they overlap) and brought back to its size, bicubic. Without resizing nothing is resampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from diffkit import randomness
from diffkit.audit.purifiers.base import Amount, Kind, Models, Work
from diffkit.audit.sdedit import Edit, Editor
from diffkit.audit.subjects import working_views
from diffkit.errors import UserError
from diffkit.evaluation.pictures import to_float, to_uint8
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.views import View

__all__ = ["LATENT", "SDEDIT_STEPS", "resized", "through_views"]

SDEDIT_STEPS = 100
"""Steps of the whole grid, of which SDEdit runs the share that its strength says."""


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, H, W) at another (height, width), bicubic with antialias; `x` itself where it fits."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x.float(), tuple(size), mode="bicubic", antialias=True)


def through_views(
    pixels: Tensor, views: Sequence[View], make: Callable[[Tensor, View], Tensor]
) -> Tensor:
    """`make` on each view of a picture, put back in place.

    Arguments:
        pixels: uint8 (3, H, W).
        views: that cover the picture; where they overlap the results are averaged.
        make: (images (1, 3, h, w) in [-1, 1], view) -> images of the same shape.

    Returns:
        uint8 (3, H, W).
    """
    image = to_float(pixels)[None]
    total, count = torch.zeros_like(image), torch.zeros_like(image[:, :1])
    for view in views:
        made = make(view.apply(image), view).float().to(image.device)
        rows = slice(view.top, view.top + view.height)
        place = (..., rows, slice(view.left, view.left + view.width))
        total[place] += resized(made, (view.height, view.width))
        count[place] += 1
    return to_uint8(total / count)[0]


def _autoencoder(amount: float, models: Models, source: str | None) -> Work:
    """decode(encode(x)), with the posterior mean."""
    model = models.of(source)
    codec = model.codec
    if codec.vae is None:
        raise UserError(
            f"--purify vae: {model.family.name} models work on pixels and have no autoencoder; "
            "write vae:MODEL with a latent model."
        )

    def make(images: Tensor, view: View) -> Tensor:
        return codec.decode(codec.encode(images.to(codec.device)))

    def work(pixels: Tensor, seed: int) -> Tensor:
        return through_views(pixels, working_views(model, *pixels.shape[-2:]), make)

    return work


def _sdedit(strength: float, models: Models, source: str | None) -> Work:
    """Noised to `strength`, then denoised without guidance: DDIM, or Euler on a flow."""
    model = models.of(source)
    if model.denoiser.geometry.channels != model.codec.channels:
        raise UserError(
            "--purify sdedit: this model's denoiser takes a mask or a further picture beside the "
            "latents, as inpainting models do; leave it out, or write sdedit:MODEL with another."
        )
    editor = Editor(model, _prompt(model, models, source))
    edit = Edit(strength, SDEDIT_STEPS)

    def work(pixels: Tensor, seed: int) -> Tensor:
        height, width = pixels.shape[-2:]

        def make(images: Tensor, view: View) -> Tensor:
            shape = (1, *model.latent_shape(*images.shape[-2:]))
            noise = randomness.normal(shape, seed, "purify", "sdedit", view.name)
            return editor(images, noise, edit, [view.sizes(height, width)])

        return through_views(pixels, working_views(model, height, width), make)

    return work


def _prompt(model: LatentDiffusion, models: Models, source: str | None) -> str:
    """A model of classes that is not the audited one cannot know its prompt: it is told none."""
    unrelated = source is not None and model.conditioner.classes is not None
    return "" if unrelated else models.prompt


LATENT = (
    Kind(
        "vae",
        "through the model's autoencoder and back",
        _autoencoder,
        model="audited",
    ),
    Kind(
        "sdedit",
        "SDEdit of strength {amount}, no guidance",
        _sdedit,
        Amount("strength", 0.2, 0.01, 1),
        random=True,
        model="audited",
        more={"steps": SDEDIT_STEPS},
    ),
)
