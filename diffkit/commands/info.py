"""`diffkit info`: what a model is made of and what it costs, read from its configs alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from diffkit.console import set_quiet
from diffkit.errors import UserError

if TYPE_CHECKING:
    from diffkit.evaluation.cost import ModelCost
    from diffkit.generation.card import Card
    from diffkit.generation.pictures import Size
    from diffkit.models.cost import Cost, Rates
    from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["InfoConfig", "configs", "describe", "main"]


@dataclass(frozen=True)
class InfoConfig:
    """Show a model's components, parameters, multiply-accumulates, schedule and capabilities, and
    estimate the memory and time of a picture. No weights are loaded, except from a single file."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = "embedded"
    """"embedded", a diffusers folder, a single .safetensors file, or a hub id."""

    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    size: str | None = None
    """WxH or N pixels for the counts; default the model's own."""

    batch_size: int = 1
    """Pictures at once, for the memory estimate."""

    steps: int | None = None
    """Denoising steps, for the time estimate; default the model card's, else 25, for Flux-schnell
    4."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the networks, for the estimates."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps: whose speed is measured."""

    json: bool = False
    """Print everything as JSON on stdout, and nothing else."""


def configs() -> dict[str, type]:
    """The one config of this command."""
    return {"": InfoConfig}


def main(config: InfoConfig) -> int:
    """Describe a model; returns 0. See `InfoConfig`."""
    set_quiet(config.json)
    for name in ("batch_size", "steps"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1.")

    from diffkit.evaluation.cost import model_cost
    from diffkit.generation.card import read_card
    from diffkit.generation.engine import choose_device, choose_dtype, size_rule
    from diffkit.generation.pictures import parse_size
    from diffkit.models.cost import measure_rates
    from diffkit.models.skeleton import skeleton

    size = None if config.size is None else parse_size(config.size)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    model = skeleton(config.model, config.revision)
    rule = size_rule(model)
    size = size or rule.native
    rule.check(size)
    cost = model_cost(model, size.width, size.height)
    card = read_card(config.model, config.revision).filled(model.family)
    report = describe(model, card, size, cost)
    steps = config.steps or report["defaults"]["steps"]
    rates = measure_rates(device, dtype)
    # The scale that is an input of the network costs no second call.
    scale = report["defaults"]["guidance_scale"]
    guided = scale > 1 and not model.family.takes_guidance
    report["estimate"] = _estimate(config.batch_size, steps, cost, rates, dtype.itemsize, guided)
    report["estimate"] |= {"dtype": config.dtype, "device": device}
    print(json.dumps(report) if config.json else _text(report))
    return 0


def describe(model: LatentDiffusion, card: Card, size: Size, cost: ModelCost) -> dict[str, Any]:
    """Everything that the configs say of a model, as JSON-ready values; `card` is filled."""
    pipeline, schedule = model.pipeline(), model.schedule
    networks, classes = model.networks, model.conditioner.classes
    components = [
        {
            "name": name,
            "class": type(part).__name__,
            "parameters": cost.parameters[name] if name in networks else None,
        }
        for name, part in pipeline.components.items()
        if part is not None
    ]
    return {
        "model": model.source,
        "family": model.family.name,
        "components": components,
        "parameters": sum(cost.parameters.values()),
        "schedule": {
            "kind": schedule.kind,
            "scheduler": type(pipeline.scheduler).__name__,
            "prediction_type": schedule.prediction_type,
            "train_timesteps": schedule.num_train_timesteps,
            "zero_terminal_snr": schedule.zero_terminal_snr,
        },
        "classes": None if classes is None else {"count": classes.count, **classes.stored()},
        "capabilities": sorted(model.family.capabilities),
        "latent": {"channels": model.codec.channels, "factor": model.codec.factor},
        "defaults": {
            "steps": card.steps,
            "guidance_scale": card.guidance_scale,
        },
        "size": str(size),
        "macs": {
            "text encoders, a prompt": _macs(cost.text),
            "denoiser, a call": _macs(cost.denoiser),
            "VAE decoder, a picture": _macs(cost.decode),
        },
    }


def _macs(cost: Cost) -> dict[str, int]:
    return {"total": cost.macs, "convolutions": cost.conv_macs}


def _estimate(
    batch_size: int, steps: int, cost: ModelCost, rates: Rates, bytes_each: int, guided: bool
) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "steps": steps,
        "calls_a_step": 2 if guided else 1,
        "picture_macs": cost.macs(steps, guided),
        "memory_bytes": cost.memory(batch_size, guided, bytes_each),
        "picture_seconds": cost.seconds(steps, rates, guided),
        "matmul_macs_per_second": rates.matmul,
        "conv_macs_per_second": rates.conv,
    }


