"""Pictures in memory, as Python programs hold them: Pillow's, arrays and tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffkit.errors import UserError

__all__ = ["OUTPUTS", "listed", "mask_plane", "on_white", "picture_planes"]


def listed(value: Any) -> list[Any]:
    """One picture or several, as a list; None is none."""
    if value is None:
        return []
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 4:
        return list(value)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _planes(image: Any) -> Tensor:
    """uint8 (C, H, W) of any kind of picture."""
    if isinstance(image, Image.Image):
        image = np.asarray(image)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image if image.ndim == 3 else image[..., None]))
        image = image.permute(2, 0, 1)
    image = image.detach().cpu()
    if image.is_floating_point():
        if bool((image < 0).any()) or bool((image > 1).any()):
            raise UserError("image: floats must be in [0, 1].")
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise UserError(f"image: {image.dtype}; give uint8, or floats in [0, 1].")
    return image.contiguous()


def picture_planes(image: Any) -> tuple[Tensor, Tensor | None]:
    """uint8 pixels (C, H, W), C 1 or 3, and alpha (1, H, W) or None, which only Pillow's have.

    Raises `UserError` for other numbers of channels, other types, and floats beyond [0, 1].
    """
    if isinstance(image, Image.Image) and image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    planes = _planes(image)
    if isinstance(image, Image.Image) and image.mode in ("LA", "RGBA"):
        return planes[:-1].clone(), planes[-1:].clone()
    if len(planes) not in (1, 3):
        raise UserError(f"image: {len(planes)} channels; give 1 or 3, channels last in arrays.")
    return planes, None


def on_white(pixels: Tensor, alpha: Tensor | None) -> Tensor:
    """uint8 (3, H, W) of pixels (C, H, W), C 1 or 3, and their alpha (1, H, W)."""
    rgb = pixels.expand(3, -1, -1)
    if alpha is None:
        return rgb
    share = alpha.float() / 255
    return (share * rgb.float() + (1 - share) * 255).round().to(torch.uint8)


def mask_plane(mask: Any) -> Tensor:
    """float32 (1, H, W) in [0, 1] of a mask of any kind, by its first channel or its brightness."""
    if isinstance(mask, Image.Image):
        mask = mask.convert("L")
    return _planes(mask)[:1].float() / 255


def _as_pil(pixels: Tensor, alpha: Tensor | None) -> Image.Image:
    planes = pixels if alpha is None else torch.cat([pixels, alpha])
    bands = [Image.fromarray(plane.numpy()) for plane in planes]
    return (
        bands[0] if len(bands) == 1 else Image.merge(("LA", "RGB", "RGBA")[len(bands) - 2], bands)
    )


OUTPUTS: dict[str, Callable[[Tensor, Tensor | None], Any]] = {
    "pil": _as_pil,
    "np": lambda pixels, alpha: (pixels.float() / 255).permute(1, 2, 0).numpy(),
    "pt": lambda pixels, alpha: pixels.float() / 255,
    "uint8": lambda pixels, alpha: pixels,
}
"""Kind -> (pixels (C, H, W) uint8, alpha) -> a picture; alpha is kept by "pil" alone."""
