"""Score a text-to-image model on the emoji captions: `python scripts/build_assets/gates.py`.

For every (concept, style) pair one caption with a background colour chosen by the pair's name, and
`--samples` pictures of it. Each is scored by the feature network (never called FID or CLIP), by the
nearest real picture of the set in pixels, and, for the background, by the palette colour nearest to
the picture's corners. Pairs held out of training are scored apart. Prints and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import stable_fraction
from PIL import Image
from torch import Tensor

from diffkit.console import progress, say
from diffkit.evaluation.metrics.captions import background_of
from diffkit.files import read_jsonl, write_json
from diffkit.generation.card import read_card
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.sampling import sample
from diffkit.randomness import normal


@dataclass(frozen=True)
class Pair:
    """One (concept, style) with the caption and background that it is asked for."""

    concept: str
    style: str
    background: str
    caption: str
    heldout: bool


def name_of(row: dict[str, Any]) -> str:
    """The concept's name as captions say it: the feature network's class."""
    name: str = row["text"][0].split(", ")[0]
    return name


def read_pairs(folder: Path, heldout: bool) -> list[Pair]:
    """One pair for each (concept, style) of a folder; the background is a function of its name."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in read_jsonl(folder / "metadata.jsonl"):
        captions = rows.setdefault((name_of(row), row["style"]), {})
        captions[row["background"]] = row["text"][0]
    pairs = []
    for (concept, style), captions in rows.items():
        names = sorted(captions)
        background = names[int(stable_fraction(f"{concept}/{style}") * len(names))]
        pairs.append(Pair(concept, style, background, captions[background], heldout))
    return pairs


def read_pictures(folder: Path) -> tuple[Tensor, list[dict[str, Any]]]:
    """All pictures of a folder, (N, 3, H, W) in [-1, 1], and their metadata rows."""
    rows = read_jsonl(folder / "metadata.jsonl")
    arrays = [np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1, rows


def generate(
    model: LatentDiffusion, pairs: list[Pair], samples: int, steps: int, guidance: float, batch: int
) -> Tensor:
    """Pictures (len(pairs) * samples, 3, H, W) in [-1, 1]; picture i starts from noise seed i."""
    size = model.default_size
    shape = model.latent_shape(size, size)
    captions = [pair.caption for pair in pairs for _ in range(samples)]
    null = model.conditioner.null(1, (size, size))
    images = []
    for start in progress(range(0, len(captions), batch), "generating"):
        texts = captions[start : start + batch]
        noise = torch.stack([normal(shape, start + i, "gates") for i in range(len(texts))])
        cond = model.conditioner.encode(texts, (size, size))
        latents = sample(
            model.denoiser,
            noise,
            cond,
            null.expand(len(texts)),
            steps=steps,
            guidance_scale=guidance,
        )
        with torch.no_grad():
            images.append(model.codec.decode(latents).clamp(-1, 1))
    return torch.cat(images)


def nearest(images: Tensor, real: Tensor) -> Tensor:
    """Index (B,) of the real picture with the least squared pixel distance."""
    return torch.cdist(images.flatten(1), real.flatten(1)).argmin(1)


def score(
    images: Tensor,
    pairs: list[Pair],
    samples: int,
    features: FeatureNetwork,
    real: tuple[Tensor, list[dict[str, Any]]],
) -> dict[str, float]:
    """Fractions in [0, 1] of pictures that show what their caption says."""
    wanted = [pair for pair in pairs for _ in range(samples)]
    concepts = sorted({name_of(row) for row in real[1]})
    styles = sorted({row["style"] for row in real[1]})
    with torch.no_grad():
        logits = features.classify(images)
    of_set = logits["concept"][:, features.concept_indices(concepts)]
    of_style = logits["style"][:, features.style_indices(styles)]
    truth = torch.tensor([concepts.index(pair.concept) for pair in wanted])
    style_truth = torch.tensor([styles.index(pair.style) for pair in wanted])
    top5 = (of_set.topk(5).indices == truth[:, None]).any(1)
    neighbours = [real[1][i] for i in nearest(images, real[0]).tolist()]
    grounds = background_of(images)

    def mean(hits: list[bool]) -> float:
        return float(np.mean(hits))

    return {
        "n": len(wanted),
        "concept": float((of_set.argmax(1) == truth).float().mean()),
        "concept_top5": float(top5.float().mean()),
        "style": float((of_style.argmax(1) == style_truth).float().mean()),
        "concept_nearest": mean(
            [name_of(row) == p.concept for row, p in zip(neighbours, wanted, strict=True)]
        ),
        "style_nearest": mean(
            [row["style"] == p.style for row, p in zip(neighbours, wanted, strict=True)]
        ),
        "background": mean([g == p.background for g, p in zip(grounds, wanted, strict=True)]),
    }


def sheet(images: Tensor, columns: int, path: Path) -> None:
    """One PNG of all pictures, `columns` a row."""
    rows = [torch.cat(list(row), -1) for row in images.split(columns) if len(row) == columns]
    pixels = ((torch.cat(rows, -2) + 1) * 127.5).round().clamp(0, 255).byte()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--features", type=Path, default=Path("assets/features"))
    parser.add_argument("--data", type=Path, default=Path(".build/emoji/t2i-128"))
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--steps", type=int, default=None, help="the model card's by default")
    parser.add_argument("--guidance", type=float, default=None, help="the model card's by default")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--every", type=int, default=1, help="score every n-th pair only")
    parser.add_argument("--output", type=Path, default=Path(".build/gates.json"))
    parser.add_argument("--sheet", type=Path, default=None, help="PNG with one picture a pair")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    start = time.perf_counter()
    model = LatentDiffusion.load(args.model)
    card = read_card(args.model)
    steps = args.steps or card.steps
    guidance = args.guidance or card.guidance(model.family.guidance_scale)
    features = FeatureNetwork.load(args.features).eval()
    heldout_folder = args.data.with_name(args.data.name + "-heldout")
    seen, heldout = read_pairs(args.data, False), read_pairs(heldout_folder, True)
    first, second = read_pictures(args.data), read_pictures(heldout_folder)
    real = torch.cat([first[0], second[0]]), first[1] + second[1]
    result: dict[str, object] = {
        "model": str(args.model),
        "data": args.data.name,
        "samples_per_caption": args.samples,
        "steps": steps,
        "guidance_scale": guidance,
        "seed": "picture i from noise address (i, 'gates')",
        "extractor": "diffkit feature network",
    }
    for name, pairs in (("trained_pairs", seen[:: args.every]), ("heldout_pairs", heldout)):
        images = generate(model, pairs, args.samples, steps, guidance, args.batch_size)
        result[name] = score(images, pairs, args.samples, features, real)
        if args.sheet is not None:
            sheet(images[:: args.samples], 16, args.sheet.with_stem(f"{args.sheet.stem}-{name}"))
    result["seconds"] = round(time.perf_counter() - start, 1)
    write_json(args.output, result)
    say(f"wrote {args.output}")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
