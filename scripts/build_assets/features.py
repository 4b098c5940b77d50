"""Train the feature network of the embedded model: concept and style of a picture.

    OMP_NUM_THREADS=1 python scripts/build_assets/features.py --minutes 70

The same command resumes after an interruption. Writes the network and `metrics.json` to
`--output`; training state lies beside it, in `OUTPUT-state`.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from captions import heldout_pairs, read_concepts
from common import BACKGROUNDS, SIZE, STYLES, read_json
from torch import Tensor, nn

from diffkit.files import write_json
from diffkit.models.feature_network import FeatureNetwork, FeatureNetworkConfig

SHIPPED_WEIGHT = 4
SMALL_SHARE = 0.3
"""Share of the time that is spent on pictures of half the size, at four times the speed."""
SAVE_EVERY_SECONDS = 60.0
PALETTE = torch.tensor(list(BACKGROUNDS.values())) / 255
COLOURS = tuple(BACKGROUNDS)


@dataclass(frozen=True)
class Augmentation:
    """How far pictures are moved and recoloured; probabilities and half-ranges."""

    flip: float
    degrees: float
    scale: tuple[float, float]
    shift: float
    colour: float
    blur: float
    noise: float


STRONG = Augmentation(0.4, 15.0, (0.75, 1.2), 0.12, 0.3, 0.2, 0.03)
GRAY = 0.08
MOSAICS = 1 / 3


class Pictures:
    """All rendered pictures, and which (concept, style) pairs may be trained on."""

    def __init__(self, emoji: Path) -> None:
        rgba = torch.from_numpy(np.load(emoji / "rgba.npy"))
        self.concepts: list[dict[str, Any]] = read_json(emoji / "concepts.json")
        alpha = rgba[..., 3:].float() / 255
        premultiplied = torch.cat([(rgba[..., :3] * alpha).round(), rgba[..., 3:].float()], -1)
        self.rgba = premultiplied.to(torch.uint8).permute(0, 1, 4, 2, 3).contiguous()
        position = {concept["id"]: index for index, concept in enumerate(self.concepts)}
        self.heldout = torch.zeros(len(self.concepts), len(STYLES), dtype=torch.bool)
        self.words = read_concepts()
        for concept, style in heldout_pairs(list(self.words)):
            self.heldout[position[concept], STYLES.index(style)] = True
        self.shipped = torch.tensor([position[concept] for concept in self.words])

    def weights(self) -> Tensor:
        """How often each pair is drawn (C * S,): zero held out, more for shipped concepts."""
        weights = torch.ones(self.heldout.shape)
        weights[self.shipped] = SHIPPED_WEIGHT
        weights[self.heldout] = 0
        return weights.flatten()

    def draw(
        self, pairs: Tensor, background: Tensor, how: Augmentation, generator: torch.Generator
    ) -> Tensor:
        """Augmented pictures (B, 3, 64, 64) in [-1, 1] of flat pair numbers over backgrounds.

        Arguments:
            pairs: int64 (B,), concept * S + style.
            background: colours in [0, 1], (B, 3, 1, 1) or (B, 3, 64, 64).
        """
        rgba = self.rgba.flatten(0, 1)[pairs].float() / 255
        grid = F.affine_grid(affine(len(pairs), how, generator), list(rgba.shape), False)
        rgba = F.grid_sample(rgba, grid, align_corners=False)
        colour = recolour(rgba[:, :3], rgba[:, 3:], how.colour, generator)
        images = colour + (1 - rgba[:, 3:]) * background
        return degrade(images, how, generator).clamp(0, 1) * 2 - 1

    def plain(self, pairs: Tensor, colours: Tensor) -> Tensor:
        """Pictures (B, 3, 64, 64) in [-1, 1] as the data set holds them, over palette colours."""
        rgba = self.rgba.flatten(0, 1)[pairs].float() / 255
        return (rgba[:, :3] + (1 - rgba[:, 3:]) * PALETTE[colours][..., None, None]) * 2 - 1


def uniform(shape: tuple[int, ...], low: float, high: float, g: torch.Generator) -> Tensor:
    """Uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(shape, generator=g)


