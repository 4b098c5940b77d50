"""Our training loop beside a plain one that does what diffusers' text-to-image script does.

    python scripts/bench/training.py --output outputs/bench

Same model, pictures, order, batch, precision and optimizer settings, block by block in one run.
First both loops get the same noise and their losses are compared; then each draws its own way and
is timed: without caches, and with our cached latents and embeddings. Last, each loop runs alone in
a process of its own for its peak memory. Prints one line a result and writes OUTPUT/training.json.

With caches the encoders' time should go: the speed should reach 0.9 (1 + t_encode / t_step), where
t_encode is the plain loop's time for the encoders and t_step for the rest of its step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import paired
import synthetic
import torch
import transformers
from plain_loop import PlainLoop

from diffkit.console import set_quiet
from diffkit.data.loader import TrainingData
from diffkit.files import read_jsonl
from diffkit.objectives.denoising import DenoisingConfig
from diffkit.randomness import SampleKeys
from diffkit.training.configfile import dump
from diffkit.training.denoising import DenoisingTraining
from diffkit.training.devices import make_accelerator, release_accelerator
from diffkit.training.folder import RunFolder
from diffkit.training.launch import build_data, build_model, build_objective, fill_caches
from diffkit.training.trackers import make_tracker
from diffkit.training.trainer import Trainer


@dataclass(frozen=True)
class Setting:
    """What is trained and how it is measured."""

    model: str
    data: str
    scratch: str
    batch: int
    precision: Any
    workers: int
    pairs: int
    block: int

    def config(self, name: str, steps: int, cached: bool) -> DenoisingTraining:
        """Our configuration of a run of `steps` steps."""
        return DenoisingTraining(
            data=self.data,
            output=Path(self.scratch) / name,
            model=self.model,
            max_steps=steps,
            batch_size=self.batch,
            mixed_precision=self.precision,
            workers=self.workers,
            cache_latents=cached,
            cache_embeddings=cached,
            cache=Path(self.scratch) / "cache" if cached else None,
            tracker="none",
            checkpoint_every=steps,
            validation_every=self.block,
            denoising=DenoisingConfig(condition_dropout=0.0),
        )


def ours(
    config: DenoisingTraining, prepare: Callable[[TrainingData, Any], Callable[..., None] | None]
) -> None:
    """Run our loop. `prepare` sees data and model, and returns what is called after each block."""
    accelerator = make_accelerator(config)
    try:
        folder = RunFolder(config)
        model = build_model(config)
        data = build_data(config, model)
        objective = build_objective(config, model)
        folder.prepare(config, dump(config))
        fill_caches(config, folder, model, data, accelerator)
        after_block = prepare(data, model)

        def tracker(start: int) -> Any:
            return make_tracker("none", folder.path, start, {})

        Trainer(objective, data, config, accelerator, folder, tracker, after_block).run()
    finally:
        release_accelerator(accelerator)


def keys_of(data: TrainingData, step: int) -> SampleKeys:
    """The addresses of the samples of a step."""
    pairs = data.sampler.batch(step)
    indices = tuple(data.kept[position] for position, _ in pairs)
    return SampleKeys(data.seed, tuple(epoch for _, epoch in pairs), indices)


def plain(setting: Setting, data: TrainingData, steps: int) -> PlainLoop:
    """The plain loop over the same samples in the same order."""
    order = [[data.kept[position] for position, _ in data.sampler.batch(s)] for s in range(steps)]
    return PlainLoop(setting.model, setting.data, order, setting.precision, setting.workers)


def equal_losses(setting: Setting, cached: bool, steps: int = 10) -> dict[str, Any]:
    """Losses of both loops on the same draws, and their largest difference."""
    config = setting.config(f"equal-{cached}", steps, cached)
    theirs: list[float] = []

    def prepare(data: TrainingData, model: Any) -> None:
        loop = plain(setting, data, steps)
        shape = model.codec.latent_shape(*data.target(0))
        for step in range(steps):
            keys = keys_of(data, step)
            t = model.schedule.train_timesteps(keys.uniform("timestep"))
            loss = loop.step((keys.normal(shape, "posterior"), keys.normal(shape, "noise"), t))
            theirs.append(loss)

    ours(config, prepare)
    mine = [row["loss"] for row in read_jsonl(config.output / "metrics.jsonl")]
    difference = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
    return {"ours": mine, "plain": theirs, "largest_difference": difference}


class Turns:
    """Times both loops turn by turn: called by our loop after each of its blocks."""

    def __init__(self, setting: Setting, warmup: int = 2) -> None:
        self.block = setting.block
        pairs = [(0, 1)] * warmup + paired.turns(setting.pairs)
        self.order = [which for pair in pairs for which in pair]
        self.skip = warmup
        # One block of our loop more than is timed: its last one saves the result.
        self.steps = self.block * (len(pairs) + 1)
        self.seconds: tuple[list[float], list[float]] = ([], [])
        self.place = 0

    def start(self, loop: PlainLoop) -> Turns:
        """Take the other loop; our first block starts now."""
        self.loop = loop
        self.now = paired.synchronized_time()
        return self

    def __call__(self, done: int, tracker: Any) -> None:
        if self.place >= len(self.order):
            return
        self.seconds[0].append(paired.synchronized_time() - self.now)
        self.place += 1
        while self.place < len(self.order) and self.order[self.place] == 1:
            start = paired.synchronized_time()
            for _ in range(self.block):
                self.loop.step()
            self.seconds[1].append(paired.synchronized_time() - start)
            self.place += 1
        self.now = paired.synchronized_time()

    def ratio(self, name: str) -> paired.Ratio:
        """The result, the warm-up left out."""
        timed = [seconds[self.skip :] for seconds in self.seconds]
        return paired.ratio(*timed, names=(name, "plain loop"))


def speed(setting: Setting, cached: bool) -> tuple[paired.Ratio, dict[str, float]]:
    """The ratio of speeds, and what the parts of a plain step take."""
    turns = Turns(setting)
    parts: dict[str, float] = {}

    def prepare(data: TrainingData, model: Any) -> Turns:
        loop = plain(setting, data, turns.steps + 20)
        parts.update(parts_of(loop))
        return turns.start(loop)

    name = "diffkit, cached" if cached else "diffkit"
    ours(setting.config(f"speed-{cached}", turns.steps, cached), prepare)
    return turns.ratio(name), parts


def parts_of(loop: PlainLoop, repeats: int = 10) -> dict[str, float]:
    """Median seconds of the encoders and of the rest of the plain loop's step."""
    encode, rest = [], []
    for _ in range(repeats):
        batch = loop.batch()
        start = paired.synchronized_time()
        encoded = loop.encode(batch)
        middle = paired.synchronized_time()
        loop.train(*encoded)
        encode.append(middle - start)
        rest.append(paired.synchronized_time() - middle)
    return {"t_encode": statistics.median(encode), "t_step": statistics.median(rest)}


