"""Samplers by short name, for the models that they can serve."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers

from diffkit.errors import UserError
from diffkit.models.schedule import FlowSpacing

__all__ = ["SCHEDULERS", "SchedulerChoice", "scheduler_names", "swap_scheduler"]

Kind = Literal["ddpm", "flow", "edm"]

# Values of a model's noise schedule: a scheduler that does not take one would sample from another
# schedule than the model was trained on, without a word.
_MODEL_SETTINGS = ("rescale_betas_zero_snr", "use_dynamic_shifting", "shift_terminal")


@dataclass(frozen=True)
class SchedulerChoice:
    """A diffusers scheduler, the model kind it samples, and what it cannot do.

    Attributes:
        class_name: its name in diffusers.
        kind: "ddpm" (epsilon, v and x0 models), "flow" or "edm".
        settings: config values that make the class what the name says.
        refuses: prediction types that the class does not implement.
        from_noise_only: it cannot start from a noised picture in diffusers' pipelines.
    """

    class_name: str
    kind: Kind
    settings: Mapping[str, Any] = field(default_factory=dict)
    refuses: tuple[str, ...] = ()
    from_noise_only: bool = False


_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

SCHEDULERS: dict[str, SchedulerChoice] = {
    "ddim": SchedulerChoice("DDIMScheduler", "ddpm"),
    "ddpm": SchedulerChoice("DDPMScheduler", "ddpm"),
    "dpm++": SchedulerChoice(
        "DPMSolverMultistepScheduler", "ddpm", {"algorithm_type": "dpmsolver++"}
    ),
    "dpm++-sde": SchedulerChoice(
        "DPMSolverMultistepScheduler", "ddpm", {"algorithm_type": "sde-dpmsolver++"}
    ),
    "euler": SchedulerChoice("EulerDiscreteScheduler", "ddpm"),
    "euler-a": SchedulerChoice("EulerAncestralDiscreteScheduler", "ddpm", refuses=("sample",)),
    "heun": SchedulerChoice("HeunDiscreteScheduler", "ddpm", refuses=("sample",)),
    "lcm": SchedulerChoice("LCMScheduler", "ddpm"),
    "pndm": SchedulerChoice("PNDMScheduler", "ddpm", {"skip_prk_steps": True}, ("sample",)),
    "unipc": SchedulerChoice("UniPCMultistepScheduler", "ddpm"),
    "flow-euler": SchedulerChoice("FlowMatchEulerDiscreteScheduler", "flow"),
    "flow-lcm": SchedulerChoice("FlowMatchLCMScheduler", "flow"),
    "flow-heun": SchedulerChoice("FlowMatchHeunDiscreteScheduler", "flow"),
    "flow-dpm++": SchedulerChoice(
        "DPMSolverMultistepScheduler", "flow", _FLOW, from_noise_only=True
    ),
    "flow-unipc": SchedulerChoice("UniPCMultistepScheduler", "flow", _FLOW, from_noise_only=True),
    "edm-euler": SchedulerChoice("EDMEulerScheduler", "edm"),
    "edm-dpm++": SchedulerChoice("EDMDPMSolverMultistepScheduler", "edm"),
}
_MODELS = {"ddpm": "a DDPM-type model", "flow": "a flow-matching model", "edm": "an EDM model"}
_SAFE = {"ddpm": "ddim", "flow": "flow-euler", "edm": "edm-euler"}


def scheduler_names(kind: Kind) -> list[str]:
    """The short names that serve models of this kind."""
    return [name for name, choice in SCHEDULERS.items() if choice.kind == kind]


def swap_scheduler(
    scheduler: Any,
    name: str,
    kind: Kind,
    prediction_type: str,
    *,
    from_noise: bool = True,
    spacing: FlowSpacing = "scheduler",
) -> Any:
    """A new scheduler called `name` that keeps the noise schedule of the model's own `scheduler`.

    Betas or EDM's sigmas, prediction type, timestep spacing, flow shift and zero-terminal-SNR
    rescaling are carried over; latents are never clipped unless the model's own scheduler says so.

    Args:
        scheduler: the model's diffusers scheduler.
        kind, prediction_type: those of the model's `Schedule`.
        from_noise: false when sampling starts from a picture.
        spacing: the model family's, see `Schedule.from_scheduler`.

    Raises:
        UserError: an unknown name, one of the other kind, or one that would lose a setting.
    """
    if name not in SCHEDULERS:
        raise UserError(f"--scheduler {name}: unknown. For this model: {_list(kind)}.")
    choice = SCHEDULERS[name]
    if choice.kind != kind:
        raise UserError(
            f"--scheduler {name}: not for {_MODELS[kind]}. For this one: {_list(kind)}."
        )
    if prediction_type in choice.refuses:
        raise UserError(f"--scheduler {name}: has no {prediction_type} prediction; try ddim.")
    if choice.from_noise_only and not from_noise:
        raise UserError(f"--scheduler {name}: cannot start from a picture; try flow-euler.")
    target = getattr(diffusers, choice.class_name)
    accepted = inspect.signature(target.__init__).parameters
    config = dict(scheduler.config)
    lost = [key for key in _MODEL_SETTINGS if config.get(key) and key not in accepted]
    if lost:
        raise UserError(
            f"--scheduler {name}: does not know {' and '.join(lost)}, which this model was "
            f"trained with; try {_SAFE[kind]}."
        )
    settings = dict(choice.settings)
    if "clip_sample" in accepted and "clip_sample" not in config:
        settings["clip_sample"] = False  # latents leave [-1, 1], the classes' default range
    if kind == "flow" and "flow_shift" in accepted:
        settings["flow_shift"] = config.get("shift", 1.0)
    if spacing == "fractions" and not _takes_fractions(target, scheduler.config, settings):
        raise UserError(
            f"--scheduler {name}: cannot take the times that this model's pipeline hands to it; "
            "try flow-euler."
        )
    return target.from_config(scheduler.config, **settings)


def _takes_fractions(target: Any, config: Any, settings: Mapping[str, Any]) -> bool:
    """Whether Flux's pipelines could set the times: they give mu, and sigmas where these are taken
    from outside. The classes say what they refuse only by refusing it."""
    times = {} if settings.get("use_flow_sigmas") else {"sigmas": [1.0, 0.5]}
    try:
        target.from_config(config, **settings).set_timesteps(2, mu=1.0, **times)
    except (TypeError, ValueError, AssertionError):
        return False
    return True


def _list(kind: Kind) -> str:
    return ", ".join(scheduler_names(kind))
