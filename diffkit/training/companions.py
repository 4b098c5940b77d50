"""Companion pictures: a second set, of which each batch has as many pictures as of its own.

They lie in a folder that the user gives, or the base model makes them once, before training:

CACHE/companions-KEY/00000.png ...    each with its recipe; what a killed run left is kept
CACHE/companions-KEY/complete.json    written last

KEY is a digest of what decides the pictures, so that runs that share --cache share them too.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffkit.console import say
from diffkit.errors import UserError
from diffkit.files import write_json
from diffkit.generation.engine import render
from diffkit.generation.plan import Request, open_model, plan
from diffkit.generation.recipe import Recipe
from diffkit.generation.run import Processes, picture_name, run
from diffkit.training.config import TrainConfig
from diffkit.training.devices import DTYPES

__all__ = ["Companions", "companion_folder", "make_companions"]

_DTYPES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
_PIXELS = 1024**2
"""Most pixels that are sampled at once."""
_BATCH = 16
"""Most pictures that are sampled at once."""


@dataclass(frozen=True)
class Companions:
    """What the second set is.

    Attributes:
        caption: of every picture, and the prompt that they are made from.
        folder: where they lie; None to make them.
        count: pictures to be made.
        steps, guidance: of sampling; the model's own without.
    """

    caption: str
    folder: Path | None = None
    count: int = 100
    steps: int | None = None
    guidance: float | None = None


def companion_folder(config: TrainConfig, wanted: Companions, size: int, cache: Path) -> Path:
    """Where the pictures that `config` asks for are made; `size` is their side in pixels."""
    source = config.model
    facts = {
        "model": [os.path.abspath(source) if Path(source).exists() else source],
        "weights": [config.variant, config.revision, config.mixed_precision, config.attention],
        "prompt": wanted.caption,
        "sampling": [wanted.count, wanted.steps, wanted.guidance, size, config.seed],
    }
    key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
    return cache / f"companions-{key}"


def make_companions(
    config: TrainConfig, wanted: Companions, size: int, cache: Path, accelerator: Any
) -> Path:
    """Make the pictures that are missing, each process its share; returns their folder.

    The base model is loaded for it, in the precision of the run, only when some are missing, and
    let go again.

    Raises:
        UserError: the pictures there were made from other weights.
        RunFailed: storage or memory ran out; finished pictures stay.
    """
    folder = companion_folder(config, wanted, size, cache)
    marker, main = folder / "complete.json", accelerator.is_main_process
    names = [folder / picture_name(index) for index in range(wanted.count)]
    if marker.exists() and all(name.exists() for name in names):
        say(f"{folder}: the {wanted.count} class pictures of {wanted.caption!r} are there.")
        accelerator.wait_for_everyone()
        return folder
    say(f"{folder}: making {wanted.count} class pictures of {wanted.caption!r} with {config.model}")
    _sample(config, wanted, size, folder, accelerator)
    gc.collect()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    if main:
        write_json(marker, {"prompt": wanted.caption, "count": wanted.count})
    accelerator.wait_for_everyone()
    return folder


def _sample(
    config: TrainConfig, wanted: Companions, size: int, folder: Path, accelerator: Any
) -> None:
    model = open_model(
        config.model,
        (),
        DTYPES[config.mixed_precision],
        str(accelerator.device),
        config.attention,
        variant=config.variant,
        revision=config.revision,
    )
    request = Request(
        prompts=(wanted.caption,),
        model=config.model,
        num=wanted.count,
        steps=wanted.steps,
        guidance=wanted.guidance,
        size=f"{size}x{size}",
        seed=config.seed,
        dtype=_DTYPES[config.mixed_precision],
        attention=config.attention,
    )
    place = (accelerator.process_index, accelerator.num_processes)
    processes = Processes(*place, accelerator.wait_for_everyone)
    recipes = plan(request, model)
    make = partial(_render, model)
    batch = max(1, min(_BATCH, _PIXELS // size**2))
    try:
        run(recipes, folder, make, batch_size=batch, processes=processes, with_sheet=False)
    except UserError as error:
        raise UserError(
            f"{folder}: holds class pictures of other weights of {config.model}; remove the folder "
            f"to make them anew ({error})"
        ) from error


@torch.no_grad()
def _render(model: Any, recipes: Sequence[Recipe]) -> list[Any]:
    return render(model, recipes)
