"""Train the feature network of the embedded model: concept and style of a picture.

    OMP_NUM_THREADS=1 python scripts/build_assets/features.py --output .build/features1
    OMP_NUM_THREADS=1 python scripts/build_assets/features.py --start .build/features1 --minutes 40

The first command learns from the four styles alone, the second goes on with the further drawings
too. The same command resumes after an interruption. Writes the network and `metrics.json` to
`--output`; training state lies beside it, in `OUTPUT-state`.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from augmentation import PALETTE, Augmentation, backgrounds
from autoencoder import Muon
from common import SIZE, STYLES
from drawings import NEAR, Drawings
from torch import Tensor, nn

from diffkit.files import write_json
from diffkit.models.feature_network import FeatureNetwork, FeatureNetworkConfig

SAVE_EVERY_SECONDS = 60.0
RESAMPLES = 2000


@dataclass(frozen=True)
class Stage:
    """One of the two trainings.

    Arguments:
        edges: the edge of the pictures until a share of the time; small ones are cheap.
        mosaics: the share of the pictures that are mosaics, which teach the style alone.
        further: whether the further drawings take part, which teach the concept alone.
        muon: peak rate of Muon for the convolutions, or 0 to train all with AdamW.
        adam: peak rate of AdamW.
    """

    edges: tuple[tuple[float, int], ...]
    augmentation: Augmentation
    mosaics: float
    further: bool
    muon: float
    adam: float


FIRST = Stage(
    ((0.3, 32), (1.0, SIZE)),
    Augmentation(0.4, 15.0, (0.75, 1.2), 0.12, 0.3, 0.2, 0.03),
    mosaics=1 / 3,
    further=False,
    muon=0.0,
    adam=3e-3,
)
SECOND = Stage(
    ((0.5, 48), (1.0, SIZE)),
    Augmentation(0.4, 15.0, (0.75, 1.2), 0.12, 0.35, 0.2, 0.03, shear=0.15, erase=0.2),
    mosaics=0.2,
    further=True,
    muon=0.02,
    adam=1e-3,
)


class Unit(Muon):
    """Muon that keeps each weight at the Frobenius norm of its square root of rows.

    Batch normalisation follows these convolutions, so that their scale means nothing, and the
    rate alone says how far a step turns them.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every weight."""
        super().step()
        for group in self.param_groups:
            for weight in group["params"]:
                weight.mul_(len(weight) ** 0.5 / weight.norm())


def optimizers_for(network: FeatureNetwork, stage: Stage) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the convolutions that a normalisation follows and AdamW for all else."""
    turned = [
        weight
        for name, weight in network.named_parameters()
        if stage.muon and weight.ndim == 4 and "shortcut" not in name
    ]
    chosen = {id(weight) for weight in turned}
    rest = [weight for weight in network.parameters() if id(weight) not in chosen]
    muon: list[torch.optim.Optimizer] = [Unit(turned, lr=stage.muon)] if turned else []
    return [*muon, adamw(rest, stage.adam)]


