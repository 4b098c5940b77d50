"""What the card of a few-step model says of its use: lines that run as they stand."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from diffkit.models.few_step import scheduler_options
from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["few_step_card"]


def few_step_card(
    model: LatentDiffusion, sampling: Mapping[str, Any], lora: bool
) -> dict[str, Any]:
    """ "loading" of `ModelCard`: Python for stock diffusers, after the line that loads the model.

    "command" where no stock pipeline samples such a model: U-Nets with classes, those that predict
    a variance too, and flows without text, whose pipelines take no sampling times.

    Arguments:
        model: the student.
        sampling: "guidance_scale" and "steps" of the result's diffkit.json.
        lora: the result is a LoRA; the pipeline of its base model has to be given the scheduler.
    """
    pipeline = model.family.pipeline_class(model.family.kind)
    taken = inspect.signature(pipeline.__call__).parameters
    steps, timed = sampling["steps"], type(model.scheduler).__name__ == "FlowMatchLCMScheduler"
    classes, config = model.conditioner.classes, model.denoiser.model.config
    if classes is not None and "class_labels" not in taken:
        variance = config.out_channels != config.in_channels  # type: ignore[union-attr]
        if classes.count or variance or timed:
            prompt, said = ("0 ", "  # a class, or its name") if classes.count else ("", "")
            return {"command": f"diffkit generate {prompt}--model THIS --output pictures{said}"}
    arguments = [f"num_inference_steps={steps}"]
    if "prompt" in taken:
        arguments.insert(0, '"..."')
    if "class_labels" in taken:
        arguments.insert(0, "class_labels=[0]")
    if "guidance_scale" in taken:
        arguments.append(f"guidance_scale={sampling['guidance_scale']}")
    if timed:
        arguments.append(f"sigmas=[1 - i / {steps} for i in range({steps})]")
    lines = _lora_lines(model.scheduler) if lora else []
    return {"loading": [*lines, f"image = pipeline({', '.join(arguments)}).images[0]"]}


def _lora_lines(scheduler: Any) -> list[str]:
    lines = ['pipeline.load_lora_weights("THIS")  # this folder, or its hub id']
    if (options := scheduler_options(scheduler)) is not None:
        name, config = type(scheduler).__name__, "pipeline.scheduler.config"
        words = [f"{k}={json.dumps(v) if isinstance(v, str) else v}" for k, v in options.items()]
        made = f"{name}.from_config({', '.join([config, *words])})"
        lines = [f"from diffusers import {name}", f"pipeline.scheduler = {made}", *lines]
    return lines
