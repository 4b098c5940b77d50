"""Train the perceptual distance of the embedded latents: a narrow LatentLPIPS network.

    OMP_NUM_THREADS=1 python scripts/build_assets/latent_lpips.py

Runs `scripts/train_latent_lpips.py` on the pictures of the embedded model, tries whether latents
that start from noise are pulled to a target by it, and puts the network into `assets/latent_lpips`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from diffkit.files import read_json, write_json
from diffkit.perceptual.latent_augment import draw
from diffkit.perceptual.latent_lpips import LatentLpips, e_latentlpips
from diffkit.perceptual.latent_lpips_io import load_latent_lpips

SCRIPT = Path(__file__).parents[1] / "train_latent_lpips.py"


def overfit(network: LatentLpips, kinds: str, seed: int, steps: int = 300, side: int = 16) -> float:
    """Mean squared error to a target after Adam (0.05) has lowered E-LatentLPIPS to it.

    The target is smooth noise (5x5, enlarged) plus 0.2 of white noise; the start is white noise,
    about 1.8 away. A distance that does not see some directions leaves them as they are or lets
    them grow.
    """
    g = torch.Generator().manual_seed(seed)
    channels = network.config.channels
    coarse = torch.randn((1, channels, 5, 5), generator=g)
    target = F.interpolate(coarse, (side, side), mode="bicubic")
    target = target + 0.2 * torch.randn(target.shape, generator=g)
    latents = torch.randn(target.shape, generator=g).requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        e_latentlpips(network, latents, target, draw(g, target.shape, kinds)).sum().backward()
        optimizer.step()
    return (latents.detach() - target).square().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".build/emoji/t2i-64"))
    parser.add_argument("--output", type=Path, default=Path(".build/latent_lpips"))
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--steps", type=int, default=1600)
    args = parser.parse_args()
    heldout = args.data.with_name(args.data.name + "-heldout")
    settings = {"data": args.data, "validation": heldout, "output": args.output}
    settings |= {"steps": args.steps}
    words = [f"--{key}={value}" for key, value in settings.items()]
    subprocess.run([sys.executable, SCRIPT, *words, "--overwrite"], check=True)
    network, metrics = load_latent_lpips(args.output), read_json(args.output / "metrics.json")
    for kinds in ("", "b", "bg"):
        errors = [round(overfit(network, kinds, seed), 3) for seed in range(4)]
        metrics[f"overfit_{kinds or 'plain'}"] = errors
    metrics |= {"steps": args.steps, "threads": torch.get_num_threads()}
    write_json(args.output / "metrics.json", metrics)
    print(metrics)
    shutil.copytree(args.output, args.assets / "latent_lpips", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