def alone(setting: Setting, which: str, blocks: int = 6) -> int:
    """Peak bytes of this process after running one of the loops for some blocks of steps."""
    steps = blocks * setting.block
    if which == "plain":
        order = [[i % setting.batch for i in range(setting.batch)]] * steps
        loop = PlainLoop(setting.model, setting.data, order, setting.precision, setting.workers)
        for _ in range(steps):
            loop.step()
    else:
        # One block more, in which our loop writes a checkpoint; the plain loop writes none.
        name = f"alone-{os.getpid()}"
        config = setting.config(name, steps + setting.block, which == "cached")
        peaks: list[int] = []
        ours(config, lambda data, model: lambda done, tracker: peaks.append(paired.peak_memory()))
        return peaks[blocks - 1]
    return paired.peak_memory()


def memory(setting: Setting, repeats: int) -> dict[str, Any]:
    """Peak memory of each loop in processes of their own, the median of some, turn by turn."""
    words = [str(value) for value in vars(setting).values()]
    runs: dict[str, list[int]] = {"plain": [], "ours": [], "cached": []}
    for _ in range(repeats):
        for which, peaks in runs.items():
            peaks.append(paired.child([sys.executable, __file__, "--alone", which, *words]))
    peak = {which: statistics.median(peaks) for which, peaks in runs.items()}
    for which, value in peak.items():
        print(f"peak memory, {which}: {value / 2**20:.0f} MiB", flush=True)
    return {
        "peak_bytes": runs,
        "ours / plain": peak["ours"] / peak["plain"],
        "cached / plain": peak["cached"] / peak["plain"],
    }


def measure(setting: Setting, repeats: int, output: Path) -> None:
    """All comparisons, written to OUTPUT/training.json."""
    results: dict[str, Any] = {"setting": vars(setting)}
    ratios = []
    for cached in (False, True):
        name = "cached" if cached else "uncached"
        losses = equal_losses(setting, cached)
        print(f"{name}: losses equal to {losses['largest_difference']:.1e}", flush=True)
        found, parts = speed(setting, cached)
        bound = 0.9 * (1 + parts["t_encode"] / parts["t_step"]) if cached else 0.97
        results[name] = {"losses": losses, **parts, "bound": bound, "reached": found.low >= bound}
        print(f"{found.line()}, lower end to reach: {bound:.3f}", flush=True)
        ratios.append(found)
    results["memory"] = memory(setting, repeats)
    paired.save(output / "training.json", results, ratios)


def setting_of(options: argparse.Namespace, scratch: str) -> Setting:
    """Make the model and the pictures that the options ask for."""
    model = options.model
    edge = synthetic.SHAPES[model].size if model in synthetic.SHAPES else options.size
    if model in synthetic.SHAPES:
        model = str(synthetic.random_model(Path(scratch) / "model", model))
    data = synthetic.random_pictures(Path(scratch) / "data", 4 * options.batch, edge)
    numbers = (options.batch, options.precision, options.workers, options.pairs, options.block)
    return Setting(model, str(data), scratch, *numbers)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    set_quiet(True)
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()
    if words[:1] == ["--alone"]:
        which, model, data, scratch, batch, precision, *numbers = words[1:]
        setting = Setting(model, data, scratch, int(batch), precision, *map(int, numbers))
        print(json.dumps(alone(setting, which)))
        return 0
    parser = argparse.ArgumentParser(description="Compare our training loop with a plain one.")
    shapes = ", ".join(synthetic.SHAPES)
    parser.add_argument("--model", default="small", help=f"{shapes}, embedded, or a folder")
    parser.add_argument("--size", type=int, default=64, help="edge of the pictures for a folder")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--workers", type=int, default=2, help="of both loops")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--block", type=int, default=3, help="steps measured at a time")
    parser.add_argument("--repeats", type=int, default=3, help="processes a loop for its memory")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    options = parser.parse_args(words)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        measure(setting_of(options, scratch), options.repeats, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
