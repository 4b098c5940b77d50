"""A step of protection beside a plain one that does what Diff-Protect's code does.

    python scripts/bench/protection.py --output outputs/bench

First the operations of a step are counted on Stable Diffusion 1.5, XL and 3 in their true sizes.
Then AdvDM and SDS are timed against the plain attack (`plain_attack.py`) on one model, turn by turn
in one run: the ratio of times stands beside the ratio of counted operations. What autograd saves
until the backward pass is counted, peak memory measured in a process of each arm's own (the plain
one's has the gradients of its weights in it). The two-pass steps of --low-vram stand beside the
others.

Weights are random: speed does not depend on the values. The default model is Stable Diffusion of
half the channels at 192 pixels, where a CPU spends its time on arithmetic. Prints one line a result
and writes OUTPUT/protection.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paired
import protection_cost
import synthetic
import torch
from plain_attack import PlainAttack
from torch import Tensor

from diffkit.models.conditioner import Conditioning
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.budget import as_signed
from diffkit.protection.protect import Attack, plan_for, prepared
from diffkit.protection.settings import Settings

ARMS = {"AdvDM": "advdm", "SDS": "sds+"}
PLAIN = "plain AdvDM"


@dataclass(frozen=True)
class Setting:
    """The model's shape, pictures at once, and pairs."""

    shape: str
    batch: int = 1
    pairs: int = 8
    device: str = "cpu"

    @property
    def size(self) -> int:
        """Edge of the pictures."""
        return synthetic.SHAPES[self.shape].size

    def pixels(self, seed: int = 0) -> Tensor:
        """Pictures of noise, uint8 (B, 3, H, W)."""
        draws = torch.Generator().manual_seed(seed)
        shape = (self.batch, 3, self.size, self.size)
        pixels = torch.randint(0, 256, shape, generator=draws).to(torch.uint8)
        return pixels.to(self.device)

    def pipeline(self) -> Any:
        """A stock pipeline; equal weights at every call."""
        pipeline = synthetic.build(synthetic.SHAPES[self.shape]).to(self.device)
        pipeline.vae.eval()
        pipeline.unet.eval()
        return pipeline


@dataclass(frozen=True)
class Arm:
    """One way to make a step, ready to be called, and the networks that it runs through."""

    step: Callable[[], object]
    networks: Sequence[torch.nn.Module]


@contextlib.contextmanager
def our_arm(setting: Setting, name: str, lean: bool = False) -> Iterator[Arm]:
    """Our attack by the name of an arm, one step a call."""
    model = LatentDiffusion(setting.pipeline())
    settings = Settings(ARMS[name], levels=8, views=1)
    pixels = setting.pixels()
    with prepared(model, settings, lean=lean) as surrogates:
        plan = plan_for(model, settings, setting.size, setting.size)
        seeds = range(setting.batch)
        attack = Attack.prepare(pixels, surrogates, settings, seeds=seeds, plan=plan, lean=lean)
        state, gradient = attack.pgd.start(), attack.gradient
        assert gradient is not None
        made = 0

        def step() -> None:
            nonlocal made
            attack.pgd.advance(state, gradient, made, 1)
            made += 1

        yield Arm(step, surrogates[0].networks())


def plain_arm(setting: Setting) -> Arm:
    """The plain attack on an equal model."""
    pipeline = setting.pipeline()
    cond = LatentDiffusion(pipeline).conditioner.encode(["a picture"]).tokens
    assert cond is not None
    clean, target = as_signed(setting.pixels()), as_signed(setting.pixels(1))
    attack = PlainAttack(pipeline, cond.to(setting.device), clean, target)
    return Arm(attack.step, attack.networks)


