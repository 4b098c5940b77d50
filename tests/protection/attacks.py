"""What the tests of the attack share: pictures, an inpainting model, attacks that stand ready."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from torch import Tensor

from diffkit.models.conditioner import Sizes
from diffkit.models.denoiser import Denoiser
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.budget import as_signed
from diffkit.protection.gradients import ImageGradient
from diffkit.protection.methods import METHODS
from diffkit.protection.protect import Attack, prepared
from diffkit.protection.scene import Scene
from diffkit.protection.settings import Settings
from diffkit.protection.surrogate import Surrogate
from diffkit.protection.views import ViewPlan, plan_views
from diffkit.randomness import normal
from tests.tiny import _unet

R = 16
"""Short side of a view in these tests, small to be fast; the tiny models take any size."""

FIXED = [name for name, row in METHODS.items() if row.joint is None]
DENOISING = [name for name in FIXED if METHODS[name].denoiser != "none"]


def build_inpaint(source: Path, folder: Path) -> Path:
    """The tiny Stable Diffusion with a U-Net that is given a mask and the picture around it."""
    pipeline = StableDiffusionPipeline.from_pretrained(source, safety_checker=None)
    torch.manual_seed(0)
    StableDiffusionInpaintPipeline(
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=_unet(in_channels=9),
        scheduler=pipeline.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def random_pixels(count: int = 1, height: int = R, width: int = R, channels: int = 3) -> Tensor:
    """uint8 (B, C, H, W) of all levels, 0 and 255 among them in every picture."""
    draws = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (count, channels, height, width), generator=draws)
    pixels[..., 0, 0], pixels[..., -1, -1] = 0, 255
    return pixels.to(torch.uint8)


def hole(count: int, height: int, width: int) -> Tensor:
    """A mask (B, 1, H, W) that is 0 in the middle and 1 around it."""
    mask = torch.ones(count, 1, height, width)
    mask[..., height // 4 : height // 2, width // 4 : 3 * width // 4] = 0
    return mask


def plan_of(model: LatentDiffusion, height: int, width: int) -> ViewPlan:
    """The whole view alone, at these tests' resolution."""
    square = model.family.square
    return plan_views(height, width, R, model.working_multiple, square, views=1)


@contextlib.contextmanager
def attack(
    model: LatentDiffusion,
    settings: Settings,
    pixels: Tensor,
    *,
    seeds: Sequence[int] | None = None,
    plan: ViewPlan | None = None,
    lean: bool = False,
    **options: Any,
) -> Iterator[Attack]:
    """An `Attack` that may be advanced inside the block. Surrogates that train stay untrained."""
    plan = plan_of(model, *pixels.shape[-2:]) if plan is None else plan
    seeds = range(len(pixels)) if seeds is None else seeds
    with prepared(model, settings, lean=lean) as surrogates:
        yield Attack.prepare(
            pixels, surrogates, settings, seeds=list(seeds), plan=plan, lean=lean, **options
        )


@contextlib.contextmanager
def gradient(
    model: LatentDiffusion, settings: Settings, pixels: Tensor, **options: Any
) -> Iterator[ImageGradient]:
    """The gradient of an attack."""
    with attack(model, settings, pixels, **options) as ready:
        assert ready.gradient is not None
        yield ready.gradient


def protected(
    model: LatentDiffusion, settings: Settings, pixels: Tensor, **options: Any
) -> list[Tensor]:
    """The results of a whole attack, without the scores, which take most of the time here."""
    with attack(model, settings, pixels, **options) as ready:
        assert ready.gradient is not None
        pgd, steps = ready.pgd, settings.rule().steps
        return list(pgd.finish(pgd.advance(pgd.start(), ready.gradient, 0, steps)))


def slightly_moved(pixels: Tensor, levels: float = 3.0) -> Tensor:
    """x somewhat off the pictures, so that methods whose gradient vanishes there have one."""
    draws = torch.Generator().manual_seed(9)
    x = as_signed(pixels)
    return (x + levels * 2 / 255 * torch.randn(x.shape, generator=draws)).clamp(-1, 1)


class Linear(Denoiser):
    """A denoiser that puts out c z_t."""

    c: float = 1.0

    def forward(self, z_t: Tensor, t: Tensor, cond: Any, guidance: Any = None) -> Tensor:
        return self.c * z_t


class Exact(Denoiser):
    """A denoiser that puts out what it was told to."""

    answer: Tensor

    def forward(self, z_t: Tensor, t: Tensor, cond: Any, guidance: Any = None) -> Tensor:
        return self.answer


def linear(denoiser: Denoiser, c: float) -> Linear:
    """Eps_hat = c z_t with the schedule of a real denoiser."""
    toy = Linear(denoiser.model, denoiser.family, denoiser.schedule)
    toy.c = c
    return toy


def scene_of(
    model: LatentDiffusion, u: float | Sequence[float] = 0.4, *, target: bool = False
) -> Scene:
    """A scene of two pictures at fractions u of the time axis; its moments want a gradient."""
    surrogate = Surrogate.of(model, model.conditioner.example)
    images = as_signed(random_pixels(2))
    with torch.no_grad():
        moments = model.codec.encode_moments(images)
        goal = model.codec.encode_moments(images.flip(-1)[:1])
    fractions = torch.tensor([u, u] if isinstance(u, float) else list(u))
    shape = (2, model.codec.channels, *moments.shape[-2:])
    return Scene(
        surrogate,
        moments.requires_grad_(),
        None,
        surrogate.times(fractions),
        normal(shape, "scene"),
        [Sizes((R, R), (0, 0), (R, R))] * 2,
        [(0, 0), (1, 0)],
        target=goal if target else None,
    )
