"""Small pictures for tests of the audit: clean, changed, and with records."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from PIL import Image
from torch import Tensor

from diffkit.audit.purifiers.plain import to_pillow
from diffkit.files import write_json
from diffkit.protection.pgd import random_noise
from diffkit.protection.sidecar import Sidecar, sidecar_path
from diffkit.randomness import integers


def pixels(number: int = 0, height: int = 32, width: int = 32) -> Tensor:
    """uint8 (3, H, W): coarse blocks, so that noise is no small part of it."""
    import torch

    coarse = integers(0, 256, (3, height // 8, width // 8), number, "block").to(torch.uint8)
    return coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)


def save(path: Path, picture: Tensor, **options: object) -> Path:
    """Write a picture in the format of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    kind = {".png": "PNG", ".jpg": "JPEG", ".bmp": "BMP"}[path.suffix]
    to_pillow(picture).save(file, kind, **options)
    path.write_bytes(file.getvalue())
    return path


def protected(picture: Tensor, levels: int = 8, seed: int = 99) -> Tensor:
    """Another picture within the budget, by noise that is not the control's."""
    return random_noise(picture[None], levels, [seed])[0]


def record(result: Path, clean: Path, levels: int = 8, prompt: str | None = None) -> Sidecar:
    """Write the record of a protected picture beside it."""
    digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (clean, result)]
    found = Sidecar(
        method="texture",
        levels=levels,
        steps=1,
        model="the attacked model",
        model_revision=None,
        target=None,
        prompt=prompt,
        seed=0,
        input_sha256=digests[0],
        output_sha256=digests[1],
        parameter_sha256="0" * 64,
        views=1,
        working_sizes=((32, 32),),
        max_delta=float(levels),
        mean_delta=1.0,
    )
    write_json(sidecar_path(result), found.as_json())
    return found


def two_folders(root: Path, count: int = 2, same: bool = False) -> tuple[Path, Path]:
    """CLEAN with pictures 0.png, 1.png, ... and PROTECTED with theirs, recorded."""
    clean, result = root / "clean", root / "protected"
    for number in range(count):
        x = pixels(number)
        original = save(clean / f"{number}.png", x)
        copy = save(result / f"{number}.png", x if same else protected(x))
        record(copy, original)
    return clean, result


def build_inpainting(folder: Path) -> Path:
    """A tiny Stable Diffusion whose U-Net takes a mask and the masked picture: 9 channels."""
    import torch
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline

    from tests import tiny

    parts = StableDiffusionPipeline.from_pretrained(tiny.build_sd(folder / "plain")).components
    parts.pop("image_encoder")
    torch.manual_seed(0)
    parts["unet"] = tiny._unet(in_channels=9)
    pipeline = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(folder / "inpaint")
    return folder / "inpaint"


def open_rgb(path: Path) -> Image.Image:
    """A picture file."""
    with Image.open(path) as image:
        return image.convert("RGB")
