"""Sections of the GPU check about few-step students: pairs of a teacher, and steps of training."""

from __future__ import annotations

import json
import statistics
import sys
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Protocol

import torch

from diffkit import cli
from diffkit.data.trajectory_store import Prompt
from diffkit.generation.trajectories import Teacher, header_of
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import add_lora
from diffkit.objectives.diffusion_gan_config import DmdConfig, GanConfig
from diffkit.objectives.reward_guided_config import RewardConfig
from diffkit.perceptual.latent_lpips import LatentLpips, LatentLpipsConfig
from diffkit.perceptual.latent_lpips_io import save_latent_lpips
from diffkit.training.consistency import ConsistencyTraining
from diffkit.training.diffusion_gan import GanTraining, build_gan
from diffkit.training.launch import LORA_NAME
from diffkit.training.registry import method_of
from diffkit.training.reward_guided import RewardGuidedTraining

sys.path.append(str(Path(__file__).parent / "bench"))  # whose files import one another as scripts
import objective_steps  # noqa: E402
import paired  # noqa: E402
import synthetic  # noqa: E402
from phased_steps import PhasedSteps, trajectory_batches  # noqa: E402

__all__ = ["adversaries", "consistency", "trajectories"]

BATCH = 4
PENALTY_EVERY = 16
PAIRS = 24


class Setting(Protocol):
    """What is read of the check's own setting."""

    device: str
    shape: str
    scratch: Path
    steps: int

    def model(self, dtype: torch.dtype) -> LatentDiffusion:
        """A model of random weights on the device."""


# -- pairs --------------------------------------------------------------------------------------


def trajectories(setting: Setting) -> dict[str, Any]:
    """`diffkit trajectories` in bf16: pairs, the same again from their seeds, seconds a pair."""
    model, folder = setting.scratch / "teacher", setting.scratch / "pairs"
    prompts = setting.scratch / "prompts.txt"
    synthetic.random_model(model, setting.shape)
    prompts.write_text("a picture\nanother picture\n")
    where = ["trajectories", "--output", folder, "--device", setting.device, "--json"]
    words = ["--model", model, "--prompts", prompts, "--count", PAIRS, "--steps", setting.steps]
    words += ["--guidance", 2, "--dtype", "bf16", "--batch-size", 8, "--shard", 16]
    made = command([*where, *words])
    found = command([*where, "--verify", 3])
    if made["dropped"] or not found["passed"]:
        raise AssertionError(f"made {made}, made anew {found}")
    teacher = teacher_of(setting)
    seconds = paired.seconds_of(partial(teacher.end_points, range(8))) / 8
    return {
        "steps": setting.steps,
        "pairs": made,
        "verified": found,
        "seconds_a_pair": seconds,
        "peak_bytes": paired.peak_memory(),
    }


def command(words: list[Any]) -> dict[str, Any]:
    """What a command says in JSON; its failure is raised."""
    output = StringIO()
    with redirect_stdout(output):
        code = cli.main([str(word) for word in words])
    if code not in (0, 1) or not output.getvalue():
        raise AssertionError(f"diffkit {words[0]} exited with {code}")
    report: dict[str, Any] = json.loads(output.getvalue())
    return report


def teacher_of(setting: Setting) -> Teacher:
    """A teacher in bf16 with guidance."""
    prompts = [Prompt("a picture")]
    model = setting.model(torch.bfloat16)
    words: dict[str, Any] = {"count": 8, "seed": 0, "shard": 8, "guidance": 2.0}
    return Teacher(model, header_of(model, prompts, steps=setting.steps, **words), prompts)


# -- training steps -----------------------------------------------------------------------------


def consistency(setting: Setting) -> dict[str, Any]:
    """Steps of LCD and RG-LCD in bf16, whole or a LoRA: seconds, peak memory, finite losses.

    The pictures of two prompts are looked at before the first step, as in a run.
    """
    small = setting.device != "cuda"
    common: dict[str, Any] = {"data": "", "output": setting.scratch, "mixed_precision": "bf16"}
    direct = RewardConfig(chunk=1, checkpoint="none" if small else "block")
    proxy = RewardConfig(mode="proxy", chunk=1)
    configs: dict[str, ConsistencyTraining] = {
        "lcd": ConsistencyTraining(**common),
        "rg_lcd, decoded": RewardGuidedTraining(**common, reward=direct),
        "rg_lcd, proxy": RewardGuidedTraining(**common, reward=proxy),
        "rg_lcd, proxy, LoRA": RewardGuidedTraining(**common, reward=proxy, lora_rank=16),
    }
    rows = {}
    for name, config in configs.items():
        empty(setting.device)
        model = student(setting, config)
        lora = None if config.lora_rank is None else LORA_NAME
        objective = method_of(config).build(model, config, lora)
        objective.meet(["a picture", "another picture"])
        batches = objective_steps.Cache(model, BATCH).pictures
        rows[name] = run_steps(name, PhasedSteps(objective, model.device, batches, True), 8)
        del model, objective, batches
    return {"batch": BATCH, "rows": rows}


def student(setting: Setting, config: ConsistencyTraining) -> LatentDiffusion:
    """As `diffkit train` prepares it: all weights trainable, or a LoRA alone."""
    model = config.prepared(setting.model(torch.float32))
    model.codec.to(dtype=torch.bfloat16)
    whole = config.lora_rank is None
    for network in model.networks.values():
        network.requires_grad_(whole and network is model.denoiser.model)
    if config.lora_rank is not None:
        model.denoiser.to(torch.bfloat16)
        add_lora(model, config.lora_rank, None, config.adapted(model), name=LORA_NAME)
    return model


def adversaries(setting: Setting) -> dict[str, Any]:
    """Steps of the GAN in bf16, E-LatentLPIPS of full width; the last one has the R1 penalty."""
    empty(setting.device)
    model = setting.model(torch.float32)
    model.denoiser.model.requires_grad_(True)
    metric = setting.scratch / "latent_lpips"
    torch.manual_seed(0)
    width = 64 if setting.device == "cuda" else 4
    network = LatentLpips(LatentLpipsConfig(model.codec.channels, width))
    save_latent_lpips(network, metric, overwrite=True)
    config = GanTraining(
        data="",
        output=setting.scratch,
        batch_size=BATCH,
        mixed_precision="bf16",
        gan=GanConfig(latent_lpips=str(metric), warmup=1),
        dmd=DmdConfig(),
    )
    objective = build_gan(model, config, None)
    objective.meet(["a picture", "another picture"])
    cached = objective_steps.Cache(model, BATCH).conditioning
    batches = trajectory_batches(model, cached, BATCH)
    steps = PhasedSteps(objective, model.device, batches, True)
    return {"batch": BATCH, **run_steps("gan", steps, PENALTY_EVERY)}


def run_steps(name: str, steps: PhasedSteps, count: int) -> dict[str, Any]:
    """`count` steps after one: seconds of the median one and of the last, memory, last losses."""
    took, losses = [], {}
    for number in range(count + 1):
        start = paired.synchronized_time()
        losses = {phase: float(loss) for phase, loss in steps().items()}
        if number:
            took.append(paired.synchronized_time() - start)
        if not all(map(torch.isfinite, map(torch.tensor, losses.values()))):
            raise AssertionError(f"{name}: a loss of step {number} is not finite: {losses}")
    return {
        "seconds": statistics.median(took),
        "last_seconds": took[-1],
        "peak_bytes": paired.peak_memory(),
        "losses": losses,
    }


def empty(device: str) -> None:
    """Forget what was held."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