def counted(setting: Setting) -> dict[str, dict[str, float]]:
    """Of every arm: the operations of the plain step over its own, attention's products included,
    and the float32 bytes that one picture's forward pass saves."""
    shape = synthetic.SHAPES[setting.shape]
    with torch.device("meta"):
        pipeline = synthetic.build(shape)
    pipeline.vae.eval()
    pipeline.unet.eval()
    tokens = torch.zeros(1, shape.tokens, shape.text[0], device="meta")
    names = [*ARMS, *(f"{name}, low VRAM" for name in ARMS)]
    mine = protection_cost.ours(
        LatentDiffusion(pipeline), setting.size, Conditioning(tokens=tokens), names
    )
    theirs = protection_cost.plain(pipeline, setting.size, tokens)
    key = "tflop_with_attention"
    return {
        name: {"predicted": theirs[key] / row[key], "saved_bytes": 2e9 * row["saved_gb"]}
        for name, row in (mine | {PLAIN: theirs}).items()
    }


def speed(setting: Setting) -> tuple[list[paired.Ratio], dict[str, dict[str, float]]]:
    """Every arm against the plain one, and what counting says of each."""
    ratios = []
    rows = counted(setting)
    baseline = plain_arm(setting)
    for name, row in rows.items():
        row["saved_share"] = row["saved_bytes"] / rows[PLAIN]["saved_bytes"]
        if name == PLAIN:
            continue
        kind, _, lean = name.partition(", ")
        with our_arm(setting, kind, bool(lean)) as arm:
            found = paired.measure(
                arm.step, baseline.step, names=(name, PLAIN), pairs=setting.pairs, warmup=1
            )
        ratios.append(found)
        row["ratio"] = found.median
        row["reached"] = found.median / row["predicted"]
    return ratios, rows


def alone(setting: Setting, name: str, steps: int = 3) -> int:
    """Peak bytes of this process after some steps of one arm."""
    kind, _, lean = name.partition(", ")
    with ExitStack() as stack:
        if name == PLAIN:
            arm = plain_arm(setting)
        else:
            arm = stack.enter_context(our_arm(setting, kind, bool(lean)))
        for _ in range(steps):
            arm.step()
        return paired.peak_memory()


def memory(setting: Setting, names: Sequence[str]) -> dict[str, int]:
    """Peak bytes of every arm, each in a process of its own, and of one that only builds."""
    argv = [sys.executable, __file__, "--alone"]
    rest = [setting.shape, str(setting.batch), setting.device]
    found = {name: int(paired.child([*argv, name, *rest])) for name in names}
    return {"model alone": int(paired.child([*argv, "nothing", *rest])), **found}


def report(rows: dict[str, Any], peaks: dict[str, int]) -> str:
    """The measured arms for a person."""
    base = peaks["model alone"]
    lines = ["ratio of time to plain, by counting, share reached; saved; peak above the model"]
    for name, row in rows.items():
        above = f"{(peaks[name] - base) / 1e6:.0f} MB"
        saved = f"{row['saved_bytes'] / 1e6:.0f} MB"
        if name != PLAIN:
            saved += f" ({row['saved_share']:.0%} of plain)"
            saved = f"{row['ratio']:.2f}  {row['predicted']:.2f}  {row['reached']:.2f}  {saved}"
        lines.append(f"{name:16} {saved}  {above}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--alone"]:
        name, shape, batch, device = words[1:]
        setting = Setting(shape, int(batch), device=device)
        if name == "nothing":
            setting.pipeline()
            peak = paired.peak_memory()
        else:
            peak = alone(setting, name)
        print(json.dumps(peak))
        return 0
    parser = argparse.ArgumentParser(description="Compare a step of protection with a plain one.")
    parser.add_argument("--model", choices=synthetic.SHAPES, default="half")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", nargs="*", default=list(protection_cost.REAL_SIZES))
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    options = parser.parse_args(words)
    setting = Setting(options.model, options.batch, options.pairs, options.device)
    table = protection_cost.table(options.sizes)
    print(protection_cost.words(table), flush=True)
    ratios, rows = speed(setting)
    peaks = memory(setting, list(rows))
    print(report(rows, peaks))
    result = {"shape": setting.shape, "batch": setting.batch, "pairs": setting.pairs}
    result |= {"counted": table, "steps": rows, "peak_bytes": peaks}
    paired.save(options.output / "protection.json", result, ratios)
    return 0


if __name__ == "__main__":
    sys.exit(main())
