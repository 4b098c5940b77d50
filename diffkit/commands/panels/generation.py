"""Panels of `diffkit generate`: a grid, the guidance scale, pictures from a picture."""

from __future__ import annotations

import dataclasses
import math

from PIL import Image, ImageDraw

from diffkit.commands.panels import Panel, Picture, Stage
from diffkit.generation.engine import render
from diffkit.generation.plan import Request, plan
from diffkit.generation.recipe import Recipe

_BATCH = 8
_COLUMNS = 8
_LARGEST = 16


def grid(stage: Stage) -> Panel:
    """One picture of each example prompt."""
    recipes = plan(_request(stage, stage.prompts[:_LARGEST]), stage.model)
    pictures = _pictures(stage, recipes)
    return Panel(
        title="Text to image",
        text="Each picture was made just now from the words below it.",
        command=f'diffkit generate "{stage.prompts[0]}"{_model_flag(stage)}',
        rows=tuple(tuple(pictures[i : i + _COLUMNS]) for i in range(0, len(pictures), _COLUMNS)),
    )


def guidance(stage: Stage) -> Panel:
    """One prompt at rising guidance scales, the noise held fixed."""
    usual = stage.card.guidance(stage.model.family.guidance_scale)
    scales = (1.0, *(round(usual * factor, 1) for factor in (0.5, 1.0, 2.0)))
    request = _request(stage, stage.prompts[:1])
    row = []
    for scale in scales:
        recipe = plan(dataclasses.replace(request, guidance=scale), stage.model)[0]
        row.append(Picture(render(stage.model, [recipe])[0], f"guidance {scale:g}"))
    return Panel(
        title="Guidance",
        text=f'"{stage.prompts[0]}" from the same noise at rising guidance scales: 1 is the model '
        f"without guidance, {usual:g} is this model's usual value.",
        command=f'diffkit generate "{stage.prompts[0]}" --guidance {usual:g}{_model_flag(stage)}',
        rows=(tuple(row),),
    )


def from_a_picture(stage: Stage) -> Panel:
    """Image to image at two strengths, and inpainting of one half."""
    first = plan(_request(stage, stage.prompts[:1]), stage.model)
    start = render(stage.model, first)[0]
    image, mask = stage.scratch / "start.png", stage.scratch / "mask.png"
    start.save(image)
    half = Image.new("L", start.size)
    ImageDraw.Draw(half).rectangle((0, 0, start.width // 2 - 1, start.height), fill=255)
    half.save(mask)
    prompt = stage.prompts[1]
    request = dataclasses.replace(_request(stage, (prompt,)), image=image)
    row = [Picture(start, "the start: " + stage.prompts[0])]
    for strength in (0.5, 0.8):
        recipe = plan(dataclasses.replace(request, strength=strength), stage.model)[0]
        made = render(stage.model, [recipe])[0]
        row.append(Picture(made, f"{prompt}; strength {strength:g}"))
    recipe = plan(dataclasses.replace(request, mask=mask), stage.model)[0]
    row.append(Picture(half.convert("RGB"), "the mask: white is repainted"))
    row.append(Picture(render(stage.model, [recipe])[0], f"{prompt}; inpainted"))
    return Panel(
        title="From a picture",
        text="Another prompt, starting from a picture: more strength keeps less of it. With a mask "
        "only the white part is repainted.",
        command=f'diffkit generate "{prompt}" --image start.png --strength 0.8'
        + _model_flag(stage),
        rows=(tuple(row),),
    )


def _request(stage: Stage, prompts: tuple[str, ...]) -> Request:
    return Request(prompts=prompts, model=stage.source, seed=stage.seed)


def _model_flag(stage: Stage) -> str:
    return "" if stage.source == Request.model else f" --model {stage.source}"


def _pictures(stage: Stage, recipes: list[Recipe]) -> list[Picture]:
    found = []
    for number in range(math.ceil(len(recipes) / _BATCH)):
        batch = recipes[number * _BATCH : (number + 1) * _BATCH]
        images = render(stage.model, batch)
        found += [Picture(image, recipe.prompt) for image, recipe in zip(images, batch)]
    return found
