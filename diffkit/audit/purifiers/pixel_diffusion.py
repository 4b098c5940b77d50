"""Purification by a diffusion model of pixels, which LDM perturbations do not transfer to.

DiffPure (Nie et al. 2022): noise the picture to an early time of the training table and sample
back with the posterior of DDPM, one training step at a time.

GrIDPure (Zhao et al. 2023, arXiv:2312.00084): a little noise, many times, on tiles at native size:

    x <- (1 - gamma) average of purified tiles + gamma x,    gamma = 0.1, 20 times

with 10 diffusion steps each. Tiles of side S lie S/2 apart. The corners of a picture are in one
tile only, so the four of S/2 are also joined into one more tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffkit import randomness
from diffkit.audit.purifiers.base import Amount, Kind, Models, Work
from diffkit.audit.purifiers.latent import resized, through_views
from diffkit.audit.subjects import working_views
from diffkit.errors import UserError
from diffkit.evaluation.pictures import to_float, to_uint8
from diffkit.models.conditioner import Conditioning
from diffkit.models.denoiser import Denoiser
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.views import View

__all__ = ["PIXEL_DIFFUSION", "ancestral", "corner_tile", "grid_starts", "purified_tiles"]

_ROUNDS, _BLEND = 20, 0.1
_SHARE = 0.01  # 10 of 1000 steps
_BATCH = 8


@torch.no_grad()
def ancestral(
    denoiser: Denoiser, x: Tensor, cond: Conditioning, steps: int, *names: int | str
) -> Tensor:
    """Noise pictures by `steps` steps of the DDPM table and sample back (Ho et al. 2020).

        z_t = alpha_t x + sigma_t n,    t = steps - 1
        z_s = alpha_s x0 + sqrt(sigma_s^2 - d^2) eps + d n,    s = t - 1, down to the clean end
        d^2 = (sigma_s / sigma_t)^2 (sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2)

    which is the posterior q(z_s | z_t, x0) at the predicted x0.

    Arguments:
        denoiser: of a DDPM table.
        x: (B, 3, S, S) in [-1, 1].
        cond: B conditionings.
        steps: 1 to T.
        names: the address of the noise, beside which stand the row and the step.

    Returns:
        (B, 3, S, S) float32.
    """
    schedule = denoiser.schedule

    def noise(step: int) -> Tensor:
        rows = [randomness.normal(x.shape[1:], *names, row, step) for row in range(len(x))]
        return torch.stack(rows).to(x.device)

    times = torch.arange(steps - 1, -2, -1, device=x.device)
    z = schedule.add_noise(x, noise(steps), times[0].expand(len(x)))
    alphas, sigmas = schedule.alpha_sigma(times)
    for step in range(steps):
        prediction = denoiser.predict(z, times[step].expand(len(x)), cond)
        x0 = prediction.x0
        if schedule.clip is not None:
            x0 = x0.clamp(-schedule.clip, schedule.clip)
        alpha, sigma = alphas[step], sigmas[step]
        alpha_s, sigma_s = alphas[step + 1], sigmas[step + 1]
        # With x0 limited, eps is what z then says it is; the posterior's mean is one of (x0, z).
        eps = (z - alpha * x0) / sigma
        kept = sigma.square() - (alpha / alpha_s).square() * sigma_s.square()
        spread = (sigma_s / sigma).square() * kept.clamp_min(0)
        z = alpha_s * x0 + (sigma_s.square() - spread).clamp_min(0).sqrt() * eps
        if step < steps - 1:
            z = z + spread.sqrt() * noise(steps - 1 - step)
    return z.float()


def grid_starts(length: int, side: int) -> list[int]:
    """Where tiles of `side` begin along a line: evenly, at most side/2 apart, ends covered."""
    count = math.ceil((length - side) / (side // 2)) + 1 if length > side else 1
    return [round(i * (length - side) / max(1, count - 1)) for i in range(count)]


def corner_tile(x: Tensor, side: int) -> Tensor:
    """The four corners of side/2 of a picture (3, H, W), joined into one tile (3, side, side)."""
    half = side // 2
    rest = side - half
    top = torch.cat([x[:, :half, :half], x[:, :half, -rest:]], 2)
    bottom = torch.cat([x[:, -rest:, :half], x[:, -rest:, -rest:]], 2)
    return torch.cat([top, bottom], 1)


def purified_tiles(x: Tensor, side: int, round_: int, purify: _TilePurifier) -> Tensor:
    """One round of GrIDPure without the blend: tiles out, purified, averaged back.

    `x` (3, H, W), both sides at least `side`. The average is over every tile that has the pixel,
    the joined corners among them where the picture is larger than a tile.
    """
    height, width = x.shape[-2:]
    places = [(top, left) for top in grid_starts(height, side) for left in grid_starts(width, side)]
    tiles = [x[:, top : top + side, left : left + side] for top, left in places]
    joined = len(places) > 1
    if joined:
        tiles.append(corner_tile(x, side))
    made = purify(torch.stack(tiles), round_)
    total, count = torch.zeros_like(x), torch.zeros_like(x[:1])
    for (top, left), tile in zip(places, made):
        total[:, top : top + side, left : left + side] += tile
        count[:, top : top + side, left : left + side] += 1
    if joined:
        half, tile = side // 2, made[-1]
        for rows, of_tile in _ends(half, side):
            for columns, across in _ends(half, side):
                total[:, rows, columns] += tile[:, of_tile, across]
                count[:, rows, columns] += 1
    return total / count


def _ends(half: int, side: int) -> Iterator[tuple[slice, slice]]:
    """(place in the picture, place in the joined tile) of its first and second part."""
    yield slice(0, half), slice(0, half)
    yield slice(-(side - half), None), slice(half, side)


class _TilePurifier:
    """`ancestral` on many tiles of one picture, a few at a time."""

    def __init__(self, model: LatentDiffusion, steps: int, seed: int) -> None:
        self.model, self.steps, self.seed = model, steps, seed
        self.cond = model.conditioner.encode([""])

    def __call__(self, tiles: Tensor, round_: int) -> Tensor:
        """(N, 3, S, S) -> the same, float32 on the CPU."""
        done = []
        for start in range(0, len(tiles), _BATCH):
            part = tiles[start : start + _BATCH].to(self.model.device)
            cond = self.cond.expand(len(part))
            names = (self.seed, "purify", "gridpure", round_, start)
            done.append(ancestral(self.model.denoiser, part, cond, self.steps, *names).cpu())
        return torch.cat(done)


def _pixel_model(name: str, models: Models, source: str | None) -> LatentDiffusion:
    model = models.of(source)
    if model.codec.vae is not None or model.codec.channels != 3:
        raise UserError(
            f"--purify {name}:{source}: needs a diffusion model of RGB pixels, such as a folder of "
            f"DDPMPipeline; this one is {model.family.name} with {model.codec.channels} channels."
        )
    if model.schedule.kind != "ddpm":
        raise UserError(
            f"--purify {name}:{source}: needs a model with a DDPM table of noise, which its steps "
            f"are counted in; this one's schedule is of the kind {model.schedule.kind!r}."
        )
    model.conditioner.encode([""])  # a model of classes without a null class is refused here
    return model


def _steps(share: float, model: LatentDiffusion) -> int:
    return max(1, round(share * model.schedule.num_train_timesteps))


def _diffpure(share: float, models: Models, source: str | None) -> Work:
    model = _pixel_model("diffpure", models, source)
    steps = _steps(share, model)

    def work(pixels: Tensor, seed: int) -> Tensor:
        def make(images: Tensor, view: View) -> Tensor:
            images, cond = images.to(model.device), model.conditioner.encode([""])
            names = (seed, "purify", "diffpure", view.name)
            return ancestral(model.denoiser, images, cond, steps, *names)

        return through_views(pixels, working_views(model, *pixels.shape[-2:]), make)

    return work


def _gridpure(rounds: float, models: Models, source: str | None) -> Work:
    model = _pixel_model("gridpure", models, source)
    side = model.default_size

    def work(pixels: Tensor, seed: int) -> Tensor:
        height, width = pixels.shape[-2:]
        enlarged = max(1.0, side / min(height, width))
        size = [max(side, round(enlarged * length)) for length in (height, width)]
        x = resized(to_float(pixels)[None], size)[0]
        purify = _TilePurifier(model, _steps(_SHARE, model), seed)
        for round_ in range(int(rounds)):
            made = purified_tiles(x, side, round_, purify)
            x = ((1 - _BLEND) * made + _BLEND * x).clamp(-1, 1)
        return to_uint8(resized(x[None], (height, width)))[0]

    return work


PIXEL_DIFFUSION = (
    Kind(
        "diffpure",
        "DiffPure, noised by {amount} of a pixel model's steps and sampled back",
        _diffpure,
        Amount("share", 0.1, 0.001, 1),
        random=True,
        model="given",
    ),
    Kind(
        "gridpure",
        "GrIDPure, {amount} rounds on overlapping tiles of a pixel model",
        _gridpure,
        Amount("rounds", _ROUNDS, 1, 1000, whole=True),
        random=True,
        model="given",
        more={"share": _SHARE, "blend": _BLEND, "stride": "half a tile"},
    ),
)
