"""The fine-tuning objectives beside plain fine-tuning, and LPL beside what diffusers' script does.

    python scripts/bench/objectives.py --output outputs/bench
    python scripts/bench/objectives.py --parts script --size 512 --pairs 2

Three parts. `steps`: a training step of each objective over one of plain denoising on the embedded
model, with cached latents and embeddings, and its peak memory in a process of its own. `script`:
loss and gradient of one sample through a decoder of Stable Diffusion's size beside a re-creation of
diffusers' script (`lpl_script.py`), and the peak memory of each. `counted`: what the same keep at
512 pixels, counted in bfloat16 without arithmetic. Weights are random where they do not matter.

Times are of the process on a CPU (neighbours do not count), of the wall on a GPU. A ratio below is
time or memory over that of the baseline: 1.4 takes 1.4 times as long. Writes
OUTPUT/objectives.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lpl_step
import objective_steps
import paired
import torch

from diffkit.console import set_quiet
from diffkit.models.latent_diffusion import LatentDiffusion

PARTS = ("steps", "script", "counted")
NOTHING = "nothing"


@dataclass(frozen=True)
class Setting:
    """What is measured, and how often."""

    model: str
    batch: int
    size: int
    pairs: int
    device: str
    tiny: bool = False

    def load(self) -> LatentDiffusion:
        """The trained model, on the device."""
        return LatentDiffusion.load(self.model).to(self.device)

    def loss(self, size: int | None = None) -> lpl_step.Arms:
        """The loss at the size of a published decoder."""
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        return lpl_step.Arms(size or self.size, self.device, dtype, tiny=self.tiny)

    def clock(self) -> Callable[[], float] | None:
        """Seconds of this process on a CPU."""
        return time.process_time if self.device == "cpu" else None


def shown(ratio: paired.Ratio) -> dict[str, Any]:
    """Time over the baseline's, with its interval: the inverse of the speed."""
    return {
        "against": ratio.baseline,
        "time": 1 / ratio.median,
        "low": 1 / ratio.high,
        "high": 1 / ratio.low,
        "seconds": sorted(ratio.candidate_seconds)[len(ratio.candidate_seconds) // 2],
    }


def steps(setting: Setting) -> tuple[dict[str, Any], list[paired.Ratio]]:
    """Every objective over plain fine-tuning."""
    rows: dict[str, Any] = {}
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plain = objective_steps.build(
            objective_steps.BASELINE, setting.load(), setting.batch, folder
        )
        for name in objective_steps.ARMS:
            if name == objective_steps.BASELINE:
                continue
            step = objective_steps.build(name, setting.load(), setting.batch, folder)
            names = (name, objective_steps.BASELINE)
            ratios.append(
                paired.measure(
                    step, plain, names=names, pairs=setting.pairs, warmup=1, clock=setting.clock()
                )
            )
            rows[name] = shown(ratios[-1])
            del step
    return rows, ratios


def script(setting: Setting) -> tuple[dict[str, Any], list[paired.Ratio]]:
    """Our loss at a decoder's size against the script's."""
    ratios = lpl_step.speed(setting.loss(), setting.pairs, setting.clock())
    return {f"{r.candidate} / {r.baseline}": shown(r) for r in ratios}, ratios


def memory(part: str, names: Sequence[str], setting: Setting) -> dict[str, int]:
    """Peak bytes above those of the weights alone, each arm in a process of its own."""
    argv = [sys.executable, __file__, "--alone", part]
    rest = [setting.model, str(setting.batch), str(setting.size), setting.device]
    rest += ["tiny"] * setting.tiny
    base = int(paired.child([*argv, NOTHING, *rest]))
    return {name: int(paired.child([*argv, name, *rest])) - base for name in names}


def alone(part: str, name: str, setting: Setting) -> int:
    """Peak bytes of this process after three steps of one arm."""
    if part == "script":
        return lpl_step.peak(setting.loss(), name)
    model = setting.load()
    if name != NOTHING:
        with tempfile.TemporaryDirectory() as scratch:
            step = objective_steps.build(name, model, setting.batch, Path(scratch))
            for _ in range(3):
                step()
    return paired.peak_memory()


def report(results: dict[str, Any]) -> str:
    """The figures for a person."""
    lines = []
    for part in ("steps", "script"):
        for name, row in results.get(part, {}).items():
            span = f"[{row['low']:.3f}, {row['high']:.3f}]"
            lines.append(f"{name}: time {row['time']:.3f} {span} of {row['against']}")
        peaks = results.get(f"{part}_peak_bytes", {})
        base = next(iter(peaks.values()), 0)
        for name, peak in peaks.items():
            lines.append(f"{name}: peak {peak / 2**20:.0f} MiB, {peak / base:.2f} of the first")
    for name, row in results.get("counted", {}).items():
        lines.append(f"{name}: keeps {row['kept']:.2f} MiB, holds {row['working']:.0f} MiB at most")
    return "\n".join(lines)


def measured(parts: Sequence[str], setting: Setting) -> tuple[dict[str, Any], list[paired.Ratio]]:
    """Results and ratios of the parts."""
    results: dict[str, Any] = {}
    ratios: list[paired.Ratio] = []
    arms = {"steps": list(objective_steps.ARMS), "script": list(lpl_step.ARMS)}
    for part, measure in (("steps", steps), ("script", script)):
        if part in parts:
            results[part], found = measure(setting)
            ratios += found
            results[f"{part}_peak_bytes"] = memory(part, arms[part], setting)
    if "counted" in parts:
        results["counted"] = lpl_step.counted(64 if setting.tiny else 512, tiny=setting.tiny)
    return results, ratios


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    set_quiet(True)
    if words[:1] == ["--alone"]:
        part, name, model, batch, size, device, *tiny = words[1:]
        setting = Setting(model, int(batch), int(size), 1, device, bool(tiny))
        print(json.dumps(alone(part, name, setting)))
        return 0
    parser = argparse.ArgumentParser(description="Measure the fine-tuning objectives.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="see above")
    parser.add_argument("--model", default="embedded", help="what `steps` trains")
    parser.add_argument("--batch", type=int, default=16, help="pictures of a step")
    parser.add_argument("--size", type=int, default=256, help="picture's edge of `script`")
    parser.add_argument("--pairs", type=int, default=6, help="measurements of each, interleaved")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tiny", action="store_true", help="a decoder of a few channels")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    options = parser.parse_args(words)
    setting = Setting(
        options.model, options.batch, options.size, options.pairs, options.device, options.tiny
    )
    results, ratios = measured(options.parts, setting)
    print(report(results))
    flags = {"size": setting.size, "batch": setting.batch, "model": setting.model}
    paired.save(options.output / "objectives.json", flags | results, ratios)
    return 0


if __name__ == "__main__":
    sys.exit(main())