def _text(report: dict[str, Any]) -> str:
    schedule, estimate = report["schedule"], report["estimate"]
    rows = [
        (
            part["name"],
            part["class"],
            "" if part["parameters"] is None else f"{part['parameters']:,}",
        )
        for part in report["components"]
    ]
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    table = [f"  {n:<{wide[0]}}  {c:<{wide[1]}}  {p:>{wide[2]}}".rstrip() for n, c, p in rows]
    macs = [f"  {name:<24}{_mac_line(value)}" for name, value in report["macs"].items()]
    terminal = "zero" if schedule["zero_terminal_snr"] else "above zero"
    return "\n".join(
        [
            f"{report['model']}: {report['family']}, {report['parameters']:,} parameters",
            "",
            "components and parameters",
            *table,
            "",
            f"schedule: {schedule['kind']}, predicts {schedule['prediction_type']}, "
            f"{schedule['train_timesteps']} training times, terminal SNR {terminal} "
            f"({schedule['scheduler']})",
            *_class_lines(report["classes"]),
            f"capabilities: {', '.join(report['capabilities'])}",
            f"defaults: {report['defaults']['steps']} steps, "
            f"guidance {report['defaults']['guidance_scale']:g}",
            "",
            f"multiply-accumulates at {report['size']} (latents of "
            f"{report['latent']['channels']} channels, 1/{report['latent']['factor']} of the size)",
            *macs,
            f"  {'a picture':<24}{_si(estimate['picture_macs'], 'MAC')} in {estimate['steps']} "
            f"steps of {_calls(estimate['calls_a_step'])}",
            "",
            *_estimate_lines(estimate),
        ]
    )


def _estimate_lines(estimate: dict[str, Any]) -> list[str]:
    matmul = _si(estimate["matmul_macs_per_second"], "MAC/s")
    conv = _si(estimate["conv_macs_per_second"], "MAC/s")
    return [
        f"estimates for {estimate['dtype']} on {estimate['device']}",
        f"  memory  {_si(estimate['memory_bytes'], 'B')} for batches of {estimate['batch_size']}: "
        "weights and live activations, without the framework itself",
        f"  time    {estimate['picture_seconds']:.2g} s a picture, from the rates of matrix "
        f"products ({matmul}) and",
        f"          convolutions ({conv}) measured just now; memory traffic comes on top",
    ]


def _class_lines(classes: dict[str, Any] | None) -> list[str]:
    """What a model without text is conditioned on; no line for a model of text."""
    if classes is None:
        return []
    if classes["count"] == 0:
        return ["classes: none, unconditional"]
    null = classes.get("null_class")
    names = list(classes.get("id2label", {}).values())
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    guided = "no null class" if null is None else f"null class {null}"
    return [f"classes: {classes['count']}, {guided}{': ' if some else ''}{some}"]


def _calls(count: int) -> str:
    return "one call" if count == 1 else "two calls, for guidance"


def _mac_line(value: dict[str, int]) -> str:
    if value["total"] == 0:
        return "none"
    share = value["convolutions"] / value["total"]
    return f"{_si(value['total'], 'MAC')}, {share:.0%} in convolutions"


def _si(value: float, unit: str) -> str:
    """Three digits and an SI prefix: (1234567, "B") -> "1.23 MB"."""
    for prefix in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} T{unit}"