def affine(count: int, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Matrices (B, 2, 3) for `affine_grid`; one picture in five stays where it is."""
    angle = uniform((count,), -how.degrees, how.degrees, generator) * math.pi / 180
    scale = uniform((count,), *how.scale, generator)
    mirror = 1 - 2 * (torch.rand(count, generator=generator) < how.flip).float()
    shift = uniform((count, 2), -how.shift, how.shift, generator) * 2
    still = torch.rand(count, generator=generator) < 0.2
    angle, scale = angle.masked_fill(still, 0), scale.masked_fill(still, 1)
    mirror, shift = mirror.masked_fill(still, 1), shift.masked_fill(still[:, None], 0)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = torch.stack(
        [torch.stack([cos * mirror, -sin], -1), torch.stack([sin * mirror, cos], -1)], 1
    )
    return torch.cat([rows, shift[..., None]], -1)


def recolour(colour: Tensor, alpha: Tensor, strength: float, g: torch.Generator) -> Tensor:
    """Random contrast, saturation and tint of premultiplied colours (B, 3, H, W)."""
    if strength == 0:
        return colour
    count = len(colour)
    shape = (count, 1, 1, 1)
    gray = colour.mean(1, keepdim=True)
    saturation = uniform(shape, 1 - strength, 1 + strength, g)
    gain = uniform(shape, 1 - strength, 1 + strength, g)
    tint = uniform((count, 3, 1, 1), -strength / 3, strength / 3, g)
    saturation = saturation.masked_fill(torch.rand(shape, generator=g) < GRAY, 0)
    changed = (gray + (colour - gray) * saturation) * gain + tint * alpha
    kept = torch.rand(shape, generator=g) < 0.3
    return torch.where(kept, colour, changed.clamp_min(0).minimum(alpha))


def degrade(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Blur the first share of the batch by resizing, and add noise to another share."""
    blurred = int(len(images) * how.blur)
    size = int(torch.randint(32, 56, (1,), generator=generator))
    small = F.interpolate(images[:blurred], size, mode="bilinear", antialias=True)
    back = F.interpolate(small, images.shape[-1], mode="bilinear")
    images = torch.cat([back, images[blurred:]])
    level = uniform((len(images), 1, 1, 1), -how.noise, how.noise, generator).clamp_min(0)
    return images + level * torch.randn(images.shape, generator=generator)


def backgrounds(count: int, generator: torch.Generator) -> Tensor:
    """Palette colours, any colours and gradients, (B, 3, 64, 64) in [0, 1]."""
    palette = PALETTE[torch.randint(len(PALETTE), (count,), generator=generator)]
    anything = torch.rand(count, 3, generator=generator)
    named = torch.rand(count, 1, generator=generator) < 0.6
    first = torch.where(named, palette, anything)[..., None, None]
    first = first + 0.03 * torch.randn(first.shape, generator=generator)
    second = torch.rand(count, 3, 1, 1, generator=generator)
    direction = uniform((count, 2, 1, 1), -1, 1, generator)
    line = torch.linspace(-0.5, 0.5, 64)
    ramp = (0.5 + direction[:, :1] * line[:, None] + direction[:, 1:] * line).clamp(0, 1)
    graded = (torch.rand(count, 1, 1, 1, generator=generator) < 0.25).float()
    return first + graded * ramp * (second - first)


def train_step(
    network: FeatureNetwork,
    pictures: Pictures,
    weights: Tensor,
    shape: tuple[int, int],
    g: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of concept (smoothed) and style on one random batch, and the accuracy.

    Arguments:
        shape: number of pictures, and the edge they are shrunk to.
    """
    count, edge = shape
    pairs = torch.multinomial(weights, count, replacement=True, generator=g)
    images = pictures.draw(pairs, backgrounds(count, g), STRONG, g)
    if edge < SIZE:
        images = F.interpolate(images, edge, mode="bilinear", antialias=True)
    concept, style = pairs // len(STYLES), pairs % len(STYLES)
    whole = round(count * (1 - MOSAICS))
    tail, order = style[whole:].sort()
    images = torch.cat([images[:whole], mosaics(images[whole:][order], tail)])
    pooled = network.trunk.pooled(images.contiguous(memory_format=torch.channels_last))
    logits = network.heads(pooled)
    named = logits["concept"][:whole]
    loss = F.cross_entropy(named, concept[:whole], label_smoothing=0.1)
    loss = loss + F.cross_entropy(logits["style"], torch.cat([style[:whole], tail]))
    return loss, (named.argmax(-1) == concept[:whole]).float().mean()


def mosaics(images: Tensor, style: Tensor) -> Tensor:
    """Exchange three quarters of each picture for those of others in the same style.

    What remains common is the style, so that it is not learnt by knowing the picture.

    Arguments:
        images: pictures (B, 3, H, W) in the order of their style.
        style: int64 (B,), not decreasing.
    """
    half = images.shape[-1] // 2
    result = images.clone()
    quarters = (
        (slice(half), slice(half)),
        (slice(half), slice(half, None)),
        (slice(half, None), slice(half)),
    )
    for shift, (rows, columns) in enumerate(quarters, start=1):
        same = (style.roll(shift) == style)[:, None, None, None]
        other = images.roll(shift, 0)[..., rows, columns]
        result[..., rows, columns] = torch.where(same, other, images[..., rows, columns])
    return result


def share(right: Tensor) -> float:
    """The mean of booleans as a plain number."""
    return round(right.float().mean().item(), 4)


@torch.no_grad()
def evaluate(network: FeatureNetwork, pictures: Pictures) -> dict[str, Any]:
    """Accuracy on the held-out pictures over every palette colour, and on pictures seen."""
    network.eval()
    held = pictures.heldout.flatten().nonzero()[:, 0]
    seen = pictures.weights().nonzero()[:, 0]
    result: dict[str, Any] = {}
    for name, pairs in (("heldout", held), ("seen", seen)):
        repeat = len(PALETTE) if name == "heldout" else 1
        pairs = pairs.repeat_interleave(repeat)
        colours = torch.arange(len(pairs)) % len(PALETTE)
        parts = [
            network.classify(pictures.plain(p, c))
            for p, c in zip(pairs.split(256), colours.split(256), strict=True)
        ]
        concept = torch.cat([part["concept"] for part in parts])
        style = torch.cat([part["style"] for part in parts])
        truth = pairs // len(STYLES)
        result[name] = {
            "n": len(pairs),
            "pairs": len(pairs) // repeat,
            "concept_top1": share(concept.argmax(-1) == truth),
            "concept_top5": share((concept.topk(5).indices == truth[:, None]).any(-1)),
            "style_top1": share(style.argmax(-1) == pairs % len(STYLES)),
        }
        if name == "heldout":
            shipped = concept[:, pictures.shipped].argmax(-1)
            result[name]["concept_top1_among_shipped"] = share(pictures.shipped[shipped] == truth)
    network.train()
    return result


def rate(progress: float, step: int, peak: float) -> float:
    """Cosine learning rate over the time budget, after 200 warm-up steps."""
    return peak * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the training state whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)


@dataclass
class Budget:
    """Progress of a training bounded by processor time, carried over an interruption."""

    minutes: float
    elapsed: float = 0.0
    step: int = 0

    @property
    def progress(self) -> float:
        """Spent share of the budget."""
        return self.elapsed / (60 * self.minutes)


def optimizer_for(modules: nn.Module, decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels only."""
    parameters = list(modules.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


def train(
    modules: nn.Module, step: Any, budget: Budget, state: Path, peak: float, seed: int
) -> None:
    """Minimise `step(generator)[0]` until the budget is spent; resumes from `state`."""
    optimizer = optimizer_for(modules, 0.05)
    generator = torch.Generator().manual_seed(seed)
    if state.exists():
        saved = torch.load(state, weights_only=True)
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        budget.elapsed, budget.step = saved["elapsed"], saved["step"]
    modules.train()
    last_save, clock = budget.elapsed, time.process_time()
    while budget.progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate(budget.progress, budget.step, peak)
        loss, accuracy = step(generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 5.0)
        optimizer.step()
        now = time.process_time()
        budget.elapsed, clock, budget.step = budget.elapsed + now - clock, now, budget.step + 1
        if budget.step % 50 == 0:
            print(
                f"step {budget.step} {budget.elapsed:.0f} s loss {loss.item():.3f} "
                f"accuracy {accuracy.item():.3f}",
                flush=True,
            )
        if budget.elapsed - last_save > SAVE_EVERY_SECONDS or budget.progress >= 1:
            last_save = budget.elapsed
            parts = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
            counts = {"elapsed": budget.elapsed, "step": budget.step}
            save_state(state, {**parts, **counts, "generator": generator.get_state()})


def flags(description: str | None, output: str, minutes: float) -> argparse.ArgumentParser:
    """The flags that the scorer and the feature network share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--emoji", type=Path, default=Path(".build/emoji"))
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    args = flags(__doc__, ".build/features", 70.0).parse_args()
    torch.manual_seed(args.seed + 1)
    pictures = Pictures(args.emoji)
    names = tuple(concept["name"] for concept in pictures.concepts)
    network = FeatureNetwork(FeatureNetworkConfig(names, STYLES))
    network.to(memory_format=torch.channels_last)
    weights, budget = pictures.weights(), Budget(args.minutes)

    def step(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        edge = SIZE if budget.progress > SMALL_SHARE else SIZE // 2
        return train_step(network, pictures, weights, (args.batch, edge), generator)

    state = args.output.with_name(args.output.name + "-state") / "state.pt"
    train(network, step, budget, state, 3e-3, args.seed)
    network.save(args.output, overwrite=True)
    result = evaluate(FeatureNetwork.load(args.output), pictures)
    result |= {"seed": args.seed, "seconds": round(budget.elapsed), "steps": budget.step}
    result |= {"batch": args.batch, "classes": len(names), "threads": torch.get_num_threads()}
    write_json(args.output / "metrics.json", result)
    print(result)


if __name__ == "__main__":
    main()
