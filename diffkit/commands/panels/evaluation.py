"""The panel of `diffkit evaluate`: a model beside itself with fewer steps, from the same noises."""

from __future__ import annotations

import dataclasses

import torch
from PIL import Image
from torch import Tensor

from diffkit.commands.panels import Panel, Picture, Stage
from diffkit.evaluation.metrics.base import SampleBatch, SampleMetric
from diffkit.evaluation.metrics.registry import METRICS
from diffkit.evaluation.metrics.tools import Toolbox
from diffkit.generation.engine import render
from diffkit.generation.plan import Request, plan

_FEW = 2
_COUNT = 8
_SHOWN = ("alignment", "high_frequency")


def few_steps(stage: Stage) -> Panel:
    """The pictures of few and of all steps, and the mean of two metrics for both."""
    prompts = stage.prompts[:_COUNT]
    request = Request(prompts=prompts, model=stage.source, seed=stage.seed)
    rows: list[tuple[Picture, ...]] = []
    table: list[tuple[str, str]] = []
    for steps in (_FEW, stage.card.steps):
        recipes = plan(dataclasses.replace(request, steps=steps), stage.model)
        images = torch.stack([2 * x - 1 for x in render(stage.model, recipes, "pt")]).float()
        name = f"{steps} steps"
        rows.append(tuple(Picture(_picture(image), name) for image in images))
        table.append((name, _means(images, prompts)))
    return Panel(
        title="What was lost?",
        text=f"The same noises in {_FEW} steps, above, and in {stage.card.steps}, below. An "
        "evaluation measures such pairs, with intervals, and writes a page of its own.",
        command=f"diffkit evaluate {stage.source} --steps {_FEW} "
        f"--against {stage.source} --against-steps {stage.card.steps}",
        rows=tuple(rows),
        table=tuple(table),
    )


def _picture(image: Tensor) -> Image.Image:
    pixels = ((image.float().cpu() + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _means(images: Tensor, prompts: tuple[str, ...]) -> str:
    tools = Toolbox(prompts=prompts)
    batch = SampleBatch(images.cpu(), prompts)
    found = []
    for name in _SHOWN:
        metric = METRICS[name]
        assert isinstance(metric, SampleMetric)
        found.append(f"{metric.label} {metric.run(batch, tools).mean():.3f}")
    return "; ".join(found)
