"""Train the f=4 autoencoder of the embedded model on rendered emoji.

    OMP_NUM_THREADS=3 python scripts/build_assets/autoencoder.py --minutes 32

The same command resumes after an interruption. `--decoder-only` goes on with the decoder alone,
so that latents made before stay valid.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import BACKGROUNDS, SIZE, composite, read_json
from diffusers import AutoencoderKL
from torch import Tensor

MAX_SHIFT = 6
KL_WEIGHT = 1e-5
L1_WEIGHT = 0.05
GRADIENT_WEIGHT = 0.05
MUON_RATE = 0.01
ADAM_RATE = 2e-3
DECODER_ONLY_SCALE = 0.3
"""Learning rates of `--decoder-only` relative to those of the first training."""
EMA_DECAY = 0.998
SAVE_EVERY_SECONDS = 60.0
LOGGED = 5
"""The log scores one held-out picture in five: prime to the 4 styles, so all take part."""
PALETTE = list(BACKGROUNDS.values())


def build(latent_channels: int, widths: tuple[int, ...]) -> AutoencoderKL:
    """An untrained autoencoder: 64x64x3 -> 16x16xlatent_channels, no attention in the middle."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


@dataclass
class Pictures:
    """Training pictures, and the held-out concepts over the palette."""

    train: Tensor  # uint8 (N, 4, 64, 64), straight alpha
    heldout: Tensor  # float32 (M, 3, 64, 64) in [-1, 1]


def load_pictures(folder: Path) -> Pictures:
    """Split `rgba.npy` by the `vae_heldout` mark of each concept."""
    rgba = np.load(folder / "rgba.npy")
    mark = np.array([concept["vae_heldout"] for concept in read_json(folder / "concepts.json")])
    train = torch.from_numpy(rgba[~mark].reshape(-1, SIZE, SIZE, 4)).permute(0, 3, 1, 2)
    held = rgba[mark].reshape(-1, SIZE, SIZE, 4)
    opaque = [composite(one, PALETTE[i * 5 % 8]) for i, one in enumerate(held)]
    heldout = torch.from_numpy(np.stack(opaque)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Pictures(train.contiguous(), heldout)


def draw(pictures: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """A random batch in [-1, 1]: random flips, shifts and backgrounds.

    Three backgrounds in four are palette colours with a little jitter, the rest any colour.
    """
    index = torch.randint(len(pictures), (batch,), generator=generator)
    flips = torch.rand(batch, generator=generator) < 0.5
    moves = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (batch, 2), generator=generator)
    padded = F.pad(pictures[index], (MAX_SHIFT,) * 4)
    rows = []
    for one, flip, (dy, dx) in zip(
        padded, flips.tolist(), (moves + MAX_SHIFT).tolist(), strict=True
    ):
        crop = one[:, dy : dy + SIZE, dx : dx + SIZE]
        rows.append(crop.flip(-1) if flip else crop)
    rgba = torch.stack(rows).float() / 255
    palette = torch.tensor(PALETTE)[torch.randint(len(PALETTE), (batch,), generator=generator)]
    jitter = 0.02 * torch.randn(batch, 3, generator=generator)
    anything = torch.rand(batch, 3, generator=generator)
    named = torch.rand(batch, 1, generator=generator) < 0.75
    colour = torch.where(named, (palette / 255 + jitter).clamp(0, 1), anything)[..., None, None]
    return (rgba[:, 3:] * rgba[:, :3] + (1 - rgba[:, 3:]) * colour) * 2 - 1


def loss_of(model: AutoencoderKL, x: Tensor, generator: torch.Generator) -> Tensor:
    """Squared, absolute and gradient error of the reconstruction, and a light KL term."""
    posterior = model.encode(x).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    error = model.decode(posterior.mean + posterior.std * noise).sample - x
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    loss: Tensor = (
        error.square().mean()
        + L1_WEIGHT * error.abs().mean()
        + GRADIENT_WEIGHT * gradient
        + KL_WEIGHT * kl
    )
    return loss


@torch.no_grad()
def psnr(model: AutoencoderKL, pictures: Tensor) -> tuple[float, float]:
    """Reconstruction quality in dB: of the mean squared error, and the mean over pictures."""
    errors = []
    for x in pictures.split(64):
        y = model.decode(model.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((y - x).square().mean((1, 2, 3)))
    mse = torch.cat(errors)
    return 10 * math.log10(4 / mse.mean().item()), (10 * (4 / mse).log10()).mean().item()


class Muon(torch.optim.Optimizer):
    """Momentum whose update for each convolution is the nearest (semi-)orthogonal matrix.

    For a weight of shape (out, in, kh, kw), flattened to G of shape (out, in kh kw):
    `W <- W - lr max(1, rows / columns)^0.5 NS(G + beta m)`, where m is the momentum and NS five
    quintic Newton-Schulz steps. Source: https://kellerjordan.github.io/posts/muon/
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, beta: float = 0.95):
        super().__init__(parameters, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every weight."""
        for group in self.param_groups:
            beta = group["beta"]
            for weight in group["params"]:
                memory = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                memory.mul_(beta).add_(weight.grad)
                update = orthogonalised((weight.grad + beta * memory).flatten(1))
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                weight.add_(update.view_as(weight), alpha=-group["lr"] * scale)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Roughly `U V^T` of the singular value decomposition, by Newton-Schulz iteration."""
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def optimizers(model: AutoencoderKL, scale: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner convolutions, AdamW for the first and last layers, norms and biases."""
    inner: list[torch.nn.Parameter] = []
    outer: list[torch.nn.Parameter] = []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            ends = "conv_in" in name or "conv_out" in name or "quant_conv" in name
            (outer if ends or weight.ndim < 4 else inner).append(weight)
    adam = torch.optim.AdamW(outer, lr=ADAM_RATE * scale, betas=(0.9, 0.99), weight_decay=0.0)
    return [Muon(inner, lr=MUON_RATE * scale), adam]


@dataclass
class Training:
    """Everything that one run changes, so that a checkpoint is this object's `state`."""

    model: AutoencoderKL
    scale: float = 1.0
    step: int = 0
    seconds: float = 0.0
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizers = optimizers(self.model, self.scale)
        self.rates = [one.param_groups[0]["lr"] for one in self.optimizers]

    def update(self, x: Tensor, progress: float) -> Tensor:
        """One step at the cosine rate of `progress` in [0, 1]; returns the loss, detached."""
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * progress))
            optimizer.zero_grad()
        loss = loss_of(self.model, x, self.generator)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 9))
        pairs = zip(self.ema.parameters(), self.model.parameters(), strict=True)
        for average, weight in pairs:
            average.lerp_(weight.detach(), 1 - decay)
        return loss.detach()

    def state(self) -> dict[str, Any]:
        """The checkpoint."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [one.state_dict() for one in self.optimizers],
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for one, saved in zip(self.optimizers, state["optimizers"], strict=True):
            one.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.step, self.seconds = state["step"], state["seconds"]


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a crash leaves the old one or the new one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def train(training: Training, pictures: Pictures, minutes: float, batch: int, path: Path) -> None:
    """Run until `minutes` of training time are spent, a checkpoint and a log line a minute."""
    if path.exists():
        training.restore(torch.load(path, weights_only=True))
    while training.seconds < 60 * minutes:
        started, first = time.perf_counter(), training.step
        total = torch.zeros(())
        while (spent := time.perf_counter() - started) < SAVE_EVERY_SECONDS:
            progress = min(1.0, (training.seconds + spent) / (60 * minutes))
            total += training.update(draw(pictures.train, batch, training.generator), progress)
            if progress == 1:
                break
        training.seconds += time.perf_counter() - started
        save(training.state(), path)
        steps = training.step - first
        quality, by_picture = psnr(training.ema, pictures.heldout[::LOGGED])
        print(
            f"minute {training.seconds / 60:5.1f}  step {training.step:6d}  "
            f"{1000 * (time.perf_counter() - started) / steps:4.0f} ms/step  "
            f"loss {(total / steps).item():.5f}  held-out {quality:.2f} dB "
            f"(mean of pictures {by_picture:.2f})",
            flush=True,
        )


@torch.no_grad()
def latent_moments(model: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel over random training batches."""
    generator = torch.Generator().manual_seed(1)
    batches = [draw(pictures, 64, generator) for _ in range(32)]
    latents = torch.cat([model.encode(x).latent_dist.mode() for x in batches]).double()
    return latents.mean((0, 2, 3)), latents.std((0, 2, 3))


