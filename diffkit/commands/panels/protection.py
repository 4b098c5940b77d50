"""The panel of `diffkit protect`: pictures before and after, and what an edit makes of both."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from diffkit.audit.sdedit import Edit, Editor
from diffkit.audit.subjects import Subject, sdedit_versions
from diffkit.commands.panels import Panel, Picture, Stage
from diffkit.evaluation.pictures import to_uint8
from diffkit.generation.engine import render
from diffkit.generation.plan import Request, plan
from diffkit.perceptual.delta import amplified_difference
from diffkit.perceptual.pixels import psnr
from diffkit.protection.pgd import random_noise
from diffkit.protection.protect import protect
from diffkit.protection.settings import Settings

_COUNT = 3
_SETTINGS = Settings(method="texture", levels=16, steps=30)
_EDIT = Edit(0.3, steps=20)
_AMPLIFIED = 8


def before_and_after(stage: Stage) -> Panel:
    """Some of the model's own pictures, protected against the model itself."""
    request = Request(prompts=stage.prompts[:_COUNT], model=stage.source, seed=stage.seed)
    recipes = plan(request, stage.model)
    clean = to_uint8(torch.stack([2 * x - 1 for x in render(stage.model, recipes, "pt")]).float())
    seeds = list(range(len(clean)))
    found = [result.pixels for result in protect(clean, stage.model, _SETTINGS, seeds=seeds)]
    control = random_noise(clean, _SETTINGS.rule().levels, seeds)
    shares, rows = [], []
    for prompt, before, after, noisy in zip(request.prompts, clean, found, control, strict=True):
        editor = Editor(stage.model, prompt)
        versions = {"clean": before, "protected": after, "random": noisy}
        subject = Subject(before, stage.model)
        edits = sdedit_versions(editor, _EDIT, subject, versions, [stage.seed])
        first = {name: parts[0][0] for name, parts in edits.items()}
        shares.append(_distance(first["protected"], first["clean"]))
        shares.append(_distance(first["random"], first["clean"]))
        rows.append(
            (
                _shown(before, "before"),
                _shown(after, "protected"),
                _shown(
                    amplified_difference(before, after, _AMPLIFIED),
                    f"the difference, {_AMPLIFIED} times",
                ),
                _shown(first["clean"], "an edit of the first"),
                _shown(first["protected"], "the same edit of the second"),
            )
        )
    ratio = sum(shares[0::2]) / max(sum(shares[1::2]), 1e-9)
    change = psnr(clean, torch.stack(found)).mean()
    return Panel(
        title="Protection against imitation",
        text="A change of at most 16 of 255 levels pulls this model's encoding of a picture to a "
        "pattern, and edits of the picture with it. It works against this model and can be removed "
        "in part; `diffkit audit` measures both. Computed against the small model that comes with "
        "diffkit it protects no real picture.",
        command="diffkit protect pictures --output protected --strength high "
        f"--model {stage.source}",
        rows=tuple(rows),
        table=(
            ("change of the picture", f"PSNR {change:.1f} dB"),
            ("change of the edit", f"{ratio:.1f} times that of random noise of the same size"),
        ),
    )


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).square().mean().sqrt())


def _shown(pixels: Tensor, caption: str) -> Picture:
    return Picture(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), caption)
