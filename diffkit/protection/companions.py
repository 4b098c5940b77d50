"""Pictures that a surrogate learns from beside the protected ones: clean pictures, class pictures.

Class pictures that nobody gives are made by the attacked model itself, once, into
OUTPUT/.class-pictures-KEY, where a run that was killed finds them again. KEY is a digest of what
decides them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkit.console import say, warn
from diffkit.errors import UserError
from diffkit.files import sha256
from diffkit.generation.engine import render
from diffkit.generation.plan import Request, plan
from diffkit.generation.recipe import Recipe
from diffkit.generation.run import Processes, run
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.image_file import Unreadable, open_picture
from diffkit.protection.in_memory import on_white
from diffkit.protection.inputs import find_pictures
from diffkit.protection.rounds import prior_weight
from diffkit.protection.settings import Settings
from diffkit.protection.sidecar import parameter_digest

__all__ = ["CLASS_COUNT", "class_pictures", "folder_digest", "make_class_pictures", "read_folder"]

CLASS_COUNT = 200
"""Class pictures that are made (ACE, Anti-DreamBooth)."""

_PIXELS = 1024**2
"""Most pixels that are sampled at once."""


def folder_digest(folder: Path, output: Path) -> str:
    """Digest of the bytes of a folder's pictures, whatever their names."""
    found, _ = find_pictures([folder], output)
    return parameter_digest({"pictures": sorted(sha256(item.path) for item in found)})


def read_folder(folder: Path, output: Path, flag: str) -> list[Tensor]:
    """The pictures of a folder, uint8 (3, H, W) each, on white where they are transparent.

    Files that are no pictures are named and left out. Raises `UserError` where none is left.
    """
    found, skipped = find_pictures([folder], output)
    bad = {str(item.path): item.reason for item in skipped}
    pictures = []
    for item in found:
        try:
            picture = open_picture(item.path)
        except Unreadable as error:
            bad[str(item.path)] = error.reason
            continue
        pictures.append(on_white(picture.pixels, picture.alpha))
    for path, reason in bad.items():
        warn(f"{flag}: {path}: {reason}; left out.")
    if not pictures:
        raise UserError(f"{flag} {folder}: has no picture in it.")
    return pictures


def class_pictures(
    settings: Settings,
    model: LatentDiffusion,
    given: Path | None,
    output: Path,
    processes: Processes,
) -> list[Tensor] | None:
    """Pictures of the class prompt as `protect_set` takes them; None where they have no weight.

    Arguments:
        settings: of a method that trains a surrogate.
        model: makes them where `given` is None.
        given: folder of the user's.
        output: of the job.
        processes: all of them must call this; each makes its share.
    """
    if settings.row.joint is None or settings.class_prompt is None:
        return None
    if prior_weight(settings, model.device.type == "cpu") == 0:
        warn(
            "--class-prompt: class pictures are not used on a CPU, where they would double the "
            "training; --prior-weight 1 uses them all the same."
        )
        return None
    if given is None:
        given = make_class_pictures(settings, model, output, processes)
    return read_folder(given, output, "--class-images")


def make_class_pictures(
    settings: Settings, model: LatentDiffusion, output: Path, processes: Processes
) -> Path:
    """The folder of class pictures, after the missing ones were made by the model's usual sampler.

    Raises:
        RunFailed: storage or memory ran out; finished pictures stay.
    """
    assert settings.class_prompt is not None
    count = settings.class_count or CLASS_COUNT
    request = Request(
        prompts=(settings.class_prompt,), model=model.source, num=count, seed=settings.seed
    )
    recipes = plan(request, model)
    first = recipes[0]
    facts = [first.weights, first.prompt, first.steps, first.guidance, first.seed, count]
    folder = output / f".class-pictures-{parameter_digest({'facts': facts})[:16]}"
    say(f"class pictures: {count} of {settings.class_prompt!r}")
    batch = max(1, _PIXELS // (first.width * first.height))
    make = partial(_render, model)
    run(recipes, folder, make, batch_size=batch, processes=processes, with_sheet=False)
    return folder


@torch.no_grad()
def _render(model: LatentDiffusion, recipes: Sequence[Recipe]) -> list[Any]:
    return render(model, recipes)
