"""Pictures of fixed prompts from the model in training, always from the same noise."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffkit.data.prompts import read_prompts
from diffkit.files import atomic_write
from diffkit.models.conditioner import Conditioning
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.sampling import sample
from diffkit.randomness import normal
from diffkit.training.trackers import Tracker

__all__ = ["Validation"]

BATCH = 16
"""Most pictures that are sampled at once."""

PIXELS = 1024**2
"""Most pixels that are sampled at once: one picture of SDXL's size, four of Stable Diffusion's."""


class Validation:
    """Makes the pictures; prompts are encoded once, at the start, unless training changes that.

    Arguments:
        model: the model in training.
        prompts: a file of prompts, one a line.
        size: side of the square pictures in pixels.
        seed: picture i starts from the noise of seed + i.
        steps, guidance_scale: of sampling.
        folder: where `step-00000100.png` sheets go; None on all but the main process.
        encode_anew: encode the prompts each time, since what encodes them is in training.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        prompts: Path,
        *,
        size: int,
        seed: int,
        steps: int,
        guidance_scale: float,
        folder: Path | None,
        encode_anew: bool = False,
    ) -> None:
        self.model = model
        self.prompts = read_prompts(prompts)
        self.batch = max(1, min(BATCH, PIXELS // size**2))
        self.steps = steps
        self.guidance_scale = guidance_scale
        self.folder = folder
        self._sizes = (size, size)
        self._encode_anew = encode_anew
        self._seed = seed
        self._encode()
        shape = model.latent_shape(size, size)
        self._noise = torch.stack(
            [normal(shape, seed + i, "image") for i in range(len(self.prompts))]
        )

    def __call__(self, done: int, tracker: Tracker) -> None:
        """Sample, save one sheet, hand the pictures to the tracker; a collective call."""
        images = self.images()
        if self.folder is None:
            return
        with atomic_write(self.folder / f"step-{done:08d}.png") as file:
            _sheet(images).save(file, format="PNG")
        tracker.images(done, self.prompts, images)

    def _encode(self) -> None:
        conditioner = self.model.conditioner
        self._cond = conditioner.encode(self.prompts, self._sizes).to("cpu")
        self._null: Conditioning | None = None
        if self.guidance_scale != 1:
            self._null = conditioner.null(1, self._sizes).to("cpu")

    def _fresh(self, rows: slice, step: int) -> Tensor:
        """The noise that a few-step model adds at a step, of these prompts."""
        places = range(len(self.prompts))[rows]
        shape = self._noise.shape[1:]
        return torch.stack([normal(shape, self._seed + i, "image", step) for i in places])

    @torch.no_grad()
    def images(self) -> list[Image.Image]:
        """One picture a prompt.

        The denoiser runs under the caller's autocast, the codec in its own precision (SDXL's
        overflows in fp16) and on one picture at a time. Both are left as they were found.
        """
        denoiser, codec = self.model.denoiser, self.model.codec
        if self._encode_anew:
            self._encode()
        training = denoiser.training
        denoiser.eval()
        device, home, images = denoiser.device, codec.device, []
        codec.to(device)
        for start in range(0, len(self.prompts), self.batch):
            rows = slice(start, start + self.batch)
            noise = self._noise[rows].to(device)
            cond = self._cond.select(rows).to(device)
            null = None if self._null is None else self._null.expand(len(noise)).to(device)
            latents = sample(
                denoiser,
                noise,
                cond,
                null,
                steps=self.steps,
                guidance_scale=self.guidance_scale,
                fresh=partial(self._fresh, rows),
            )
            with torch.autocast(device.type, enabled=False):
                images += [_picture(codec.decode(one)[0]) for one in latents.split(1)]
        codec.to(home)
        denoiser.train(training)
        return images


def _picture(pixels: Tensor) -> Image.Image:
    """The picture of (3, H, W) values in [-1, 1]."""
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def _sheet(images: list[Image.Image]) -> Image.Image:
    """All pictures side by side in rows of at most eight."""
    columns = min(8, len(images))
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height))
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        sheet.paste(image, (column * width, row * height))
    return sheet