def adamw(parameters: list[nn.Parameter], peak: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and kernels only."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))


def train_step(
    network: FeatureNetwork,
    drawings: Drawings,
    weights: Tensor,
    stage: Stage,
    shape: tuple[int, int],
    g: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of concept (smoothed) and style on one random batch, and the accuracy.

    Arguments:
        shape: number of pictures, and their edge.
    """
    count, edge = shape
    mixed = round(count * stage.mosaics)
    whole = count - mixed
    styled = weights * (drawings.style >= 0)
    rows = torch.cat(
        [
            torch.multinomial(weights, whole, replacement=True, generator=g),
            torch.multinomial(styled, mixed, replacement=True, generator=g),
        ]
    )
    images = drawings.draw(rows, backgrounds(count, edge, g), stage.augmentation, g, edge)
    concept, style = drawings.concept[rows[:whole]], drawings.style[rows]
    tail, order = style[whole:].sort()
    images = torch.cat([images[:whole], mosaics(images[whole:][order], tail)])
    pooled = network.trunk.pooled(images.contiguous(memory_format=torch.channels_last))
    logits = network.heads(pooled)
    named = logits["concept"][:whole]
    loss = F.cross_entropy(named, concept, label_smoothing=0.1)
    target = torch.cat([style[:whole], tail])
    loss = loss + F.cross_entropy(logits["style"], target, ignore_index=-1)
    return loss, (named.argmax(-1) == concept).float().mean()


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


def interval(right: Tensor, size: int) -> list[float]:
    """95 % bootstrap interval of the mean of booleans, which are drawn in blocks of `size`."""
    g = torch.Generator().manual_seed(0)
    blocks = right.float().view(-1, size).mean(-1)
    picks = torch.randint(len(blocks), (RESAMPLES, len(blocks)), generator=g)
    ends = blocks[picks].mean(-1).quantile(torch.tensor([0.025, 0.975]))
    return [round(end, 4) for end in ends.tolist()]


@torch.no_grad()
def scores(
    network: FeatureNetwork, drawings: Drawings, rows: Tensor, colours: Tensor
) -> dict[str, Any]:
    """Accuracies on the drawings `rows`, each over all palette colours `colours` (K,).

    Intervals are of 95 %, by drawing. `among_shipped` chooses among the shipped concepts alone.
    """
    every = rows.repeat_interleave(len(colours))
    over = colours.repeat(len(rows))
    parts = [
        network.classify(drawings.plain(r, c))
        for r, c in zip(every.split(256), over.split(256), strict=True)
    ]
    concept = torch.cat([part["concept"] for part in parts])
    truth, style = drawings.concept[every], drawings.style[every]
    right = concept.argmax(-1) == truth
    shipped = torch.isin(truth, drawings.shipped)
    among = drawings.shipped[concept[:, drawings.shipped].argmax(-1)] == truth
    result: dict[str, Any] = {
        "n": len(every),
        "pairs": len(rows),
        "concept_top1": share(right),
        "concept_top1_interval": interval(right, len(colours)),
        "concept_top5": share((concept.topk(5).indices == truth[:, None]).any(-1)),
        "shipped_pairs": int(shipped.sum()) // len(colours),
        "concept_top1_of_shipped": share(right[shipped]),
        "concept_top1_among_shipped": share(among[shipped]),
        "concept_top1_among_shipped_interval": interval(among[shipped], len(colours)),
    }
    if bool((style >= 0).all()):
        drawn = torch.cat([part["style"] for part in parts]).argmax(-1)
        result["style_top1"] = share(drawn == style)
        result["concept_top1_by_style"] = {
            name: share(right[style == index]) for index, name in enumerate(STYLES)
        }
    return result


@torch.no_grad()
def spread(network: FeatureNetwork, drawings: Drawings) -> dict[str, float]:
    """How many dimensions the features of the four styles' pictures fill.

    With the eigenvalues l of their covariance: (sum l)^2 / sum l^2, exp of the entropy of l / sum
    l, and how many of the largest hold 99 % of the sum.
    """
    rows = torch.arange(drawings.heldout.numel())
    colours = rows % len(PALETTE)
    parts = [
        network.features(drawings.plain(r, c)).double()
        for r, c in zip(rows.split(256), colours.split(256), strict=True)
    ]
    values = torch.linalg.eigvalsh(torch.cat(parts).T.cov()).flip(0).clamp_min(0)
    p = values / values.sum()
    return {
        "size": len(p),
        "participation_ratio": round(1 / p.square().sum().item(), 1),
        "effective_rank": round(p.mul(-1).mul(p.clamp_min(1e-12).log()).sum().exp().item(), 1),
        "for_99_percent": int((p.cumsum(0) < 0.99).sum()) + 1,
    }


def evaluate(network: FeatureNetwork, drawings: Drawings) -> dict[str, Any]:
    """Scores on the held-out drawings over every palette colour, and on one colour of those seen.

    `heldout` are the pairs that no network of the model saw, `further` the held-out drawings of
    other artists, `larger` both, and `larger_without_near_copies` those of `larger` whose nearest
    trained drawing of the same concept is not a near-copy.
    """
    network.eval()
    colours = torch.arange(len(PALETTE))
    larger = drawings.tested.nonzero()[:, 0]
    held = drawings.style[larger] >= 0
    apart = drawings.nearest >= NEAR
    seen = ((drawings.style >= 0) & ~drawings.tested).nonzero()[:, 0]
    result: dict[str, Any] = {
        "heldout": scores(network, drawings, larger[held], colours),
        "heldout_without_near_copies": scores(network, drawings, larger[held & apart], colours),
        "further": scores(network, drawings, larger[~held], colours),
        "larger": scores(network, drawings, larger, colours),
        "larger_without_near_copies": scores(network, drawings, larger[apart], colours),
        "seen": scores(network, drawings, seen, colours[:1]),
        "features": spread(network, drawings),
        "drawings": int((~drawings.left_out).sum()),
    }
    network.train()
    return result


def rate(progress: float, step: int) -> float:
    """Cosine learning rate over the time budget, after 200 warm-up steps; 1 at its peak."""
    return min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


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


def train(
    modules: nn.Module,
    step: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    budget: Budget,
    state: Path,
    optimizers: list[torch.optim.Optimizer],
    seed: int,
) -> None:
    """Minimise `step(generator)[0]` until the budget is spent; resumes from `state`.

    The rates that the optimizers come with are their peaks.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    generator = torch.Generator().manual_seed(seed)
    if state.exists():
        saved = torch.load(state, weights_only=True)
        modules.load_state_dict(saved["modules"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        generator.set_state(saved["generator"])
        budget.elapsed, budget.step = saved["elapsed"], saved["step"]
    modules.train()
    last_save, clock = budget.elapsed, time.process_time()
    while budget.progress < 1:
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * rate(budget.progress, budget.step)
        loss, accuracy = step(generator)
        modules.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 5.0)
        for optimizer in optimizers:
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
            counts = {"elapsed": budget.elapsed, "step": budget.step}
            parts = {
                "modules": modules.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "generator": generator.get_state(),
            }
            save_state(state, {**parts, **counts})


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
    parser = flags(__doc__, ".build/features", 70.0)
    parser.add_argument("--start", type=Path, help="a first network: go on with more drawings")
    args = parser.parse_args()
    torch.manual_seed(args.seed + 1)
    drawings = Drawings(args.emoji)
    names = tuple(concept["name"] for concept in drawings.concepts)
    stage = SECOND if args.start else FIRST
    network = FeatureNetwork(FeatureNetworkConfig(names, STYLES))
    if args.start:
        network = FeatureNetwork.load(args.start)
    network.to(memory_format=torch.channels_last)
    weights, budget = drawings.concept_weights(stage.further), Budget(args.minutes)

    def step(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        edge = next(edge for until, edge in stage.edges if budget.progress < until)
        return train_step(network, drawings, weights, stage, (args.batch, edge), generator)

    state = args.output.with_name(args.output.name + "-state") / "state.pt"
    train(network, step, budget, state, optimizers_for(network, stage), args.seed)
    network.save(args.output, overwrite=True)
    result = evaluate(FeatureNetwork.load(args.output), drawings)
    result |= {"seed": args.seed, "seconds": round(budget.elapsed), "steps": budget.step}
    result |= {"batch": args.batch, "classes": len(names), "threads": torch.get_num_threads()}
    write_json(args.output / "metrics.json", result)
    print(result)


if __name__ == "__main__":
    main()
