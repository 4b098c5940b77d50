"""The artist's pictures as a cell sees them, clean or protected; made once and kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from runner.experiment import Cell, digest
from runner.work import claim
from torch import Tensor

from diffkit.files import atomic_directory
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.denoising import denoising_loss
from diffkit.protection.joint import protect_set
from diffkit.protection.protect import ProtectionResult, protect
from diffkit.protection.settings import Settings
from diffkit.randomness import address, normal, uniform
from protection_parts.artist import pixels_of, protected

__all__ = ["TARGET", "attack", "attack_latents", "picture_seeds", "versions"]

TARGET = "text:DIFFKIT"
"""The pattern of all methods that have one."""


def picture_seeds(seed: int, count: int) -> list[int]:
    """One seed a picture."""
    return [address("picture", seed, i) for i in range(count)]


def settings_of(method: str, levels: int, options: Mapping[str, Any]) -> Settings:
    """The method with the experiment's number of steps; other options are its own defaults."""
    row = Settings(method).row
    chosen: dict[str, Any] = {"method": method, "levels": levels}
    if row.loss is not None:
        chosen["steps"] = options["steps"]
    if "prompt" in row.options:
        chosen["prompt"] = options["prompt"]
    if row.target and row.target != "zero":
        chosen["target"] = TARGET
    return Settings(**chosen)


def attack(
    model: LatentDiffusion, pixels: Tensor, settings: Settings, seeds: list[int]
) -> list[ProtectionResult]:
    """Protect uint8 pictures (N, 3, H, W), one artist's."""
    if settings.row.joint is None:
        return protect(pixels, model, settings, seeds=seeds)
    return protect_set(list(pixels), model, settings, seeds=seeds)


def versions(model: LatentDiffusion, cell: Cell) -> tuple[Tensor, dict[str, Any]]:
    """The sixteen pictures of a cell, uint8 (16, 3, 64, 64), and what is to be said of them.

    Cells of one method, budget and seed share them: they lie beside the work folders.
    """
    clean, method = pixels_of(protected()), cell.settings["method"]
    if method in ("clean", "none"):
        return clean, {}
    made_of = {
        key: cell.settings[key] for key in ("assets", "artist", "attack", "method", "levels")
    }
    made_of |= {"seed": cell.seed}
    folder = cell.work.parent / f"pictures-{method}-{cell.settings['levels']}-{digest(made_of)[:8]}"
    with claim(folder, wait=True):
        if not folder.is_dir():
            settings = settings_of(method, cell.settings["levels"], cell.settings["attack"])
            results = attack(model, clean, settings, picture_seeds(cell.seed, len(clean)))
            stats = {key: [result.stats.get(key) for result in results] for key in results[0].stats}
            with atomic_directory(folder) as place:
                np.save(place / "pixels.npy", torch.stack([r.pixels for r in results]).numpy())
                (place / "stats.json").write_text(json.dumps(stats), encoding="utf-8")
    stats = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
    return torch.from_numpy(np.load(folder / "pixels.npy")), stats


def attack_latents(
    model: LatentDiffusion, z0: Tensor, relative: Tensor, seed: int, *, steps: int, prompt: str
) -> Tensor:
    """Latents moved to raise L_S, the picture left out: ascent in the ball |dz| <= rho |z|.

        z <- P(z + 2.5 (rho |z0| / steps) g / |g|),    g = grad L_S(z), one draw a step

    Arguments:
        z0: (B, C, h, w).
        relative: rho (B,), the size that |dx| / |x| of a pixel attack has.
    """
    cond = model.conditioner.encode([prompt], (model.default_size,) * 2).expand(len(z0))
    radius = (relative * z0.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    z = z0.clone()
    for step in range(steps):
        address_of = [(seed, i, step, "latent attack") for i in range(len(z0))]
        eps = torch.stack([normal(z0.shape[1:], *one, "noise") for one in address_of])
        u = torch.cat([uniform((1,), *one, "time") for one in address_of])
        t = model.schedule.train_timesteps(u)
        leaf = z.detach().requires_grad_()
        output = model.denoiser(model.schedule.add_noise(leaf, eps, t), t, cond)
        loss = denoising_loss(output, model.schedule.target(leaf, eps, t)).sum()
        (g,) = torch.autograd.grad(loss, leaf)
        delta = leaf.detach() + 2.5 / steps * radius * g / _norm(g) - z0
        z = z0 + delta * (radius / _norm(delta)).clamp_max(1)
    return z.detach()


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
