"""Distillation to one to four steps, alone and with a reward, from a teacher of open captions.

    python scripts/reproduce/rg_lcd.py --jobs 2

All arms of a seed start from the same teacher (`runner/open_captions.py`) and see the same
pictures, captions, noise, intervals and guidance. The reward is the embedded scorer's, of pictures
that are averaged down to 16x16: it cannot see what the student draws between these pixels. Training
and scoring run on a GPU where there is one; each cell says on what it was made.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rg_lcd_parts.measure import POOLED, Judges, Prompts, Sampler
from rg_lcd_parts.report import ABLATIONS, LARGE, LCD, LONG, TEACHER_ARM, draw, text
from runner.experiment import Cell, Experiment, digest
from runner.inputs import asset_digests, read_pictures
from runner.main import main
from runner.open_captions import TEACHER, open_pictures, open_teacher
from runner.stages import train_stages
from runner.work import claim
from safetensors.torch import load, save
from torch import Tensor

from diffkit.files import atomic_write, read_jsonl
from diffkit.models.few_step import consistency_scheduler
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import load_lora
from diffkit.objectives.consistency_config import ConsistencyConfig
from diffkit.objectives.proxy_reward import ProxyRewardConfig
from diffkit.objectives.reward_guided_config import RewardConfig
from diffkit.training.consistency import ConsistencyTraining
from diffkit.training.proxy_reward import ProxyRewardTraining
from diffkit.training.reward_guided import RewardGuidedTraining

DIRECT: dict[str, Any] = {"mode": "direct", "rewards": POOLED, "share": 0.3}
PROXY: dict[str, Any] = {
    "mode": "proxy",
    "rewards": POOLED,
    "share": 0.3,
    "refit_rate": 1e-3,
    "refit_temperature": "median",
}
ARMS: dict[str, dict[str, Any]] = {
    TEACHER_ARM: {"lcd": None},
    LCD: {},
    LONG: {"run of": LCD, "stages": [400, 1200]},
    "direct": {"reward": DIRECT},
    LARGE: {"reward": DIRECT | {"share": 2.0}},
    "proxy": {"reward": PROXY},
    "online target": {"lcd": {"target": "online"}},
    "L2": {"lcd": {"distance": "l2"}},
    "E-LatentLPIPS": {
        "lcd": {"distance": "e_latentlpips"},
        "distance": asset_digests("latent_lpips"),
    },
    "random embedding": {"lcd": {"embedding_init": "default"}},
    "two segments": {"lcd": {"segments": 2}, "sampled": [2]},
    "full resolution": {"reward": DIRECT | {"rewards": "embedded"}},
    "proxy of towers": {"reward": PROXY, "proxy": {"network": "vit", "text": "embedded"}},
    "LoRA": {"lora_rank": 16},
}
SETTINGS: dict[str, Any] = {
    "data": "t2i-64, open captions",
    "assets": asset_digests("model/unet", "model/vae", "model/text_encoder", "scorer"),
    "teacher": TEACHER,
    "stages": [400],
    "batch_size": 32,
    "learning_rate": 1e-4,
    "warmup_steps": 30,
    "ema": 0.99,
    "lcd": {},
    "guidance": [1.5, 2.5],
    "told": 2.0,
    "sampled": [1, 2, 4],
    "pretraining": {"steps": 300, "batch_size": 64, "learning_rate": 5e-4, "warmup_steps": 30},
}
SCORING: dict[str, Any] = {
    "assets": asset_digests("features", "scorer"),
    "noises": 6,
    "teacher_steps": [1, 2, 4, 10, 20],
    "endpoint_steps": 20,
    "reference_seed": 1000,
    "features": ["features", "scorer"],
}
LAST = 100
"""Steps at the end of a run over which the proxy's accuracy is averaged."""


# -- training -----------------------------------------------------------------------------------


def common(cell: Cell, data: Path, teacher: Path, output: Path) -> dict[str, Any]:
    """Flags of every training of a cell."""
    return {
        "data": str(data),
        "model": str(teacher),
        "output": output,
        "cache_latents": True,
        "cache": cell.work.parent / "cache",
        "workers": 1,
        "checkpoint_every": 250,
        "keep": 1,
        "tracker": "none",
    }


def proxy_configuration(cell: Cell, data: Path, teacher: Path) -> ProxyRewardTraining:
    """The training of a proxy before it is fitted to the reward; one for all seeds."""
    settings, kind = cell.settings["pretraining"], cell.settings["proxy"]
    chosen = digest([settings, kind, cell.settings["teacher"], cell.settings["data"]])
    return ProxyRewardTraining(
        **common(cell, data, teacher, cell.work.parent / f"proxy-{chosen}"),
        max_steps=settings["steps"],
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        warmup_steps=settings["warmup_steps"],
        proxy=ProxyRewardConfig(**kind),
    )


