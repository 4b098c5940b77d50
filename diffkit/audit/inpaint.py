"""Inpainting as a threat: a region of a picture is painted anew, the rest is kept and pasted back.

    z_s <- m z_s + (1 - m) (alpha_s z_known + sigma_s eps),    m = 1 where it is painted

for models that take no mask, after every step (as in diffusers' inpainting pipelines, with the
noise of the start); an inpainting model gets the mask and the latents of the masked picture as
further channels instead. DDIM with eta = 0 from pure noise, classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from diffkit.audit.subjects import Subject, Version, in_pieces, per_seed
from diffkit.errors import RunFailed
from diffkit.evaluation.pictures import to_uint8
from diffkit.models.conditioner import Sizes
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.schedule import Prediction
from diffkit.protection.surrogate import Surrogate

__all__ = ["Inpainter", "Region", "inpaint_versions"]

_LEAST = 32  # pixels; LPIPS and SSIM say nothing of less


@dataclass(frozen=True)
class Region:
    """What is painted of one view.

    Attributes:
        mask: (1, 1, h, w) float, 1 where it is painted.
        box: rows and columns around it, on the model's pixel grid.
    """

    mask: Tensor
    box: tuple[slice, slice]

    @classmethod
    def of(cls, mask: Tensor, multiple: int) -> Region | None:
        """The region of a mask (1, 1, h, w), None for an empty one; sides divide by `multiple`."""
        painted = mask[0, 0] > 0.5
        if not bool(painted.any()):
            return None
        rows, columns = (
            _span(painted.any(axis), multiple, side)
            for axis, side in zip((1, 0), painted.shape, strict=True)
        )
        return cls(painted[None, None].float(), (rows, columns))

    def cut(self, images: Tensor) -> Tensor:
        """The box of pictures (B, C, h, w)."""
        return images[..., self.box[0], self.box[1]]

    def paste(self, painted: Tensor, onto: Tensor) -> Tensor:
        """`painted` inside the region, `onto` outside, uint8 (B, 3, h, w)."""
        return torch.where(self.mask > 0.5, painted, onto)


def _span(painted: Tensor, multiple: int, length: int) -> slice:
    """From the first to the last painted row, out to the grid, and wide enough to be measured."""
    places = painted.nonzero().flatten()
    start = int(places[0]) // multiple * multiple
    stop = -(-(int(places[-1]) + 1) // multiple) * multiple
    while stop - start < min(_LEAST, length):
        start, stop = max(0, start - multiple), min(length, stop + multiple)
    return slice(start, stop)


class Inpainter:
    """Paints with one model and one prompt. Raises `UserError` where it cannot be told it."""

    def __init__(self, model: LatentDiffusion, prompt: str) -> None:
        self.model = model
        self.prompt = prompt
        self.surrogate = Surrogate.of(model, prompt)

    @torch.no_grad()
    def __call__(
        self,
        images: Tensor,
        mask: Tensor,
        noise: Tensor,
        sizes: Sequence[Sizes],
        steps: int = 100,
        guidance: float = 7.5,
    ) -> Tensor:
        """Painted pictures (B, 3, H, W), float32, not clamped and nothing pasted back.

        Args:
            images: (B, 3, H, W) float32 in [-1, 1].
            mask: (1, 1, H, W), 1 where it is painted.
            noise: (B, C, h, w) standard normal.
            sizes: one a picture, for models with micro-conditioning.
            steps: of the sampler.
            guidance: scale of classifier-free guidance, for models that have it.
        """
        schedule, codec = self.surrogate.schedule, self.model.codec
        device = self.model.device
        images, mask, eps = images.to(codec.device), mask.to(codec.device), noise.to(device)
        known = codec.encode(images).to(device)
        painted = F.interpolate(mask, known.shape[-2:]).to(device)
        given = None
        if self.surrogate.inpaints:
            around = codec.encode(images * (1 - mask)).to(device)
            given = torch.cat([painted.expand(len(around), -1, -1, -1), around], 1)
        mu = None
        if schedule.shifts_by_resolution:
            mu = schedule.mu(self.model.denoiser.tokens(*known.shape[-2:]))
        times = schedule.sampling_timesteps(steps, mu).to(device)
        z_t = schedule.init_noise_sigma * eps
        for t, s in zip(times[:-1], times[1:], strict=True):
            z_t = schedule.step(self._predict(z_t, t, given, sizes, guidance), s)
            if given is None:
                kept = schedule.add_noise(known, eps, s.expand(len(known)))
                z_t = painted * z_t + (1 - painted) * kept
        return codec.decode(z_t.to(codec.device)).float()

    def _predict(
        self, z_t: Tensor, t: Tensor, given: Tensor | None, sizes: Sequence[Sizes], guidance: float
    ) -> Prediction:
        taken = z_t if given is None else torch.cat([z_t, given], 1)
        batch = t.expand(len(z_t))
        output = self.surrogate.output(taken, batch, sizes)
        if self.surrogate.null is not None and guidance != 1:
            without = self.surrogate.output(taken, batch, sizes, empty=True)
            output = without + guidance * (output - without)
        return self.surrogate.schedule.prediction(output, z_t, batch)


def inpaint_versions(
    painter: Inpainter,
    subject: Subject,
    mask: Tensor,
    versions: Mapping[str, Version],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    batch_size: int = 8,
) -> tuple[dict[str, list[Tensor]], dict[int, Region]]:
    """A region of several versions of one picture painted anew, all from the same noises.

    Outside the region every result shows the clean picture: all that differs is what was painted.

    Args:
        mask: (1, H, W) float of the picture's size, 1 where it is painted.
        versions, seeds, batch_size: as in `sdedit_versions`.

    Returns:
        name -> one (K, 3, h, w) uint8 for each view that the region touches, and the regions by
        the number of the view.

    Raises:
        RunFailed: the region vanishes at the model's resolution.
    """
    height, width = subject.pixels.shape[-2:]
    multiple = subject.model.size_multiple
    seen = {i: Region.of(view.mask(mask[None]), multiple) for i, view in enumerate(subject.views)}
    touched = {i: region for i, region in seen.items() if region is not None}
    if not touched:
        raise RunFailed("the mask has no white pixel at the model's resolution; paint a larger one")
    found: dict[str, list[Tensor]] = {}
    for name, version in versions.items():
        working = [subject.working(pixels) for pixels in per_seed(version, seeds)]
        found[name] = []
        for i, region in touched.items():
            view = subject.views[i]
            images = torch.cat([views[i] for views in working])
            noise = torch.stack([subject.noise(view, images[:1], seed) for seed in seeds])
            sizes = [view.sizes(height, width)] * len(images)

            def make(rows: slice) -> Tensor:
                part = images[rows], region.mask, noise[rows], sizes[rows]  # noqa: B023
                return to_uint8(painter(*part, steps, guidance).cpu())

            painted = in_pieces(make, len(images), batch_size)
            found[name].append(region.paste(painted, to_uint8(subject.clean[i])))
    return found, touched
