"""Which pictures an evaluation asks of a model: the same prompts and seeds of every model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffkit.data.folder import ImageFolder
from diffkit.data.prompts import read_prompts
from diffkit.errors import UserError
from diffkit.evaluation.request import (
    DEFAULT_NUM,
    DEFAULT_PER_PROMPT,
    EvaluationRequest,
    Side,
)
from diffkit.generation.card import read_card
from diffkit.generation.plan import Request
from diffkit.generation.plan import plan as plan_pictures
from diffkit.generation.recipe import Recipe
from diffkit.models.skeleton import skeleton
from diffkit.randomness import permutation

if TYPE_CHECKING:
    from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["PromptPlan", "choose_prompts", "pick", "recipes"]


@dataclass(frozen=True)
class PromptPlan:
    """What is drawn: picture i belongs to prompt i // per_prompt and uses seed + i.

    Attributes:
        prompts: in their order; none when no model draws.
        per_prompt: pictures of each; the last prompt may have fewer.
        num: pictures in all.
        source: where the prompts come from, for the report.
    """

    prompts: tuple[str, ...]
    per_prompt: int
    num: int
    source: str


def choose_prompts(request: EvaluationRequest) -> PromptPlan:
    """The prompts of a request; loads no model.

    Raises:
        UserError: a model draws, but there are no prompts, or fewer than `per_prompt` allows.
    """
    num = request.num or DEFAULT_NUM
    if not request.generated:
        return PromptPlan((), DEFAULT_PER_PROMPT, num, "")
    known, source = _known_prompts(request)
    per_prompt = request.per_prompt or DEFAULT_PER_PROMPT
    wanted = math.ceil(num / per_prompt)
    if len(known) < wanted:
        if request.per_prompt is not None:
            raise UserError(
                f"--per-prompt {per_prompt}: {len(known)} prompts ({source}) give "
                f"{per_prompt * len(known)} pictures, not {num}; give more prompts, lower --num, "
                "or leave --per-prompt out."
            )
        wanted = len(known)
    if request.per_prompt is None:
        per_prompt = math.ceil(num / wanted)
    return PromptPlan(pick(known, wanted, request.seed), per_prompt, num, source)


def pick(prompts: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """`count` of the prompts, drawn without replacement by `seed`, in their own order."""
    chosen = permutation(len(prompts), seed, "evaluation prompts")[:count].sort().values
    return tuple(prompts[i] for i in chosen.tolist())


def _known_prompts(request: EvaluationRequest) -> tuple[list[str], str]:
    """All prompts that there are, each once, and where they come from."""
    if request.prompts is not None:
        return _distinct(read_prompts(request.prompts)), str(request.prompts)
    for side in request.generated:
        classes = _class_prompts(side.source)
        if classes:
            return classes, f"classes of {side.source}"
    if request.data is not None and request.data.is_dir():
        records = ImageFolder(request.data).records
        captions = [record.captions[0] for record in records if record.captions]
        if captions:
            return _distinct(captions), f"captions of {request.data}"
    for side in request.generated:
        examples = read_card(side.source).example_prompts
        if examples:
            return _distinct(examples), f"card of {side.source}"
    raise UserError(
        f"no prompts: {request.generated[0].source} has no card with examples; give --prompts "
        "FILE, or --data with a folder of captioned pictures."
    )


def _class_prompts(source: str) -> list[str]:
    """What a model without text is asked for: each class, or "" where it is unconditional."""
    if Path(source).is_file():  # a single file is that of a text model
        return []
    classes = skeleton(source).conditioner.classes
    if classes is None:
        return []
    return [classes.prompt(number) for number in range(classes.count)] or [""]


def _distinct(prompts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(prompts))


def recipes(
    side: Side, request: EvaluationRequest, prompts: PromptPlan, model: LatentDiffusion
) -> list[Recipe]:
    """One recipe a picture of this side. Raises `UserError` for what does not fit the model."""
    wanted = Request(
        prompts=prompts.prompts,
        model=side.source,
        loras=side.loras,
        num=prompts.per_prompt,
        steps=side.steps,
        guidance=side.guidance,
        scheduler=side.scheduler,
        size=request.size,
        seed=request.seed,
        dtype=request.dtype,
    )
    try:
        return plan_pictures(wanted, model)[: prompts.num]
    except UserError as error:
        if side.name == "model" or not str(error).startswith("--"):
            raise
        raise UserError(f"for {side.source} (--against): {error}") from error


def output_of(side: Side, output: Path) -> Path:
    """The folder with this side's pictures."""
    if side.kind == "pictures":
        return Path(side.source).expanduser()
    return output / side.name
