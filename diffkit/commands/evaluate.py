"""`diffkit evaluate`: what a model's pictures are worth, alone or against another model's."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from diffkit.console import say, set_quiet
from diffkit.errors import UserError

if TYPE_CHECKING:
    from diffkit.evaluation.request import EvaluationRequest, Side

__all__ = ["EvaluateConfig", "configs", "main"]

_OWN = "own"
_NONE = "none"


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a model's pictures, alone or against another model's (--against), with intervals.

    MODEL is the candidate and --against the baseline; each is a model or a folder of pictures.
    Both draw the same prompts from the same noises. The same command on the same output goes on
    where it stopped. Open OUTPUT/report.html to read the result.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = "embedded"
    """"embedded", a diffusers folder, a .safetensors file, a hub id, or a folder of pictures."""

    against: str | None = None
    """The baseline: a model or a folder of pictures, as MODEL."""

    data: Path | None = None
    """Real pictures to compare with: a folder, or the reference.safetensors of an earlier
    evaluation. Its captions are the prompts unless --prompts is given."""

    prompts: Path | None = None
    """A file with one prompt a line; default the captions of --data, else the model card's
    examples."""

    metrics: tuple[str, ...] = ()
    """Names of metrics or groups; default everything that the inputs allow. Metrics: frechet,
    kernel, precision, recall, density, coverage, alignment, retrieval, concept, style, background,
    diversity, vendi, high_frequency, psnr, ssim, latent_lpips, lpips, cost, and reward:NAME for a
    reward, such as reward:hpsv2 or reward:hpsv2:PATH; groups: quality, text, variety, pairs,
    all."""

    num: int | None = None
    """Pictures of each set; default 64, of a picture folder all."""

    per_prompt: int | None = None
    """Pictures a prompt; default 4, more where prompts are few."""

    steps: int | None = None
    """Denoising steps of both; default each model card's, else 25."""

    guidance: float | None = None
    """Guidance scale of both; default each model card's, else its family's."""

    scheduler: str | None = None
    """Sampler of both, by its name in diffkit generate; default each model's own."""

    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA of both as PATH or PATH:WEIGHT; repeat the flag for several."""

    against_steps: int | None = None
    """Steps of the baseline, instead of --steps."""

    against_guidance: float | None = None
    """Guidance scale of the baseline, instead of --guidance."""

    against_scheduler: str | None = None
    """Sampler of the baseline, instead of --scheduler; "own" is its model's."""

    against_lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA of the baseline, instead of those of --lora; "none" for none."""

    size: str | None = None
    """WxH or N pixels of both; default each model's own."""

    seed: int = 0
    """Picture i of both starts from the noise of seed + i; draws the bootstrap's resamples too."""

    extractor: str = "embedded"
    """The network behind the distances of sets: embedded, inception, inception:PATH,
    clip:ARCH:TAG, clip:ARCH:PATH."""

    scorer: str = "embedded"
    """The network of alignment and retrieval: embedded, clip:ARCH:TAG, clip:ARCH:PATH."""

    lpips: str = "alex"
    """The backbone of lpips: alex, vgg, alex:PATH, vgg:PATH."""

    resamples: int | None = None
    """Bootstrap resamples behind every interval; default 1000 for means over pictures, 200 for
    numbers of whole sets."""

    batch_size: int = 4
    """Pictures at once, also for the measured throughput and memory."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the models."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    output: Path = Path("evaluation")
    """Folder for report.html, report.json, samples.jsonl, the pictures and what was computed."""

    overwrite: bool = False
    """Throw away what an earlier evaluation left in the output folder."""

    json: bool = False
    """Print the report as JSON on stdout, and nothing else."""


def configs() -> dict[str, type]:
    """The one config of this command."""
    return {"": EvaluateConfig}


def main(config: EvaluateConfig) -> int:
    """Evaluate; returns 0. See `EvaluateConfig`."""
    set_quiet(config.json)

    from diffkit.evaluation.run import evaluate
    from diffkit.evaluation.summary import summary
    from diffkit.generation.engine import choose_device, choose_dtype
    from diffkit.generation.run import Processes

    processes = Processes.current(config.device)
    device = choose_device(processes.device or config.device)
    choose_dtype(config.dtype, device)
    request = _request(config, device)
    request.check()
    report = evaluate(
        request,
        config.output,
        command=_given(config),
        overwrite=config.overwrite,
        processes=processes,
    )
    if report is not None:
        say(f"open {(config.output / 'report.html').resolve().as_uri()}")
        print(json.dumps(report) if config.json else summary(report))
    return 0


_SAMPLER = ("steps", "guidance", "scheduler", "lora")
_DIRECT = (
    *("data", "prompts", "metrics", "num", "per_prompt", "size", "seed", "dtype"),
    *("extractor", "scorer", "lpips", "resamples", "batch_size"),
)


def _request(config: EvaluateConfig, device: str) -> EvaluationRequest:
    from diffkit.evaluation.request import EvaluationRequest, Side
    from diffkit.generation.plan import parse_lora

    for name in _SAMPLER:
        if config.against is None and getattr(config, f"against_{name}") not in (None, ()):
            raise UserError(f"--against-{name}: needs --against, the baseline that it is for.")

    def side(name: Literal["model", "against"], source: str, own: dict[str, Any]) -> Side:
        loras = tuple(parse_lora(text) for text in own.pop("lora"))
        return Side(name, source, loras=loras, **own)

    both = {name: getattr(config, name) for name in _SAMPLER}
    mine = side("model", config.model, dict(both))
    baseline = None
    if config.against is not None:
        own = {name: getattr(config, f"against_{name}") for name in _SAMPLER}
        merged = {name: both[name] if own[name] in (None, ()) else own[name] for name in _SAMPLER}
        if merged["scheduler"] == _OWN:
            merged["scheduler"] = None
        if merged["lora"] == (_NONE,):
            merged["lora"] = ()
        baseline = side("against", config.against, merged)
    if config.against_scheduler == _OWN and config.scheduler is None:
        raise UserError(f"--against-scheduler {_OWN}: does nothing without --scheduler.")
    if config.against_lora == (_NONE,) and not config.lora:
        raise UserError(f"--against-lora {_NONE}: does nothing without --lora.")
    _refuse_idle(config, mine, baseline)
    values = {name: getattr(config, name) for name in _DIRECT}
    return EvaluationRequest(mine, baseline, device=device, **values)


def _refuse_idle(config: EvaluateConfig, mine: Side, baseline: Side | None) -> None:
    """Refuse a sampler option that no set uses."""
    for name in _SAMPLER:
        own = getattr(config, f"against_{name}") not in (None, ())
        if own and baseline is not None and baseline.kind == "pictures":
            raise UserError(f"--against-{name}: {baseline.source} is a folder of pictures.")
        drawn = mine.kind == "model"
        drawn = drawn or (baseline is not None and baseline.kind == "model" and not own)
        if getattr(config, name) not in (None, ()) and not drawn:
            raise UserError(f"--{name}: does nothing here, no model draws with it; leave it out.")


def _given(config: EvaluateConfig) -> dict[str, Any]:
    """MODEL and the flags that are not at their defaults, as JSON knows them."""
    given: dict[str, Any] = {"model": config.model}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("overwrite", "json") or value == field.default:
            continue
        plain = list(value) if isinstance(value, tuple) else value
        given[field.name] = str(plain) if isinstance(plain, Path) else plain
    return given
