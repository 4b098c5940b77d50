"""`diffkit protect --report` and `--preview`: the effect on edits, and a picture of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from diffkit.audit.distances import Ruler
from diffkit.audit.edits import DEFAULT_PROMPT, Measurer, SdeditThreat
from diffkit.audit.measures import CLEAN, CONTROL, PROTECTED, effect_summary, retention_summary
from diffkit.audit.purifiers.base import Models
from diffkit.audit.purifiers.latent import through_views
from diffkit.audit.purifiers.plain import to_pillow
from diffkit.audit.purifiers.registry import parse_purifiers
from diffkit.audit.request import purifier_list
from diffkit.audit.sdedit import Edit, Editor, noise_seeds
from diffkit.audit.subjects import Subject, on_white
from diffkit.errors import UserError
from diffkit.files import atomic_write
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.perceptual.delta import amplified_difference
from diffkit.protection.job import Request
from diffkit.protection.record import Extra, Finished
from diffkit.protection.views import View

__all__ = ["SEEDS", "STRENGTH", "effect_of", "preview_of"]

STRENGTH = 0.3
SEEDS = 8
"""Noises a picture."""

_GAP = 4  # white pixels between two panels


def effect_of(model: LatentDiffusion, request: Request, purify: str | None) -> Extra:
    """What SDEdit of strength 0.3 makes of each finished picture, beside random noise.

    The networks that measure and the prompt are loaded once for all pictures.

    Arguments:
        model: the attacked one, which edits.
        request: gives the prompt and the backbone of LPIPS.
        purify: a list as `diffkit audit --purify` takes it, or None.

    Returns:
        An `Extra` that gives "effect" and, with `purify`, "purification": by distance the effect
        of the protection and of random noise with 95 % intervals over 8 seeds, and what purifiers
        leave of it.

    Raises:
        UserError: a model that SDEdit cannot run, an unknown purifier, or one whose model cannot be
            had.
    """
    _check(model, "report")
    seeds = noise_seeds(request.settings.seed, SEEDS)
    prompt = _prompt(model, request)
    models = Models(model, prompt=prompt, device=model.device, dtype=model.dtype)
    asked = None if purify is None else purifier_list(purify)
    purifiers = [] if asked is None else parse_purifiers(asked, models)
    for purifier in purifiers:
        purifier.prepare()
    threat = SdeditThreat(Edit(STRENGTH))
    measure = Measurer(model, Ruler(model, lpips=request.lpips))

    def extra(done: Finished) -> Mapping[str, Any]:
        subject = Subject(_seen(done, done.picture.pixels), model)
        versions = {
            CLEAN: subject.pixels,
            PROTECTED: _seen(done, done.encoded.pixels),
            CONTROL: _seen(done, done.control),
        }
        plain = measure(threat, subject, versions, seeds, prompt).values()
        entries: dict[str, Any] = {
            "threat": f"SDEdit, {threat.setting}",
            "prompt": prompt,
            "seeds": SEEDS,
            "numbers": {name: effect_summary(values) for name, values in plain.items()},
            "not_measured": dict(measure.ruler.skipped),
        }
        if not purifiers:
            return {"effect": {"sdedit": entries}}
        left: dict[str, Any] = {}
        for purifier in purifiers:
            behind = measure.purified(threat, subject, versions, seeds, prompt, purifier).values()
            left[purifier.name] = {
                name: retention_summary(behind[name], plain[name])
                for name in plain
                if not plain[name].information
            }
        return {"effect": {"sdedit": entries}, "purification": left}

    return extra


def preview_of(model: LatentDiffusion, request: Request) -> Extra:
    """Writes OUTPUT/previews/NAME.png of each finished picture; puts nothing on record.

    From left to right: before, after, the difference (128 + 8 delta), and an edit of both, SDEdit
    of strength 0.3 from the same noise. All panels have the picture's own size.

    Raises `UserError` for a model that SDEdit cannot run.
    """
    _check(model, "preview")
    seed = noise_seeds(request.settings.seed, 1)[0]
    editor = Editor(model, _prompt(model, request))

    def extra(done: Finished) -> Mapping[str, Any]:
        subject = Subject(_seen(done, done.picture.pixels), model)
        after = _seen(done, done.encoded.pixels)
        panels = [subject.pixels, after, amplified_difference(subject.pixels, after)]
        panels += [_edited(editor, subject, pixels, seed) for pixels in (subject.pixels, after)]
        path = _preview_path(done.item.output, request.output)
        with atomic_write(path) as file:
            _side_by_side(panels).save(file, "PNG")
        return {}

    return extra


def _seen(done: Finished, pixels: Tensor) -> Tensor:
    return on_white(pixels.cpu(), done.picture.alpha)


def _prompt(model: LatentDiffusion, request: Request) -> str:
    """What the edits are asked for: the attack's own prompt; of a model of classes its null."""
    own = request.settings.prompt_for(model)
    return own if own or model.conditioner.classes is not None else DEFAULT_PROMPT


def _check(model: LatentDiffusion, flag: str) -> None:
    if reason := SdeditThreat(Edit(STRENGTH)).refusal(model):
        raise UserError(
            f"--{flag}: edits by SDEdit, which this model cannot: {reason.partition(';')[0]}. "
            f"Leave --{flag} out, and measure the results with diffkit audit --threats inpaint "
            "--mask MASK."
        )


def _edited(editor: Editor, subject: Subject, pixels: Tensor, seed: int) -> Tensor:
    """The edit of a version at the picture's own size, uint8 (3, H, W)."""
    height, width = pixels.shape[-2:]

    def make(images: Tensor, view: View) -> Tensor:
        noise = subject.noise(view, images, seed)[None]
        return editor(images, noise, Edit(STRENGTH), [view.sizes(height, width)])

    return through_views(pixels, subject.views, make)


def _preview_path(output: Path, folder: Path) -> Path:
    relative = output.relative_to(folder)
    name = relative.name if relative.suffix.lower() == ".png" else f"{relative.name}.png"
    return folder / "previews" / relative.with_name(name)


def _side_by_side(panels: list[Tensor]) -> Image.Image:
    _, height, width = panels[0].shape
    strip = Image.new("RGB", (len(panels) * (width + _GAP) - _GAP, height), "white")
    for i, panel in enumerate(panels):
        strip.paste(to_pillow(panel), (i * (width + _GAP), 0))
    return strip
