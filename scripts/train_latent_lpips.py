"""Train a LatentLPIPS network for the latents of any autoencoder.

    python scripts/train_latent_lpips.py --model embedded --data DATA --output OUTPUT

1. The trunk, VGG16 on latents, learns to tell what pictures show: their classes, or the words of
   their captions. 2. Its heads are calibrated: by least squares on a distance of pictures (the
   embedded feature network's, or LPIPS with --target lpips:vgg:FILE), on spoilt pictures of which
   the less spoilt is nearer (--heads order), on people's judgements (--heads people --bapps
   FOLDER), or by the one weight for all channels that fits the distance of pictures best (--heads
   none). OUTPUT gets config.json, model.safetensors and metrics.json.

Moments of the latents and the trunk's checkpoints lie beside it in OUTPUT-state: the same command
goes on from there, and other heads take the trunk that is there. It may be removed.

The published networks are `--width 64 --layout official --norm bn --size 512` on ImageNet, 100
epochs with SGD. VGG's own dense head (--dense) is for sets of that kind.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffkit.assets import path as asset
from latent_metric.heads import Pairs, Target, Triples, correlation, people, spoilt
from latent_metric.pictures import Pictures, made_of, moments
from latent_metric.trunk import TrunkSettings, train_trunk, trunk_folder

from diffkit.console import warn
from diffkit.errors import RunFailed, UserError
from diffkit.files import atomic_directory, check_writable, write_json
from diffkit.models.codec import Codec
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.perceptual.calibration import fit_heads, fit_ranking, set_heads, trunk_distance
from diffkit.perceptual.latent_classifier import LatentClassifier
from diffkit.perceptual.latent_lpips import LatentLpips, LatentLpipsConfig
from diffkit.perceptual.latent_lpips_io import save_latent_lpips
from diffkit.perceptual.lpips import load_lpips, lpips_name

PRIOR, EPOCHS = 0.01, 10


@torch.no_grad()
def recognised(network: LatentClassifier, pictures: Pictures, codec: Codec) -> float:
    """Of the k classes that a picture shows, how many are among its k likeliest: the mean share."""
    right = []
    rows = iter(pictures.present)
    for images in pictures.batches(1, 0, 16):
        logits = network(codec.encode(images.to(codec.device))).cpu()
        for scores, present in zip(logits, rows, strict=False):
            shown = int(present.sum())
            if shown:
                right.append(present[scores.topk(shown).indices].float().mean())
    return round(torch.stack(right).mean().item(), 4)


def pixel_target(spec: str, device: torch.device) -> tuple[Target, str]:
    """The distance of pictures that heads are fitted to, and what to call it."""
    if spec.startswith("lpips:"):
        lpips = load_lpips(spec.removeprefix("lpips:"), device)
        return lambda x, y: lpips(x, y).flatten(), lpips_name(spec.removeprefix("lpips:"))
    if spec != "embedded":
        raise UserError(f"--target {spec}: unknown; use embedded, lpips:vgg:FILE or lpips:vgg.")
    trunk = FeatureNetwork.load(asset("features")).trunk.to(device).eval()
    return lambda x, y: trunk_distance(trunk, x, y), "embedded feature network"


def calibrate(
    network: LatentLpips, pairs: Pairs, triples: Triples, judged: Triples | None, args: Any
) -> None:
    """Set the heads as `--heads` says."""
    start = fit_heads(pairs.rows, pairs.target, prior=1e6)  # the best common weight of all channels
    if args.heads == "distance":
        prior = PRIOR if args.prior is None else args.prior
        weights = fit_heads(pairs.rows, pairs.target, prior)
    elif args.heads in ("order", "people"):
        chosen = triples if judged is None else judged
        epochs = EPOCHS if args.epochs is None else args.epochs
        weights = fit_ranking(
            chosen.m0, chosen.m1, chosen.judge, start=start, epochs=epochs, seed=args.seed
        )
    else:
        weights = start
    set_heads(network, weights)


def judge(network: LatentLpips, pairs: Pairs, triples: Triples) -> dict[str, float]:
    """How the distance, a common weight and the squared difference of latents do on these pairs."""
    weights = torch.cat([head.detach().cpu() for head in network.heads])
    found, common = pairs.rows @ weights, pairs.rows.sum(1)
    return {
        "correlation": correlation(found, pairs.target),
        "rank_correlation": correlation(found, pairs.target, ranks=True),
        "rank_correlation_of_common_weights": correlation(common, pairs.target, ranks=True),
        "rank_correlation_of_squares": correlation(pairs.square, pairs.target, ranks=True),
        "order": triples.score(weights),
        "order_of_common_weights": triples.score(torch.ones_like(weights)),
        "channels_above_0": round((weights > 0).float().mean().item(), 4),
    }


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="embedded", help="whose autoencoder makes the latents")
    add("--data", type=Path, required=True, help="folder of pictures with classes or captions")
    add("--validation", type=Path, help="such a folder for the scores; without it --data's are")
    add("--output", type=Path, required=True)
    add("--label-column", help="of the metadata")
    add("--size", type=int, default=64, help="sides of the pictures, in pixels")
    add("--width", type=int, default=16, help="channels of the first stage; VGG16 has 64")
    add("--layout", choices=("official", "pre_pool"), default="pre_pool")
    add("--norm", choices=("bn", "gn", "none"), default="gn")
    add("--dense", action="store_true", help="VGG's dense head of the classifier")
    add("--augmentation", default="bg", help="the ensemble that the metric is meant for")
    add("--views", type=int, default=4, help="of each picture, encoded once")
    add("--steps", type=int, default=2000)
    add("--batch-size", type=int, default=32)
    add("--learning-rate", type=float, default=2e-3)
    add("--checkpoint-every", type=int, default=500, help="steps of the trunk")
    add("--heads", choices=("distance", "order", "people", "none"), default="distance")
    add("--target", default="embedded", help="embedded, lpips:vgg, lpips:vgg:FILE, lpips:alex...")
    add("--bapps", type=Path, help="folder of 2AFC triples, for --heads people")
    add("--pairs", type=int, default=2000, help="spoilt pictures for the heads")
    add("--prior", type=float, help=f"of --heads distance: pull to one weight, {PRIOR} by default")
    add("--epochs", type=int, help=f"of --heads order, people: over triples, {EPOCHS} by default")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--overwrite", action="store_true")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise `UserError` for flags that cannot work or do nothing, and for an output that exists."""
    if (args.heads == "people") != (args.bapps is not None):
        raise UserError("--bapps FOLDER and --heads people go together.")
    if args.prior is not None and args.heads != "distance":
        raise UserError(f"--prior: does nothing with --heads {args.heads}; leave it out.")
    if args.epochs is not None and args.heads not in ("order", "people"):
        raise UserError(f"--epochs: does nothing with --heads {args.heads}; leave it out.")
    for name in ("size", "width", "views", "steps", "batch_size", "checkpoint_every", "pairs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1.")
    if args.output.exists() and not (args.overwrite and args.output.is_dir()):
        raise UserError(f"{args.output}: exists already; choose another folder or add --overwrite.")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, calibrate, score and save; returns what metrics.json holds."""
    check(args)
    state = check_writable(args.output.with_name(args.output.name + "-state"))
    clock = time.monotonic()
    codec = LatentDiffusion.load(args.model, device=args.device).codec
    pictures = Pictures(args.data, args.size, args.label_column)
    tested = pictures
    if args.validation is not None:
        tested = Pictures(args.validation, args.size, args.label_column, pictures.classes)
    kept = moments(pictures, codec, args.views, args.seed, state / "moments.npy")
    config = LatentLpipsConfig(
        codec.channels, args.width, args.layout, args.norm, args.augmentation
    )
    how = TrunkSettings(args.steps, args.batch_size, args.learning_rate, args.dense, args.seed)
    told = made_of(pictures, codec, args.views, args.seed)
    folder = trunk_folder(state, told, pictures, config, how)
    classifier = train_trunk(pictures, kept, codec, config, how, folder, args.checkpoint_every)
    network = classifier.metric()
    target, name = pixel_target(args.target, codec.device)
    pairs, triples = spoilt(pictures, codec, network, target, args.pairs, args.seed)
    judged = None if args.bapps is None else people(args.bapps, codec, network, args.size)
    calibrate(network, pairs, triples, judged, args)
    if tested is pictures:
        warn("no --validation: the scores are those of pictures that were trained on")
    scores: dict[str, Any] = {"recognised": recognised(classifier, tested, codec)}
    scores |= judge(network, *spoilt(tested, codec, network, target, 640, args.seed + 1))
    scores |= {"seconds": round(time.monotonic() - clock), "heldout": tested is not pictures}
    scale, shift = codec.space()
    network.config.provenance.update(
        autoencoder=args.model if args.model == "embedded" else codec.fingerprint(),
        scale=scale,
        shift=shift,
        data=args.data.name,
        pictures=len(pictures),
        classes=len(pictures.classes),
        steps=args.steps,
        heads=args.heads,
        target=name if args.heads in ("distance", "none") else None,
        scores={key: scores[key] for key in ("recognised", "rank_correlation", "order")},
    )
    with atomic_directory(args.output, overwrite=args.overwrite) as place:
        save_latent_lpips(network, place, overwrite=True)
        write_json(place / "metrics.json", scores)
    return scores


def main(words: Sequence[str] | None = None) -> int:
    """`run` with these words (default: those of the process); returns the exit code."""
    args = flags().parse_args(words)
    try:
        scores = run(args)
    except (UserError, RunFailed) as error:
        print(f"train_latent_lpips: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("train_latent_lpips: interrupted; what was finished is kept.", file=sys.stderr)
        return 130
    for name, value in scores.items():
        print(f"{name.replace('_', ' ')}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
