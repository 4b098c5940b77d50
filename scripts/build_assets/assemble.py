"""Put the trained parts into `assets/`: `python scripts/build_assets/assemble.py`.

Weights are stored in fp16 safetensors. `assets/sample` holds the (concept, style) pairs that no
training saw. The model's card names the guidance scale and the steps that `gates.py` measured.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from gates import read_pairs

from diffkit.files import atomic_directory, read_jsonl, write_json
from diffkit.models.classes import CARD_NAME
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.text_image_scorer import TextImageScorer

EXAMPLES = 16  # prompts on the demo page
STRIDE = 13  # prime to the 15 pairs that four concepts have, so that the styles take turns


def write_model(source: Path, target: Path, data: Path, guidance: float, steps: int) -> None:
    """The pipeline in fp16 with its card."""
    model = LatentDiffusion.load(source, dtype=torch.float16)
    model.save(target, overwrite=True)
    pairs = read_pairs(data, heldout=False)
    spread = pairs[::STRIDE][:EXAMPLES]
    card = {
        "guidance_scale": guidance,
        "steps": steps,
        "example_prompts": [pair.caption for pair in spread],
    }
    write_json(target / CARD_NAME, card)


def write_sample(heldout: Path, target: Path) -> None:
    """The held-out pairs as a training folder: pictures and metadata.jsonl."""
    with atomic_directory(target, overwrite=True) as place:
        for row in read_jsonl(heldout / "metadata.jsonl"):
            shutil.copyfile(heldout / row["file_name"], place / row["file_name"])
        shutil.copyfile(heldout / "metadata.jsonl", place / "metadata.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=Path(".build"))
    parser.add_argument("--model", type=Path, default=Path(".build/unet/model"))
    parser.add_argument("--data", type=Path, default=Path(".build/emoji/t2i-128"))
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--guidance", type=float, required=True)
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()
    write_model(args.model, args.assets / "model", args.data, args.guidance, args.steps)
    write_sample(args.data.with_name(args.data.name + "-heldout"), args.assets / "sample")
    features = FeatureNetwork.load(args.build / "features")
    features.save(args.assets / "features", overwrite=True)
    scorer = TextImageScorer.load(args.build / "scorer")
    scorer.save(args.assets / "scorer", overwrite=True)
    for name in ("features", "scorer"):
        shutil.copyfile(args.build / name / "metrics.json", args.assets / name / "metrics.json")
    for folder in ("model", "features", "scorer", "sample"):
        size = sum(f.stat().st_size for f in (args.assets / folder).rglob("*") if f.is_file())
        print(f"{folder}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
