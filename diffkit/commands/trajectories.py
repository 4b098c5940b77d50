"""`diffkit trajectories`: noise-image pairs of a teacher, what one-step students are trained on."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffkit.console import say, set_quiet
from diffkit.errors import UserError

if TYPE_CHECKING:
    from diffkit.data.trajectory_store import Header, Prompt
    from diffkit.generation.run import Processes
    from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["TrajectoriesConfig", "configs", "main"]


@dataclass(frozen=True)
class TrajectoriesConfig:
    """Run a teacher's deterministic sampler (DDIM, Euler) and keep where each noise led to.

    Pair i has the noise of (seed, i) and prompt i, and when the prompts are over the first again.
    Shards are shared out over all processes that work on one folder, started together or not; the
    same command goes on where it stopped, and a larger --count adds pairs.
    """

    output: Path
    """Folder of the pairs: trajectories.json, prompts.jsonl and pairs-*.safetensors."""

    prompts: Path | None = None
    """A text file with one prompt a line, or a table with a column prompt; for class-conditional
    models names or numbers of classes, by default all of them in turn."""

    data: str | None = None
    """Instead of --prompts: training data, of which every caption or label is a prompt."""

    split: str = "train"
    """Split of --data, where it is shards or a hub data set."""

    caption_column: str | None = None
    """Column of the captions of --data; `text` or the like by default."""

    model: str = "embedded"
    """The teacher: "embedded", a diffusers folder, a single .safetensors file, or a hub id."""

    variant: str | None = None
    """Which weights of a folder or hub id, such as fp16."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    count: int | None = None
    """Pairs in all; by default one a prompt, or as many as there are if these are more."""

    steps: int = 50
    """Sampling steps."""

    guidance: float | None = None
    """Guidance scale; default the model card's, else the family's."""

    size: str | None = None
    """WxH or N pixels; default the model's own size."""

    seed: int = 0
    """With a pair's number the address of its noise."""

    batch_size: int = 16
    """Pairs at once in each process."""

    shard: int = 256
    """Pairs a shard file; an interruption loses at most those of one."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the teacher. Latents are stored in float16."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    verify: int | None = None
    """Make nothing, but this many of the stored pairs anew, and compare. The folder says how they
    were made; beside it only --output, --device, --json, and --model, --variant, --revision for a
    teacher that has moved."""

    overwrite: bool = False
    """Remove the pairs that are there."""

    json: bool = False
    """Print what was done as JSON on stdout, and nothing else."""


def configs() -> dict[str, type]:
    """The one config of this command."""
    return {"": TrajectoriesConfig}


def main(config: TrajectoriesConfig) -> int:
    """Make or verify pairs; 0, or 1 when stored pairs are not those of their seeds."""
    set_quiet(config.json)
    for name in ("count", "steps", "batch_size", "shard", "verify"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1.")
    if config.verify is not None:
        return _verify(config, config.verify)
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--seed {config.seed}: must be from 0 to 2^63 - 1.")
    if config.guidance is not None and not 0 <= config.guidance < math.inf:
        raise UserError(f"--guidance {config.guidance:g}: must be a number, and not negative.")
    return _make(config)


def _make(config: TrajectoriesConfig) -> int:
    from diffkit.generation.run import Processes
    from diffkit.generation.trajectories import (
        Teacher,
        check_folder,
        check_place,
        make_pairs,
        prepare,
    )

    check_place(config.output)
    texts = _texts(config)
    processes = Processes.current(config.device)
    model = _open(config, config.model, config.dtype, processes)
    prompts = _prompts(config, model, texts)
    header = _header(config, model, prompts)
    check_folder(config.output, header, config.overwrite)
    processes.wait()
    if processes.rank == 0:
        prepare(config.output, header, prompts, config.overwrite)
    processes.wait()
    made = make_pairs(Teacher(model, header, prompts), config.output, config.batch_size, processes)
    if processes.rank == 0:
        lacking = f"; {made.elsewhere} shards are being made elsewhere" if made.elsewhere else ""
        say(f"{header.count} pairs in {config.output}, {made.dropped} left out{lacking}")
        if config.json:
            report = {"folder": str(config.output), "pairs": header.count, "prompts": len(prompts)}
            print(json.dumps(report | dataclasses.asdict(made)))
    return 0


def _verify(config: TrajectoriesConfig, count: int) -> int:
    from diffkit.data.trajectory_store import read_header, read_prompt_rows
    from diffkit.generation.engine import choose_device
    from diffkit.generation.run import Processes
    from diffkit.generation.trajectory_verify import teacher_of, verify_pairs

    _check_beside_verify(config)
    header = read_header(config.output)
    prompts = read_prompt_rows(config.output, header)
    source = header.model if config.model == _default("model") else config.model
    if header.dtype == "fp16" and choose_device(config.device) == "cpu":
        raise UserError(
            f"{config.output}: its pairs were made in fp16, which a CPU does not compute with; "
            "verify them with --device cuda."
        )
    model = _open(config, source, header.dtype, Processes())
    found = verify_pairs(teacher_of(config.output, header, prompts, model), config.output, count)
    verdict = "equal up to rounding" if found.passed else "NOT those of their seeds"
    say(
        f"{found.checked} pairs made anew: {found.identical} bit by bit the stored ones; the "
        f"largest difference is {found.largest:.2g} of a pair's norm, {found.allowed:g} being "
        f"allowed: {verdict}"
    )
    if config.json:
        told = dataclasses.asdict(found) | {"passed": found.passed}
        if not math.isfinite(found.largest):
            told["largest"] = None  # which JSON has no number for
        print(json.dumps(told, allow_nan=False))
    return 0 if found.passed else 1


_BESIDE_VERIFY = {"verify", "output", "device", "json", "model", "variant", "revision"}


def _default(name: str) -> Any:
    return next(f.default for f in dataclasses.fields(TrajectoriesConfig) if f.name == name)


def _check_beside_verify(config: TrajectoriesConfig) -> None:
    for field in dataclasses.fields(config):
        if field.name not in _BESIDE_VERIFY and getattr(config, field.name) != field.default:
            name = field.name.replace("_", "-")
            raise UserError(f"--{name}: the folder decides it for --verify; leave it out.")


def _open(
    config: TrajectoriesConfig, source: str, dtype: str, processes: Processes
) -> LatentDiffusion:
    from diffkit.generation.engine import choose_device, choose_dtype
    from diffkit.generation.plan import open_model

    device = choose_device(processes.device or config.device)
    return open_model(
        source,
        (),
        choose_dtype(dtype, device),
        device,
        variant=config.variant,
        revision=config.revision,
    )


def _header(config: TrajectoriesConfig, model: LatentDiffusion, prompts: list[Prompt]) -> Header:
    from diffkit.data.trajectory_store import is_trajectory_folder, read_header
    from diffkit.generation.pictures import parse_size
    from diffkit.generation.trajectories import header_of

    count = config.count or len(prompts)
    if config.count is None and not config.overwrite and is_trajectory_folder(config.output):
        count = max(count, read_header(config.output).count)
    return header_of(
        model,
        prompts,
        count=count,
        seed=config.seed,
        shard=config.shard,
        steps=config.steps,
        guidance=config.guidance,
        size=None if config.size is None else parse_size(config.size),
    )


def _texts(config: TrajectoriesConfig) -> list[str] | None:
    """The prompts of a file; None where there is none. Read before the model is."""
    if config.prompts is None:
        given = [n for n in ("split", "caption_column") if getattr(config, n) != _default(n)]
        if given and config.data is None:
            raise UserError(f"--{given[0].replace('_', '-')}: needs --data.")
        return None
    if config.data is not None:
        raise UserError("give prompts either by --prompts or by --data, not both.")
    from diffkit.data.prompts import read_prompts
    from diffkit.data.trajectory_store import PROMPTS

    if config.prompts.resolve() == (config.output / PROMPTS).resolve():
        raise UserError(
            f"--prompts {config.prompts}: the pairs keep their own prompts in this file; keep "
            "yours outside of --output."
        )
    return read_prompts(config.prompts)


def _prompts(
    config: TrajectoriesConfig, model: LatentDiffusion, texts: list[str] | None
) -> list[Prompt]:
    from diffkit.data.trajectory_prompts import prompts_of_data, prompts_of_texts

    classes = model.conditioner.classes
    if config.data is not None:
        return prompts_of_data(config.data, classes, config.split, config.caption_column)
    return prompts_of_texts(texts, classes)
