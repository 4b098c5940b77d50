"""What few-step training and few-step pictures cost, beside what they replace.

    python scripts/bench/few_step.py --output outputs/bench
    python scripts/bench/few_step.py --model SD1.5 --device cuda --batch 8 --output outputs/bench

Four parts. `metric`: value and gradient of E-LatentLPIPS beside those of LPIPS behind the decoder,
at batch 1 and at --batch: time, peak memory on a GPU, and multiply-accumulates. `latency`: pictures
of a one-step pipeline beside those of the teacher's guided --steps, and the bound

    (n t_denoiser + t_decode) / (t_denoiser + t_decode)

that the speed-up of the denoiser's calls allows, n calls of equal size for a teacher's picture (two
a guided step). `gan`: a step of the discriminator, both penalties, a step of the generator.
`reward`: gradient of a reward behind the decoder beside those of proxies that read latents.

--model embedded runs anywhere. SD1.5 is Stable Diffusion's size with random weights, without text
encoder; on CUDA frozen networks are bfloat16, trained ones float32 under autocast, and the metric
is float32 as always. Times are of the process on a CPU (neighbours do not count), of the wall on a
GPU; both sides of a ratio are measured turn by turn. Writes OUTPUT/few_step_PART.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import few_step_metric
import few_step_networks
import paired
from few_step_setting import MODELS, Setting

from diffkit.console import set_quiet

__all__ = ["PARTS", "main"]

Part = Callable[[Setting], tuple[dict[str, Any], list[paired.Ratio]]]
PARTS: dict[str, Part] = {
    "metric": few_step_metric.metric,
    "latency": few_step_networks.latency,
    "gan": few_step_networks.gan,
    "reward": few_step_networks.reward,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS))
    parser.add_argument("--model", choices=MODELS, default="embedded")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50, help="of the teacher")
    parser.add_argument("--pairs", type=int, default=6, help="measurements of each, interleaved")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    args = parser.parse_args(argv)
    set_quiet(True)
    setting = Setting(args.model, args.device, args.batch, args.steps, args.pairs)
    told = {"model": args.model, "device": args.device, "batch": args.batch, "steps": args.steps}
    for name in args.parts:
        results, ratios = PARTS[name](setting)
        for key, value in results.items():
            print(f"{name}: {key}: {value}", flush=True)
        paired.save(args.output / f"few_step_{name}.json", told | results, ratios)
    return 0


if __name__ == "__main__":
    sys.exit(main())