def configuration(
    cell: Cell, data: Path, teacher: Path, output: Path, proxy: Path | None = None
) -> ConsistencyTraining:
    """The distillation of one arm, in the run folder `output`."""
    settings = cell.settings
    low, high = settings["guidance"]
    if settings.get("lora_rank"):
        low = high = settings["told"]
    flags: dict[str, Any] = {
        **common(cell, data, teacher, output),
        "seed": cell.seed,
        "max_steps": settings["stages"][-1],
        "batch_size": settings["batch_size"],
        "learning_rate": settings["learning_rate"],
        "warmup_steps": settings["warmup_steps"],
        "ema": settings["ema"],
        "lora_rank": settings.get("lora_rank"),
        "cache_embeddings": True,
        "lcd": ConsistencyConfig(guidance_min=low, guidance_max=high, **settings["lcd"]),
    }
    if "reward" not in settings:
        return ConsistencyTraining(**flags)
    return RewardGuidedTraining(**flags, reward=RewardConfig(**settings["reward"], proxy=proxy))


# -- measuring ----------------------------------------------------------------------------------


def endpoints(cell: Cell, teacher: Sampler, prompts: Prompts) -> Tensor:
    """Where the teacher's trajectories end, from the noises of the sampler's seed; made once."""
    settings, steps = cell.settings, cell.scoring["endpoint_steps"]
    known = [settings[key] for key in ("data", "teacher", "told", "assets")]
    chosen = digest([known, steps, teacher.seed, prompts.captions])
    path = cell.work.parent / f"endpoints-{chosen}.safetensors"
    with claim(path, wait=True):
        if not path.exists():
            made = teacher.latents(prompts.captions, steps)
            with atomic_write(path) as file:
                file.write(save({"latents": made.cpu()}))
    return load(path.read_bytes())["latents"]


def student(cell: Cell, teacher: Path, result: Path, device: torch.device) -> Sampler:
    """The finished student of a cell; a LoRA on the teacher."""
    settings = cell.settings
    if settings.get("lora_rank") is None:
        return Sampler(LatentDiffusion.load(result, device=device), settings["told"], cell.seed)
    model = LatentDiffusion.load(teacher, device=device)
    model.set_scheduler(consistency_scheduler(model, ConsistencyConfig().solver_steps))
    load_lora(model, result)
    return Sampler(model.to(device), 1.0, cell.seed)


def logged(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a run says of itself at its end: of the proxy, and of pixels beyond their range."""
    names = {"saturated": "saturated", "lcd/saturated": "saturated"}
    names |= {f"refit/{name}": name for name in ("accuracy", "gap_accuracy")}
    last = rows[-LAST:]
    found = {}
    for key, name in names.items():
        column = [row[key] for row in last if row.get(key) is not None]
        if column:
            found[name] = math.fsum(column) / len(column)
    return found


def trained(cell: Cell, data: Path, teacher: Path, experiment: Experiment) -> tuple[Path, Path]:
    """The run folder of a cell, and its model there.

    An arm that is another's run for longer goes on in that one's folder.
    """
    settings = cell.settings
    owner = experiment.cell(settings.get("run of", cell.arm), cell.seed)
    proxy = None
    if "proxy" in settings:
        before = proxy_configuration(cell, data, teacher)
        (proxy,) = train_stages(before, [settings["pretraining"]["steps"]])
    config = configuration(cell, data, teacher, owner.work / "run", proxy)
    return Path(config.output), train_stages(config, settings["stages"])[-1]


def measured(cell: Cell, data: Path, teacher: Path, experiment: Experiment) -> dict[str, Any]:
    """The numbers of a cell: a list over the numbers of steps for each measure."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings, scoring = cell.settings, cell.scoring
    prompts = Prompts.read(data, scoring["noises"])
    start = Sampler(LatentDiffusion.load(teacher, device=device), settings["told"], cell.seed)
    sampler, steps, values = start, scoring["teacher_steps"], {}
    if settings["lcd"] is not None:
        folder, result = trained(cell, data, teacher, experiment)
        sampler, steps = student(cell, teacher, result, device), settings["sampled"]
        values = logged(read_jsonl(folder / "metrics.jsonl"))
    others = replace(start, seed=scoring["reference_seed"])
    judges = Judges(
        prompts,
        read_pictures(data)[0],
        endpoints(cell, start, prompts),
        others.pictures(endpoints(cell, others, prompts).to(device)),
        device,
    )
    each = {}
    for number in steps:
        latents = sampler.latents(prompts.captions, number)
        each[str(number)] = judges.score(latents, sampler.pictures(latents))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"device": name, "n": len(prompts.captions), "steps": each, **values}


def run(cell: Cell) -> dict[str, Any]:
    """Train one arm with one seed and measure it."""
    return measured(cell, open_pictures(), open_teacher(), EXPERIMENT)


EXPERIMENT = Experiment(
    name="rg_lcd",
    title="Few steps, and few steps with a reward",
    arms=ARMS,
    seeds=(0, 1, 2),
    settings=SETTINGS,
    scoring=SCORING,
    run=run,
    text=partial(text, settings=SETTINGS, proxy=PROXY, long=ARMS[LONG]["stages"][-1]),
    draw=draw,
    fewer=dict.fromkeys((LONG, LARGE, *ABLATIONS), (0,)),
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
