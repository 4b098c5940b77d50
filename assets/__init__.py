"""The embedded model, its helper networks, data sample and pictures: `diffkit.assets`."""

from __future__ import annotations

from pathlib import Path

from diffkit.errors import UserError

NAMES = ("features", "latent_lpips", "model", "pictures", "sample", "scorer")


def path(name: str) -> Path:
    """The folder of an embedded asset.

    `model` is a text-to-image pipeline in diffusers format, `features` an image feature network,
    `latent_lpips` a perceptual distance of the model's latents, `scorer` a text-image scorer,
    `sample` a held-out data sample, `pictures` free pictures.

    Raises `UserError` for another name, and when this copy of diffkit lacks the folder.
    """
    if name not in NAMES:
        raise UserError(f"no asset named {name!r}; there are {', '.join(NAMES)}.")
    folder = Path(__file__).parent / name
    if not folder.is_dir():
        raise UserError(f"this copy of diffkit lacks the asset {name!r}: {folder} does not exist.")
    return folder
