"""One-step distillation on tiny networks, ready to run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffkit.data.trajectories import TrajectoryBatch
from diffkit.models.conditioner import Sizes
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import add_lora
from diffkit.objectives.diffusion_gan import DiffusionGanObjective
from diffkit.objectives.diffusion_gan_config import DmdConfig, GanConfig
from diffkit.randomness import SampleKeys, normal

Folder = Callable[[str], Path]
SIZE = Sizes((32, 32), (0, 0), (32, 32))


def pairs(count: int = 4, channels: int = 4, first: int = 0, of: int = 4) -> TrajectoryBatch:
    """Rows `first`, first + 1, ... of one fixed global batch of `of` pairs."""
    shape, rows = (of, channels, 16, 16), slice(first, first + count)
    keys = SampleKeys(5, (0,) * of, tuple(range(of)))
    return TrajectoryBatch(
        keys.select(rows),
        normal(shape, "z")[rows],
        normal(shape, "x")[rows],
        [f"a {i}" for i in range(of)][rows],
        None,
        None,
        [SIZE] * count,
        tuple(range(of))[rows],
        normal(shape, "other")[rows],
    )


def make(
    folder: Path, scores: DmdConfig | None = None, lora: bool = False, **options: Any
) -> DiffusionGanObjective:
    """The method on a fresh model, ready to run; MSE and no warm-up unless told."""
    torch.manual_seed(0)
    model = LatentDiffusion.load(folder)
    if lora:
        model.denoiser.requires_grad_(False)
        add_lora(model, 2)
        for name, parameter in model.denoiser.named_parameters():
            if "lora_B" in name:  # else there is nothing to tell from the base
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    else:
        model.denoiser.requires_grad_(True)
    opposed = options.get("discriminator") != "none" or options.get("dmd")
    usual: dict[str, Any] = {"regression": "mse"} | ({"warmup": 0} if opposed else {})
    config = GanConfig(**(usual | options))
    method = DiffusionGanObjective(
        model, config, scores or DmdConfig(), 4, "default" if lora else None
    )
    method.place(torch.device("cpu"))
    method.begin(0)
    return method


def run(method: DiffusionGanObjective, phase: str, batch: Any, repeat: int = 0) -> dict[str, Any]:
    """What the phase's player says of a batch."""
    player = next(p.player for p in method.phases() if p.name == phase)
    draws = method.draw(batch, repeat)
    with torch.no_grad():
        shared = method.shared(draws)
    terms: dict[str, Any] = method.players()[player](phase, draws, shared)
    return terms
