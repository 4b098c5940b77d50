"""A run of pictures into a folder: resumable, shared out over processes, with a contact sheet."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from diffkit.console import progress, say
from diffkit.errors import UserError
from diffkit.files import atomic_write, check_writable
from diffkit.generation.contact_sheet import contact_sheet
from diffkit.generation.engine import in_batches
from diffkit.generation.recipe import Recipe, differing_keys, read_recipe, write_png

__all__ = ["SHEET_NAME", "Outcome", "Processes", "pending", "picture_name", "run"]

SHEET_NAME = "contact_sheet.png"
_SHEET_LIMIT = 400


@dataclass(frozen=True)
class Processes:
    """This process among those of `accelerate launch`; alone when it was started plainly.

    `device` is the one that the launcher gave to this process, None when it is alone.
    """

    rank: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None
    device: str | None = None

    @classmethod
    def current(cls, device: str) -> Processes:
        """Join the others when the environment names them (`WORLD_SIZE`)."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        # Shares may be uneven by hours: one process may have all of the only folder.
        state: Any = PartialState(cpu=device == "cpu", timeout=timedelta(days=7))
        mine = str(state.device) if device == "auto" else device
        return cls(state.process_index, state.num_processes, state.wait_for_everyone, mine)


@dataclass(frozen=True)
class Outcome:
    """What a run left.

    Attributes:
        paths: the pictures, in the order of the recipes.
        kept: how many of them were there already.
        sheet: the contact sheet; None where none was asked for or another process wrote it.
    """

    paths: tuple[Path, ...]
    kept: int
    sheet: Path | None


def picture_name(index: int) -> str:
    """`00000.png`, `00001.png`, ..."""
    return f"{index:05d}.png"


def pending(recipes: Sequence[Recipe], output: Path, overwrite: bool) -> list[Recipe]:
    """The recipes whose pictures are not in `output` yet, or are torn there.

    Raises:
        UserError: a picture of another recipe, or of another origin, is in the place of one of
            these, and `overwrite` is false; the message names the differing keys.
    """
    if overwrite:
        return list(recipes)
    missing = []
    for recipe in recipes:
        path = output / picture_name(recipe.index)
        if not path.exists() or not _is_whole(path):
            missing.append(recipe)
            continue
        differing = differing_keys(read_recipe(path), recipe)
        if differing:
            raise UserError(
                f"{path}: was made with another {', '.join(differing)}. "
                "Choose another --output or add --overwrite."
            )
    return missing


def _is_whole(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def run(
    recipes: Sequence[Recipe],
    output: Path,
    make: Callable[[Sequence[Recipe]], Sequence[Image.Image]],
    *,
    batch_size: int,
    overwrite: bool = False,
    processes: Processes | None = None,
    with_sheet: bool = True,
    columns: int | None = None,
) -> Outcome:
    """Make every picture that is missing in `output`, each written as soon as it is done.

    Args:
        recipes: in the order of their indices.
        make: one batch of recipes -> its pictures.
        batch_size: pictures at once in each process.
        processes: this process among several; default alone.
        with_sheet, columns: whether a contact sheet is written, and its pictures a row.

    Raises:
        UserError: see `pending`; or `output` cannot be written.
        RunFailed: storage or memory ran out; finished pictures stay.
    """
    me = processes or Processes()
    check_writable(output)
    todo = pending(recipes, output, overwrite)
    mine = [recipe for position, recipe in enumerate(todo) if position % me.count == me.rank]
    kept = len(recipes) - len(todo)
    if kept and me.rank == 0:
        say(f"{kept} of {len(recipes)} pictures are in {output} already")
    # All must have looked at the folder before one of them changes it.
    me.wait()
    for recipe, image in progress(in_batches(mine, batch_size, make), "pictures", len(mine)):
        write_png(output / picture_name(recipe.index), image, recipe)
    me.wait()
    paths = tuple(output / picture_name(recipe.index) for recipe in recipes)
    if not with_sheet or me.rank != 0:
        return Outcome(paths, kept, None)
    return Outcome(paths, kept, _write_sheet(recipes, paths, output, columns))


def _write_sheet(
    recipes: Sequence[Recipe], paths: Sequence[Path], output: Path, columns: int | None
) -> Path:
    if len(paths) > _SHEET_LIMIT:
        say(f"the contact sheet shows the first {_SHEET_LIMIT} of {len(paths)} pictures")
    pictures = []
    for path in paths[:_SHEET_LIMIT]:
        with Image.open(path) as image:
            pictures.append(image.convert("RGB"))
    prompts = [recipe.prompt for recipe in recipes[:_SHEET_LIMIT]]
    buffer = io.BytesIO()
    contact_sheet(pictures, prompts, columns).save(buffer, "PNG")
    target = output / SHEET_NAME
    with atomic_write(target) as file:
        file.write(buffer.getvalue())
    return target
