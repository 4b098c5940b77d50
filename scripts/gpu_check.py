"""Try on one CUDA GPU what the tests cannot try on a CPU.

    python scripts/gpu_check.py --output outputs/gpu_check
    python scripts/gpu_check.py --sections generate attention --minutes 3

Each section runs in a process of its own, within its time, and writes OUTPUT/SECTION.json. Models
have random weights, so nothing is downloaded. Exit code 0: all sections passed; 1: some failed or
ran out of time; 2: this machine has no CUDA GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import paired, synthetic
from gpu_few_step import adversaries, consistency, trajectories
from gpu_objectives import kernels, lpl_beside_script, objectives
from gpu_protection import protection

from diffkit import cli
from diffkit.errors import UserError
from diffkit.evaluation.frechet import frechet_distance
from diffkit.evaluation.kernel_distance import kernel_distance, subset_draws
from diffkit.evaluation.moments import Moments
from diffkit.evaluation.neighbours import neighbourhood
from diffkit.files import read_json, read_jsonl, write_json
from diffkit.models.denoiser import Denoiser, set_attention
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.sampling import sample
from diffkit.randomness import normal

ROOT = Path(__file__).parents[1]
ATTENTION = ("sdpa", "classic", "xformers")


@dataclass(frozen=True)
class Setting:
    """Where a section runs, on which shape of model, and its folder for files."""

    device: str
    shape: str
    scratch: Path
    steps: int = 25

    def model(self, dtype: torch.dtype, attention: str = "sdpa") -> LatentDiffusion:
        """A model of random weights on the device."""
        pipeline = synthetic.build(synthetic.SHAPES[self.shape])
        model = LatentDiffusion(pipeline).to(self.device, dtype)
        set_attention(model.denoiser.model, attention)
        return model

    def noise(self, model: LatentDiffusion, count: int) -> torch.Tensor:
        """`count` latents of noise, the same in every section."""
        edge = synthetic.SHAPES[self.shape].size
        return normal((count, *model.latent_shape(edge, edge)), "gpu check").to(self.device)


def denoise(
    denoiser: Denoiser, model: LatentDiffusion, noise: torch.Tensor, steps: int
) -> torch.Tensor:
    """Latents after `steps` guided steps."""
    cond = model.conditioner.encode(["a picture"] * len(noise))
    null = model.conditioner.null(len(noise))
    return sample(denoiser, noise, cond, null, steps=steps, guidance_scale=7.5)


def picture(model: LatentDiffusion, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """Pictures from noise."""
    return model.codec.decode(denoise(model.denoiser, model, noise, steps))


def generate(setting: Setting) -> dict[str, Any]:
    """Guided steps and decoding, one image and eight, in bf16: seconds and memory."""
    model = setting.model(torch.bfloat16)
    rows = []
    for count in (1, 8):
        noise = setting.noise(model, count)

        with torch.no_grad():
            seconds = paired.seconds_of(partial(picture, model, noise, setting.steps))
        rows.append({"batch": count, "seconds": seconds, "peak_bytes": paired.peak_memory()})
    return {"steps": setting.steps, "dtype": "bfloat16", "rows": rows}


def attention(setting: Setting) -> dict[str, Any]:
    """Each attention backend: seconds, and its difference from the explicit softmax."""
    rows: dict[str, Any] = {}
    exact = None
    for name in sorted(ATTENTION, key=lambda name: name != "classic"):
        try:
            model = setting.model(torch.bfloat16, name)
        except UserError as error:
            rows[name] = {"refused": str(error)}
            continue
        noise = setting.noise(model, 1)
        latents = denoise(model.denoiser, model, noise, setting.steps)
        exact = latents if exact is None else exact
        difference = ((latents - exact).norm() / exact.norm()).item()
        seconds = paired.seconds_of(partial(denoise, model.denoiser, model, noise, setting.steps))
        rows[name] = {"seconds": seconds, "relative_difference": difference}
        if difference > 0.05:
            raise AssertionError(f"attention {name} differs from classic by {difference:.3f}")
    return {"steps": setting.steps, "rows": rows}


def compiled(setting: Setting) -> dict[str, Any]:
    """The compiled denoiser beside the plain one: equal up to bf16, and the ratio of speeds."""
    model = setting.model(torch.bfloat16)
    noise = setting.noise(model, 1)
    network = torch.compile(model.denoiser.model)
    fast = Denoiser(network, model.family, model.schedule)
    start = time.perf_counter()
    latents = denoise(fast, model, noise, setting.steps)
    first = time.perf_counter() - start
    plain = denoise(model.denoiser, model, noise, setting.steps)
    difference = ((latents - plain).norm() / plain.norm()).item()
    ratio = paired.measure(
        lambda: denoise(fast, model, noise, setting.steps),
        lambda: denoise(model.denoiser, model, noise, setting.steps),
        names=("compiled", "eager"),
        pairs=10,
    )
    if difference > 0.05:
        raise AssertionError(f"the compiled model differs by {difference:.3f}")
    return {
        "first_call_seconds": first,
        "relative_difference": difference,
        "speed": [ratio.low, ratio.median, ratio.high],
    }


def train_flags(setting: Setting, name: str, steps: int, batch: int) -> list[str]:
    """Flags of a training on noise; model and pictures are made on the first call."""
    model, data = setting.scratch / "model", setting.scratch / "data"
    if not model.exists():
        synthetic.random_model(model, setting.shape)
        synthetic.random_pictures(data, 2 * batch, synthetic.SHAPES[setting.shape].size)
    flags = ["--model", model, "--data", data, "--output", setting.scratch / name]
    flags += ["--max-steps", steps, "--batch-size", batch, "--tracker", "none"]
    flags += ["--checkpoint-every", 10 * steps]
    return [str(flag) for flag in flags]


def training(setting: Setting) -> dict[str, Any]:
    """Training in bf16, a LoRA and all weights: seconds a step after the first five, and memory."""
    rows = {}
    for name, extra in (("lora", ["--lora-rank", "16"]), ("full", [])):
        if setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        flags = train_flags(setting, name, 20, 4)
        code = cli.main(["train", "denoising", *flags, "--mixed-precision", "bf16", *extra])
        if code != 0:
            raise AssertionError(f"diffkit train denoising ({name}) exited with {code}")
        log = read_jsonl(setting.scratch / name / "metrics.jsonl")
        seconds = statistics.median(row["seconds"] for row in log[5:])
        rows[name] = {"seconds": seconds, "peak_bytes": paired.peak_memory()}
    return {"batch": 4, "rows": rows}


def fsdp(setting: Setting) -> dict[str, Any]:
    """FSDP 2 on one process: the losses of a plain run."""
    script = str(ROOT / "scripts" / "train_denoising.py")
    plain = train_flags(setting, "plain", 5, 2)
    sharded = train_flags(setting, "fsdp", 5, 2)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    launch += ["--use_fsdp", "--fsdp_version", "2", script]
    subprocess.run([sys.executable, script, *plain], check=True)
    subprocess.run([*launch, *sharded], check=True)
    losses = [
        [row["loss"] for row in read_jsonl(setting.scratch / name / "metrics.jsonl")]
        for name in ("plain", "fsdp")
    ]
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    if difference > 1e-3:
        raise AssertionError(f"losses under FSDP differ by {difference:.2e}: {losses}")
    return {"losses": losses, "largest_difference": difference}


def statistics_of_sets(setting: Setting) -> dict[str, Any]:
    """Distances of two sets of features at Inception's width: equal to the CPU's, and seconds."""
    n, d = (5000, 2048) if setting.device == "cuda" else (200, 16)
    real = normal((n, d), "gpu check", "real")
    fake = normal((n, d), "gpu check", "fake") * 1.1 + 0.05
    draws = subset_draws(n, n, 10, min(1000, n), 0)
    calls: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
        "frechet": lambda x, y: frechet_distance(Moments.of(x), Moments.of(y)),
        "kernel": lambda x, y: kernel_distance(x, y, draws).mean,
        "precision": lambda x, y: float(neighbourhood(x, y).precision.mean()),
    }
    rows = {}
    for name, call in calls.items():
        start = paired.synchronized_time()
        here = call(real.to(setting.device), fake.to(setting.device))
        seconds = paired.synchronized_time() - start
        difference = abs(here - call(real, fake)) / max(abs(here), 1e-12)
        rows[name] = {"value": here, "seconds": seconds, "relative_difference": difference}
        if difference > 1e-6:
            raise AssertionError(f"{name} on {setting.device} differs by {difference:.2e}")
    return {"n": n, "d": d, "rows": rows}


def evaluate(setting: Setting) -> dict[str, Any]:
    """`diffkit evaluate` of the embedded model against itself: nothing differs; its cost."""
    folder = setting.scratch / "evaluation"
    count = 64 if setting.device == "cuda" else 4
    words = ["evaluate", "embedded", "--against", "embedded", "--num", count, "--per-prompt", 2]
    words += ["--steps", setting.steps, "--device", setting.device, "--output", folder]
    if code := cli.main([str(word) for word in words]):
        raise AssertionError(f"diffkit evaluate exited with {code}")
    report = read_json(folder / "report.json")
    wrong = [
        metric["name"]
        for metric in report["metrics"]
        if metric["difference"] and metric["difference"]["value"] != 0
    ]
    if wrong:
        raise AssertionError(f"a model differs from itself in {', '.join(wrong)}")
    return {"pictures": count, "metrics": len(report["metrics"]), "cost": report["cost"]}


SECTIONS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "generate": generate,
    "attention": attention,
    "training": training,
    "fsdp": fsdp,
    "compiled": compiled,
    "statistics": statistics_of_sets,
    "evaluate": evaluate,
    "protection": protection,
    "kernels": kernels,
    "objectives": objectives,
    "lpl_script": lpl_beside_script,
    "trajectories": trajectories,
    "consistency": consistency,
    "adversaries": adversaries,
}


def run_section(name: str, setting: Setting, output: Path) -> bool:
    """Run one section here and write its result, also when it fails."""
    result: dict[str, Any] = {"section": name, "machine": paired.machine(), "shape": setting.shape}
    start = time.perf_counter()
    try:
        result |= {"passed": True, **SECTIONS[name](setting)}
    except Exception as error:
        result |= {"passed": False, "error": f"{type(error).__name__}: {error}"}
    result["seconds"] = round(time.perf_counter() - start, 2)
    write_json(output / f"{name}.json", result)
    return bool(result["passed"])


def run_child(name: str, output: Path, shape: str, minutes: float) -> bool:
    """Run one section in a process of its own, which is ended when its time is over."""
    argv = [sys.executable, __file__, "--child", "--sections", name]
    argv += ["--output", str(output), "--shape", shape]
    with contextlib.suppress(FileNotFoundError):
        (output / f"{name}.json").unlink()
    try:
        code = subprocess.run(argv, check=False, timeout=60 * minutes).returncode
    except subprocess.TimeoutExpired:
        error = f"not finished after {minutes:g} minutes"
        write_json(output / f"{name}.json", {"section": name, "passed": False, "error": error})
        code = 1
    if not (output / f"{name}.json").exists():
        error = f"the process ended with {code}"
        write_json(output / f"{name}.json", {"section": name, "passed": False, "error": error})
    result = read_json(output / f"{name}.json")
    print(f"{name}: {'passed' if result['passed'] else 'FAILED, ' + result['error']}", flush=True)
    return bool(result["passed"])


def main(argv: Sequence[str] | None = None) -> int:
    default = Path(os.environ.get("OUT", "outputs")) / "gpu_check"
    parser = argparse.ArgumentParser(description="Try on one CUDA GPU what a CPU cannot.")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--output", type=Path, default=default, help="folder of the results")
    parser.add_argument("--shape", choices=synthetic.SHAPES, default="sd", help="model size")
    parser.add_argument("--minutes", type=float, default=4, help="time of each section")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_check: this machine has no CUDA GPU that torch can use.", file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    if options.child:
        with tempfile.TemporaryDirectory() as scratch:
            setting = Setting("cuda", options.shape, Path(scratch))
            return 0 if run_section(options.sections[0], setting, options.output) else 1
    passed = [
        run_child(name, options.output, options.shape, options.minutes) for name in options.sections
    ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
