"""Small objectives and data for the trainer's tests; `python -m tests.training.toy OUT` trains one.

One player: regression with dropout. Two players: a generator against a critic that makes five
steps to its one, with a gradient penalty every 16th step.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from diffkit.data.sampler import BatchSampler, share
from diffkit.files import atomic_directory
from diffkit.objectives.base import Objective, Phase
from diffkit.randomness import SampleKeys, normal
from diffkit.training.config import TrainConfig
from diffkit.training.configfile import dump
from diffkit.training.devices import make_accelerator, release_accelerator
from diffkit.training.folder import RunFolder
from diffkit.training.trackers import make_tracker
from diffkit.training.trainer import Trainer

SAMPLES, WIDTH = 14, 6


@dataclass
class ToyBatch:
    keys: SampleKeys
    x: torch.Tensor


class ToyData:
    """Fourteen fixed vectors; `stop_in` presses Ctrl-C while that step (0, 1, ...) is prepared."""

    def __init__(self, config, stop_in=None):
        self.sampler = BatchSampler([0] * SAMPLES, config.batch_size, config.seed)
        self.x = normal((SAMPLES, WIDTH), 7, "toy data")
        self.stop_in = stop_in

    def batches(self, first, last, rank=0, world=1, accumulation=1, workers=1, ahead=0):
        for step in range(first, last):
            if step == self.stop_in:
                signal.raise_signal(signal.SIGINT)
            pairs = self.sampler.batch(step)
            for micro in range(accumulation):
                rows = pairs[share(len(pairs), rank, world, micro, accumulation)]
                indices = tuple(index for index, _ in rows)
                keys = SampleKeys(self.sampler.seed, tuple(epoch for _, epoch in rows), indices)
                yield ToyBatch(keys, self.x[list(indices)])


def network(width, out):
    return nn.Sequential(nn.Linear(WIDTH, width), nn.SiLU(), nn.Dropout(0.1), nn.Linear(width, out))


class Regressor(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = network(width, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, phase, draws, shared):
        x, noise = draws
        loss = (self.net(x + noise) - self.frozen(x)).square().mean(1)
        return {"loss": loss, "time": noise.abs().mean(1).clamp(0, 1)}


class ToyObjective(Objective):
    """One player, and a controller: the noise grows with the running mean of the loss."""

    def __init__(self, width=8, poison=None):
        torch.manual_seed(0)
        self.poison = poison
        self.seen = []
        self.modules = {"net": Regressor(width)}
        self.mean, self.begun, self.cast = torch.zeros(()), [], False

    def begin(self, step):
        self.begun.append(step)
        self.cast = torch.is_autocast_enabled("cpu")

    def watched(self):
        return ("loss",)

    def stepped(self, phase, means):
        self.mean.lerp_(means["loss"].tanh(), 0.1)

    def state(self):
        return {"controller": {"mean": self.mean}}

    def players(self):
        return self.modules

    def phases(self):
        return (Phase("fit", "net"),)

    def averaged(self):
        return ("net",)

    def place(self, device):
        pass

    def draw(self, batch, repeat):
        self.seen += [(*pair, repeat) for pair in zip(batch.keys.epochs, batch.keys.indices)]
        noise = batch.keys.normal((WIDTH,), f"noise/{repeat}")
        if self.poison is not None and batch.keys.epochs[0] == self.poison:
            noise = noise * float("nan")
        return batch.x, noise * (1 + self.mean)

    def shared(self, draws):
        return None

    def save(self, folder):
        with atomic_directory(folder, overwrite=True) as place:
            for name, module in self.modules.items():
                tensors = {k: v.detach().clone() for k, v in module.state_dict().items()}
                save_file(tensors, place / f"{name}.safetensors")


class Generator(nn.Module):
    def __init__(self, width, critic):
        super().__init__()
        self.net = network(width, WIDTH)
        self.critic = [critic]  # in a list: not its own to train

    def forward(self, phase, draws, shared):
        return {"loss": -self.critic[0].net(self.net(draws[1])).squeeze(1)}


class Critic(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net = network(width, 1)

    def forward(self, phase, draws, shared):
        x, noise = draws
        if phase == "penalty":
            x = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
            return {"loss": 0.5 * gradient.square().sum(1)}
        real, fake = self.net(x).squeeze(1), self.net(shared).squeeze(1)
        gap = real - fake
        return {"loss": nn.functional.softplus(-real) + nn.functional.softplus(fake), "gap": gap}


class TwoPlayers(ToyObjective):
    """Five critic steps to one of the generator, a penalty every 16th step."""

    def __init__(self, width=8, poison=None):
        super().__init__(width, poison)
        critic = Critic(width)
        self.modules = {"generator": Generator(width, critic), "critic": critic}

    def phases(self):
        return (
            Phase("critic", "critic", repeats=5),
            Phase("generator", "generator"),
            Phase("penalty", "critic", every=16),
        )

    def averaged(self):
        return ("generator",)

    def shared(self, draws):
        return 0.1 * draws[1]


def still(width):
    """Two players without dropout, whose masks depend on the split of the batch."""
    objective = TwoPlayers(width)
    for module in objective.modules.values():
        module.net[2].p = 0.0
    return objective


def config_for(output, **changes):
    base = TrainConfig(
        data="toy",
        output=Path(output),
        max_steps=21,
        batch_size=2,
        learning_rate=1e-2,
        lr_schedule="cosine",
        warmup_steps=3,
        ema=0.95,
        checkpoint_every=4,
        keep=2,
        log_every=5,
        tracker="none",
    )
    return replace(base, **changes)


def train(config, objective, stop_in=None):
    """Run or resume; returns (exit code, objective)."""
    config.check()
    folder = RunFolder(config)
    folder.check(config)
    accelerator = make_accelerator(config)
    try:
        if accelerator.is_main_process:
            folder.prepare(config, dump(config))
        accelerator.wait_for_everyone()
        tracker = lambda start: make_tracker("none", folder.path, start, {})  # noqa: E731
        data = ToyData(config, stop_in)
        return Trainer(objective, data, config, accelerator, folder, tracker).run()
    finally:
        release_accelerator(accelerator)


if __name__ == "__main__":
    kind = {"one": ToyObjective, "two": TwoPlayers, "still": still}[sys.argv[2]]
    width, steps, every = map(int, sys.argv[3:6])
    rank = int(os.environ.get("RANK", "0"))
    # The second process may be told another folder, or to press Ctrl-C in some step.
    output = os.environ.get("OTHER_OUTPUT", sys.argv[1]) if rank == 1 else sys.argv[1]
    stop_in = int(os.environ.get("STOP_IN", -1)) if rank == 1 else None
    log_every = int(os.environ.get("LOG_EVERY", 1))
    settings = config_for(output, max_steps=steps, checkpoint_every=every, log_every=log_every)
    sys.exit(train(settings, kind(width), stop_in))