@torch.no_grad()
def standardise(model: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Give every latent channel mean 0 and deviation 1 by rewriting the two 1x1 convolutions.

    `z' = (z - mean) / std` goes into `quant_conv` (for the log-variance: `- 2 log std`) and
    `z = std z' + mean` into `post_quant_conv`, so reconstructions do not change.
    """
    channels = len(mean)
    into, out = model.quant_conv, model.post_quant_conv
    mean, std = mean.to(into.weight.dtype), std.to(into.weight.dtype)
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]


def rounded(values: Tensor) -> list[float]:
    """For printing."""
    return [round(value, 3) for value in values.tolist()]


def publish(model: AutoencoderKL, folder: Path) -> None:
    """Save in diffusers' format; the folder changes only when everything is written."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".build/emoji"))
    parser.add_argument("--output", type=Path, default=Path(".build/vae"))
    parser.add_argument("--minutes", type=float, default=32.0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--latent-channels", type=int, default=8)
    parser.add_argument("--widths", type=int, nargs=3, default=(16, 32, 64))
    parser.add_argument("--decoder-only", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    pictures = load_pictures(args.data)
    if args.decoder_only:
        model = AutoencoderKL.from_pretrained(args.output)
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
        training, name = Training(model, scale=DECODER_ONLY_SCALE), "decoder"
    else:
        model = build(args.latent_channels, tuple(args.widths))
        training, name = Training(model), "autoencoder"
    checkpoint = args.output.with_name(f"{args.output.name}-{name}.pt")
    train(training, pictures, args.minutes, args.batch_size, checkpoint)
    if not args.decoder_only:
        mean, std = latent_moments(training.ema, pictures.train)
        print("latent channels: mean", rounded(mean), "deviation", rounded(std))
        standardise(training.ema, mean, std)
        training.ema.register_to_config(scaling_factor=1.0)
    publish(training.ema, args.output)
    quality, by_picture = psnr(training.ema, pictures.heldout)
    print(f"held-out concepts: {quality:.2f} dB (mean of pictures {by_picture:.2f})")


if __name__ == "__main__":
    main()
