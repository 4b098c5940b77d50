"""Memory and speed of streaming pictures from disk through the embedded feature network.

    python scripts/bench/evaluation.py --output outputs/bench

Makes small PNGs, then streams a small and a large number of them, each in a process of its own:
listing, features, reading every row, moments, the reference file. The growth of the peak resident
memory should stay below (large - small) * d * 4 bytes, the features themselves, and a slack of
8 MiB for the list of files. Prints the result and writes OUTPUT/evaluation.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffkit.console import set_quiet
from diffkit.files import write_json

SLACK = 8 * 2**20


def make_pictures(folder: Path, count: int, edge: int) -> None:
    """`count` PNGs of smooth colour gradients, each another one."""
    folder.mkdir()
    ramp = np.linspace(0, 1, edge)

    def make(index: int) -> None:
        low, high, tilt = np.random.default_rng(index).uniform(0, 255, (3, 3))
        pixels = low + (high - low) * ramp[:, None, None] + (tilt - low) / 2 * ramp[:, None]
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{index:06}.png", compress_level=1)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, range(count)))


def stream(folder: Path, num: int, batch_size: int) -> dict[str, Any]:
    """What an evaluation does to a folder of real pictures, measured in this process."""
    from diffkit.evaluation.extractors import load_extractor
    from diffkit.evaluation.features import stream_features
    from diffkit.evaluation.pictures import PictureSet
    from diffkit.evaluation.reference import Reference

    set_quiet(True)
    extractor = load_extractor("embedded")
    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        pictures = PictureSet.open(folder, num=num)
        opened = time.perf_counter() - start
        features = stream_features(pictures, extractor, Path(scratch) / "f.f32", batch_size)
        seconds = time.perf_counter() - start
        reference = Reference.of(features, extractor, pictures.resize, str(folder))
        reference.save(Path(scratch) / "reference.safetensors")
    return {
        "n": len(pictures),
        "dim": extractor.dim,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds_listing": round(opened, 2),
        "seconds": round(seconds, 2),
    }


def in_child(folder: Path, num: int, batch_size: int) -> dict[str, Any]:
    """The same in a fresh process."""
    options = ["--stream", str(folder), "--num", str(num), "--batch-size", str(batch_size)]
    done = subprocess.run(
        [sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def compare(small: int, large: int, edge: int, batch_size: int) -> dict[str, Any]:
    """Both numbers of pictures, and the growth of memory beside what it may be."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "pictures"
        make_pictures(folder, large, edge)
        # The small one sees a folder of its own: listing a large folder costs memory too.
        few = Path(scratch) / "few"
        few.mkdir()
        for file in sorted(folder.iterdir())[:small]:
            (few / file.name).symlink_to(file)
        runs = [in_child(few, small, batch_size), in_child(folder, large, batch_size)]
    growth = runs[1]["peak_bytes"] - runs[0]["peak_bytes"]
    features = (large - small) * runs[0]["dim"] * 4
    return {
        "edge": edge,
        "batch_size": batch_size,
        "runs": runs,
        "growth_bytes": growth,
        "features_bytes": features,
        "slack_bytes": SLACK,
        "within": growth <= features + SLACK,
        "pictures_per_second": round(large / runs[1]["seconds"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--small", type=int, default=2000)
    parser.add_argument("--large", type=int, default=20000)
    parser.add_argument("--edge", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--stream", type=Path, help="measure this folder in this process")
    parser.add_argument("--num", type=int, help="of its pictures")
    args = parser.parse_args()
    if args.stream is not None:
        print(json.dumps(stream(args.stream, args.num, args.batch_size)))
        return
    result = compare(args.small, args.large, args.edge, args.batch_size)
    write_json(args.output / "evaluation.json", result)
    mib = 2**20
    for run in result["runs"]:
        print(f"{run['n']:6} pictures: peak {run['peak_bytes'] / mib:7.1f} MiB, {run['seconds']} s")
    print(
        f"growth {result['growth_bytes'] / mib:.1f} MiB; features alone "
        f"{result['features_bytes'] / mib:.1f} MiB, allowed slack {SLACK / mib:.0f} MiB; "
        f"{result['pictures_per_second']} pictures/s"
    )


if __name__ == "__main__":
    main()
