"""The trunk of a LatentLPIPS network: a classifier of latents, trained in steps that are kept."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffkit.console import say
from diffkit.models.codec import Codec
from diffkit.perceptual.latent_classifier import LatentClassifier, shared_label_loss
from diffkit.perceptual.latent_lpips import LatentLpipsConfig
from diffkit.randomness import address, integers
from diffkit.training.checkpoints import Checkpoint, Checkpoints
from latent_metric.pictures import Pictures, encoded

__all__ = ["TrunkSettings", "train_trunk", "trunk_folder"]

SHOWN_EVERY = 100


@dataclass(frozen=True)
class TrunkSettings:
    """How the trunk is trained.

    Attributes:
        steps, batch_size, learning_rate: of AdamW, with a cosine rate after a short warm-up.
        dense: VGG's dense head of the classifier.
        seed: with the step the address of all draws.
    """

    steps: int
    batch_size: int
    learning_rate: float
    dense: bool
    seed: int


def trunk_folder(
    state: Path, made_of: str, pictures: Pictures, config: LatentLpipsConfig, how: TrunkSettings
) -> Path:
    """Where checkpoints lie of the trunk of these pictures and settings, and of no other.

    Arguments:
        state: folder of everything that is kept.
        made_of: see `latent_metric.pictures.made_of`.
    """
    shown = hashlib.blake2b(pictures.present.numpy().tobytes(), digest_size=16).hexdigest()
    told = [made_of, pictures.classes, shown, asdict(config), asdict(how)]
    digest = hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()
    return state / f"trunk-{digest}"


def train_trunk(
    pictures: Pictures,
    kept: NDArray[np.float16],
    codec: Codec,
    config: LatentLpipsConfig,
    how: TrunkSettings,
    folder: Path,
    every: int,
) -> LatentClassifier:
    """Train on latents sampled anew in every step; goes on from the last checkpoint in `folder`.

    Arguments:
        kept: see `latent_metric.pictures.moments`.
        folder: see `trunk_folder`.
        every: steps from one checkpoint to the next; there is one after the last step too.

    Raises `RunFailed` for weights that are not finite.
    """
    device = codec.device
    torch.manual_seed(address(how.seed, "trunk"))
    network = LatentClassifier(config, len(pictures.classes), how.dense).to(device)
    network.to(memory_format=torch.channels_last)
    decayed = [p for p in network.parameters() if p.ndim > 1]
    rest = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=how.learning_rate)
    checkpoints, clock = Checkpoints(folder, keep=2), time.monotonic()
    first = restore(checkpoints, network, optimizer)
    for step in range(first, how.steps):
        torch.manual_seed(address(how.seed, step, "dropout"))
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * share_of_rate(step, how.steps)
        latents, present = batch(pictures, kept, codec, how, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(latents)
        loss = shared_label_loss(logits, present).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % SHOWN_EVERY == 0:
            say(f"step {done}, {time.monotonic() - clock:.0f} s, loss {loss.item():.3f}")
        if done % every == 0 or done == how.steps:
            keep(checkpoints, done, network, optimizer)
    return network.eval()


def share_of_rate(step: int, steps: int) -> float:
    """Of the peak rate: linear over a twentieth of the steps, times a half cosine."""
    warm = max(1, steps // 20)
    return float(min(1.0, (step + 1) / warm) * 0.5 * (1 + np.cos(np.pi * step / steps)))


def batch(
    pictures: Pictures, kept: NDArray[np.float16], codec: Codec, how: TrunkSettings, step: int
) -> tuple[Tensor, Tensor]:
    """Latents (B, C, h, w) of a step and what they show (B, classes), drawn by address."""
    rows = integers(0, len(kept), (how.batch_size,), how.seed, step, "rows")
    latents = encoded(kept, rows, codec, how.seed, step)
    present = pictures.present[rows % len(pictures)].to(codec.device)
    return latents.contiguous(memory_format=torch.channels_last), present


def keep(
    checkpoints: Checkpoints,
    step: int,
    network: LatentClassifier,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint, with the optimizer's state as `slot/parameter`."""
    slots = {
        f"{slot}/{name}": value
        for name, parameter in network.named_parameters()
        for slot, value in optimizer.state[parameter].items()
    }
    files = {"trunk": network.state_dict(), "trunk.optimizer": slots}
    checkpoints.write(Checkpoint(step, files))


def restore(
    checkpoints: Checkpoints, network: LatentClassifier, optimizer: torch.optim.Optimizer
) -> int:
    """Take the last checkpoint, if there is one; returns the number of steps that are done."""
    checkpoints.clean()
    found = checkpoints.latest()
    if found is None:
        return 0
    network.load_state_dict(found.files["trunk"])
    parameters = dict(network.named_parameters())
    for key, value in found.files["trunk.optimizer"].items():
        slot, _, name = key.partition("/")
        parameter = parameters[name]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][slot] = value
    say(f"the trunk goes on from step {found.step}, in {checkpoints.folder}")
    return found.step
