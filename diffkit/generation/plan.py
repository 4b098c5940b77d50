"""From what a person asks for to one recipe a picture, every default filled in."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffkit import __version__
from diffkit.console import warn
from diffkit.errors import UserError
from diffkit.files import read_json, sha256
from diffkit.generation.card import read_card
from diffkit.generation.engine import check_strength, size_rule, takes_guidance, weights_digest
from diffkit.generation.inpaint import takes_masks
from diffkit.generation.pictures import Size, area_size, parse_size, read_mask, read_picture
from diffkit.generation.recipe import Recipe, differing_keys
from diffkit.generation.schedulers import swap_scheduler
from diffkit.models.classes import hub_file
from diffkit.models.families import family_of
from diffkit.models.loading import EMBEDDED, is_hub_id, read_index, resolve

if TYPE_CHECKING:
    from diffkit.models.classes import Classes
    from diffkit.models.families import Family
    from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["Request", "open_model", "parse_lora", "plan", "repeat"]


@dataclass(frozen=True)
class Request:
    """A run of pictures as asked for; None is a default that depends on the model.

    The fields are those of `diffkit generate`; `loras` are (path or hub id, weight).
    """

    prompts: tuple[str, ...] = ()
    model: str = EMBEDDED
    loras: tuple[tuple[str, float], ...] = ()
    negative: str = ""
    num: int = 1
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    size: str | None = None
    seed: int = 0
    image: Path | None = None
    strength: float | None = None
    mask: Path | None = None
    dtype: str = "fp32"
    attention: str = "sdpa"

    def check(self) -> None:
        """Refuse what is wrong whatever the model is, with `UserError`."""
        if not self.prompts and not _may_lack_prompts(self.model):
            raise UserError('no prompts: give them in quotes, or --prompts FILE; "" is allowed.')
        for name in ("num", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: must be at least 1.")
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise UserError(f"--guidance {self.guidance:g}: must be a number, and not negative.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: must be from 0 to 2^63 - 1.")
        if self.size is not None:
            parse_size(self.size)
        for name in ("mask", "strength"):
            if self.image is None and getattr(self, name) is not None:
                raise UserError(f"--{name}: needs --image, the picture to start from.")
        if self.image is not None:
            read_picture(self.image)
        if self.mask is not None:
            read_mask(self.mask)


def parse_lora(text: str) -> tuple[str, float]:
    """`PATH` or `PATH:WEIGHT` -> (path, weight); a path that exists as a whole has weight 1."""
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise UserError(f"--lora {text}: {weight!r} is no weight; give PATH:0.8.") from None


def open_model(
    source: str,
    loras: Sequence[tuple[str, float]],
    dtype: torch.dtype,
    device: str,
    attention: str = "sdpa",
    *,
    variant: str | None = None,
    revision: str | None = None,
) -> LatentDiffusion:
    """Load a model for inference and put weighted LoRAs on it. Raises what `load` raises."""
    from diffkit.models.latent_diffusion import LatentDiffusion

    model = LatentDiffusion.load(
        source,
        dtype=dtype,
        device=device,
        variant=variant,
        revision=revision,
        attention=attention,
    )
    for number, (path, weight) in enumerate(loras):
        from diffkit.models.lora import load_lora

        load_lora(model, path, weight=weight, name=f"lora{number}")
    return model


def plan(request: Request, model: LatentDiffusion) -> list[Recipe]:
    """One recipe for each picture: prompt p's picture k has index p num + k and seed + index.

    Raises:
        UserError: the request does not fit this model; see the message.
    """
    request.check()
    card = read_card(request.model, model.revision)
    steps = request.steps or card.step_count(model.family.steps)
    guidance = request.guidance
    if guidance is None:
        guidance = card.guidance(model.family.guidance_scale)
    asked = request.prompts
    if model.conditioner.classes is not None:
        _check_labels(request, model.family, guidance)
        asked = asked or _no_prompt(model.conditioner.classes)
        model.conditioner.classes.numbers(asked)
    if request.negative and guidance <= 1:
        raise UserError("--negative: does nothing at a guidance of 1 or below; raise --guidance.")
    if request.negative and takes_guidance(model):
        raise UserError(
            f"--negative: does nothing with {request.model}, whose network is told the guidance "
            "and never sees a negative prompt; leave it out."
        )
    if takes_masks(model) and request.mask is None:
        raise UserError(f"{request.model}: this model only inpaints; give --image and --mask.")
    size = _size(request, model)
    strength = None
    if request.image is not None:
        strength = request.strength
        if strength is None:
            strength = 0.8 if request.mask is None else 1.0
        check_strength(strength, steps)
    _check_scheduler(request, model)
    _warn_of_long_prompts((*request.prompts, request.negative), model)
    first = Recipe(
        version=__version__,
        model=_absolute(request.model),
        weights=weights_digest(model),
        loras=tuple((_absolute(path), weight) for path, weight in request.loras),
        prompt="",
        negative=request.negative,
        steps=steps,
        guidance=guidance,
        scheduler=request.scheduler,
        width=size.width,
        height=size.height,
        index=0,
        seed=request.seed,
        image=_place(request.image),
        image_sha256=_digest(request.image),
        strength=strength,
        mask=_place(request.mask),
        mask_sha256=_digest(request.mask),
        dtype=request.dtype,
        attention=request.attention,
    )
    prompts = [prompt for prompt in asked for _ in range(request.num)]
    return [
        dataclasses.replace(first, prompt=prompt, index=i, seed=request.seed + i)
        for i, prompt in enumerate(prompts)
    ]


def _may_lack_prompts(source: str) -> bool:
    """True for a folder or hub id without text: only the loaded model knows its classes."""
    if is_hub_id(source):
        index = hub_file(source, "model_index.json", None)
        return index is not None and not _reads_text(read_json(index))
    folder = Path(resolve(source)).expanduser()
    return (folder / "model_index.json").is_file() and not _reads_text(read_index(folder))


def _reads_text(index: Mapping[str, Any]) -> bool:
    return bool(family_of(index["_class_name"]).text_components)


def _no_prompt(classes: Classes) -> tuple[str, ...]:
    if classes.count == 0:
        return ("",)
    some = ", ".join(classes.name(number) for number in range(min(3, classes.count)))
    raise UserError(
        f"no prompts: give names or numbers of classes; this model has {classes.count}: {some}, ..."
    )


def _check_labels(request: Request, family: Family, guidance: float) -> None:
    """Raise `UserError` for what only models conditioned on text can do."""
    if request.negative:
        raise UserError(f"--negative: {family.name} models read no text; leave it out.")
    if request.image is not None:
        family.pipeline_class("image2image")
    if guidance > 1 and "cfg" not in family.capabilities:
        raise UserError(
            f"--guidance {guidance:g}: {family.name} models without a null class have no "
            "unconditional output to be guided away from; leave it out."
        )


def _size(request: Request, model: LatentDiffusion) -> Size:
    rule = size_rule(model)
    if request.size is not None:
        size = parse_size(request.size)
    elif request.image is not None:
        picture = Size(*read_picture(request.image).size)
        size = area_size(picture, rule.native.width * rule.native.height, rule.multiple)
    else:
        size = rule.native
    rule.check(size)
    model.check_size(size.height, size.width)
    return size


def _check_scheduler(request: Request, model: LatentDiffusion) -> None:
    if request.scheduler is not None:
        schedule, own = model.schedule, model.pipeline().scheduler
        from_noise = request.image is None
        swap_scheduler(
            own,
            request.scheduler,
            schedule.kind,
            schedule.prediction_type,
            from_noise=from_noise,
            spacing=model.family.flow_spacing,
        )


def _warn_of_long_prompts(prompts: Sequence[str], model: LatentDiffusion) -> None:
    # Stock pipelines cut a prompt at what each tokenizer's encoder reads, or at their own limit.
    for name, tokenizer in model.pipeline().components.items():
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        limit = model.family.prompt_limits.get(name, tokenizer.model_max_length)
        for prompt in dict.fromkeys(prompts):
            length = len(tokenizer(prompt, verbose=False).input_ids)
            if length > limit:
                warn(f"{name} reads {limit} of the {length} tokens of {prompt!r}; the rest is cut")


def _place(path: Path | None) -> str | None:
    return None if path is None else os.path.abspath(path)


def _digest(path: Path | None) -> str | None:
    return None if path is None else sha256(path)


def _absolute(name: str) -> str:
    return os.path.abspath(name) if Path(name).exists() else name


def repeat(old: Recipe, request: Request, model: LatentDiffusion) -> Recipe:
    """The recipe of an earlier picture, with what moved since in its new place.

    Args:
        old: out of the picture.
        request: only its `image` and `mask` are read, the places of the input files now.
        model: loaded from the recipe's model and LoRAs, or from where they are now.

    Raises:
        UserError: the weights or an input file are not those that the picture was made from.
    """
    again = dataclasses.replace(
        old,
        image=_place(request.image),
        mask=_place(request.mask),
        image_sha256=_digest(request.image),
        mask_sha256=_digest(request.mask),
        weights=weights_digest(model),
    )
    changed = [line.split(" ")[0] for line in differing_keys(old, again)]
    if changed:
        names = {
            "weights": "the model's weights",
            "image_sha256": str(request.image),
            "mask_sha256": str(request.mask),
        }
        raise UserError(
            f"the picture cannot be repeated: {' and '.join(names[key] for key in changed)} "
            "changed since it was made."
        )
    return again
