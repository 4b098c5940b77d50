"""`diffkit generate`: pictures from prompts, from pictures, or from an earlier picture's recipe."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from diffkit.console import say, set_quiet
from diffkit.errors import UserError

if TYPE_CHECKING:
    from diffkit.generation.plan import Request
    from diffkit.generation.recipe import Recipe
    from diffkit.generation.run import Outcome

__all__ = ["GenerateConfig", "configs", "main"]


@dataclass(frozen=True)
class GenerateConfig:
    """Make pictures: text to image, image to image (--image), inpainting (--image and --mask).

    Picture i uses seed + i for all its noise, so the batch size, an interruption and the number of
    processes do not change it. The same command on the same output goes on where it stopped.
    """

    prompts: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PROMPT ...")
    ] = ()
    """Prompts, each quoted, before the flags. For class-conditional models names or numbers of
    classes; for unconditional ones they may be left out."""

    prompts_file: Annotated[Path | None, tyro.conf.arg(name="prompts")] = None
    """A text file with one prompt a line, instead of prompts on the command line."""

    model: str = "embedded"
    """"embedded", a diffusers folder, a single .safetensors file, or a hub id."""

    variant: str | None = None
    """Which weights of a folder or hub id, such as fp16; default the plain ones, or those that are
    there."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA as PATH or PATH:WEIGHT; repeat the flag for several."""

    negative: str = ""
    """What the pictures should not show (needs a guidance above 1)."""

    num: int = 1
    """Pictures a prompt."""

    batch_size: int = 4
    """Pictures at once in each process; halved where the GPU's memory does not suffice."""

    steps: int | None = None
    """Denoising steps; default the model card's, else 25, for Flux-schnell 4."""

    guidance: float | None = None
    """Guidance scale; default the model card's, else the family's: SD 7.5, SDXL 5, SD3 7, Flux-dev
    3.5, PixArt 4.5, DiT 4, U-Nets with a null class 2; Flux-schnell and all others none."""

    scheduler: str | None = None
    """Sampler: ddim, ddpm, dpm++, dpm++-sde, euler, euler-a, heun, lcm, pndm, unipc; for flow
    models flow-euler, flow-heun, flow-lcm, flow-dpm++, flow-unipc; for EDM models edm-euler,
    edm-dpm++. Default the model's own."""

    size: str | None = None
    """WxH or N pixels; default the model's own size, with --image at the picture's aspect."""

    seed: int = 0
    """Seed of the first picture."""

    image: Path | None = None
    """A picture to start from."""

    strength: float | None = None
    """How much of --image is redone, above 0 up to 1; default 0.8, with --mask 1."""

    mask: Path | None = None
    """White where --image is repainted; the other pixels are kept."""

    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """Repeat this PNG of diffkit generate, pixel for pixel. Beside it only --output, --device,
    --overwrite, --json, and --model, --variant, --revision, --lora, --image, --mask for what has
    moved."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    attention: str = "sdpa"
    """sdpa, xformers, classic, or an attention backend of diffusers (flash, sage, ...)."""

    output: Path = Path("generated")
    """Folder for 00000.png, 00001.png, ... and contact_sheet.png."""

    overwrite: bool = False
    """Make the pictures again, also over those of another recipe."""

    json: bool = False
    """Print what was made as JSON on stdout, and nothing else."""


def configs() -> dict[str, type]:
    """The one config of this command."""
    return {"": GenerateConfig}


def main(config: GenerateConfig) -> int:
    """Make the pictures; returns 0. See `GenerateConfig`."""
    set_quiet(config.json)
    if config.batch_size < 1:
        raise UserError(f"--batch-size {config.batch_size}: must be at least 1.")

    from diffkit.generation.engine import choose_device, choose_dtype, render
    from diffkit.generation.plan import open_model, plan, repeat
    from diffkit.generation.recipe import read_recipe
    from diffkit.generation.run import Processes, run

    old = read_recipe(config.from_) if config.from_ else None
    request = _request(config, old)
    request.check()
    processes = Processes.current(config.device)
    device = choose_device(processes.device or config.device)
    dtype = choose_dtype(request.dtype, device)
    model = open_model(
        request.model,
        request.loras,
        dtype,
        device,
        request.attention,
        variant=config.variant,
        revision=config.revision,
    )
    recipes = [repeat(old, request, model)] if old else plan(request, model)
    outcome = run(
        recipes,
        config.output,
        lambda batch: render(model, batch),
        batch_size=config.batch_size,
        overwrite=config.overwrite,
        processes=processes,
        with_sheet=old is None,  # one repeated picture must not replace a whole run's sheet
        columns=config.num if 1 < config.num <= 8 else None,
    )
    if processes.rank == 0:
        overview = f"; overview: {outcome.sheet}" if outcome.sheet else ""
        say(f"{len(recipes)} pictures in {config.output}{overview}")
        if config.json:
            print(json.dumps(_report(recipes, outcome)))
    return 0


def _request(config: GenerateConfig, old: Recipe | None) -> Request:
    from diffkit.generation.plan import Request, parse_lora

    loras = tuple(parse_lora(text) for text in config.lora)
    if old is not None:
        _check_beside_from(config)
        return Request(
            prompts=(old.prompt,),
            model=old.model if config.model == _DEFAULTS.model else config.model,
            loras=loras or old.loras,
            image=config.image or (Path(old.image) if old.image else None),
            mask=config.mask or (Path(old.mask) if old.mask else None),
            dtype=old.dtype,
            attention=old.attention,
        )
    shared = {field.name for field in dataclasses.fields(Request)} - {"prompts", "loras"}
    values = {name: getattr(config, name) for name in shared}
    return Request(prompts=_prompts(config), loras=loras, **values)


_DEFAULTS = GenerateConfig()
_MOVED = {"model", "variant", "revision", "lora", "image", "mask"}
_BESIDE_FROM = {"from_", "output", "device", "overwrite", "json", *_MOVED}


def _check_beside_from(config: GenerateConfig) -> None:
    for field in dataclasses.fields(config):
        given = getattr(config, field.name) != getattr(_DEFAULTS, field.name)
        if given and field.name not in _BESIDE_FROM:
            name = field.name.replace("_", "-").replace("prompts-file", "prompts")
            raise UserError(f"--{name}: the recipe of --from decides it; leave it out.")


def _prompts(config: GenerateConfig) -> tuple[str, ...]:
    if config.prompts_file is None:
        return config.prompts
    if config.prompts:
        raise UserError("give prompts either on the command line or with --prompts, not both.")
    from diffkit.data.prompts import read_prompts

    return tuple(read_prompts(config.prompts_file))


def _report(recipes: Sequence[Recipe], outcome: Outcome) -> dict[str, Any]:
    pictures = [
        {"file": str(path), "prompt": recipe.prompt, "seed": recipe.seed}
        for path, recipe in zip(outcome.paths, recipes)
    ]
    made = len(recipes) - outcome.kept
    return {
        "pictures": pictures,
        "made": made,
        "kept": outcome.kept,
        "contact_sheet": outcome.sheet and str(outcome.sheet),
    }
