"""`diffkit protect` on one 512 px picture with the embedded model: seconds and processor seconds.

    OMP_NUM_THREADS=2 python scripts/bench/protect_command.py --runs 3 --output outputs/bench

The texture method in 50 steps on a CPU. Python and its libraries are started by the same command on
a small picture first; loading the model, measuring and saving are in the numbers. On a machine that
others use, the processor seconds (of all threads) say more than the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paired
import torch
from PIL import Image

from diffkit.cli import main as diffkit

SIDE = 512


def picture(side: int) -> Image.Image:
    """Smooth colours with some grain, the same at every call."""
    draws = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (8, 8, 3), generator=draws, dtype=torch.uint8)
    smooth = Image.fromarray(coarse.numpy()).resize((side, side), Image.Resampling.BICUBIC)
    grain = torch.randint(0, 256, (side, side, 3), generator=draws, dtype=torch.uint8)
    return Image.blend(smooth, Image.fromarray(grain.numpy()), 0.1)


def run_once(source: Path, output: Path, model: str, steps: int) -> dict[str, float]:
    """One command, from its words to its last line."""
    words = ["protect", source, "--output", output, "--model", model, "--method", "texture"]
    wall, processor = time.perf_counter(), time.process_time()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = diffkit([*map(str, words), "--steps", str(steps), "--device", "cpu"])
    if code != 0:
        raise SystemExit(said.getvalue())
    seconds = time.perf_counter() - wall
    return {"seconds": seconds, "processor_seconds": time.process_time() - processor}


def time_command(model: str = "embedded", steps: int = 50, runs: int = 3) -> dict[str, Any]:
    """All runs, after one on a small picture that loads what Python has to load."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        picture(64).save(place / "small.png")
        picture(SIDE).save(place / "picture.png")
        start = run_once(place / "small.png", place / "start", model, 1)
        rows = [
            run_once(place / "picture.png", place / str(number), model, steps)
            for number in range(runs)
        ]
    return {"side": SIDE, "steps": steps, "start": start, "runs": rows}


def main(argv: Sequence[str] | None = None) -> None:
    """Time the command; write OUTPUT/protect_command.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    args = parser.parse_args(argv)
    found = time_command(args.model, args.steps, args.runs)
    for row in found["runs"]:
        print(f"{row['seconds']:.1f} s, {row['processor_seconds']:.1f} s of the processor")
    paired.save(args.output / "protect_command.json", found)


if __name__ == "__main__":
    main()
