"""From recipes to pixels: through the stock pipelines of text models, or our loop for others."""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from diffkit.console import warn
from diffkit.errors import RunFailed, UserError
from diffkit.generation.inpaint import keep_known, takes_masks
from diffkit.generation.labels import sample_labels
from diffkit.generation.pictures import Size, check_size, fit, read_mask, read_picture
from diffkit.generation.recipe import Recipe
from diffkit.generation.schedulers import swap_scheduler
from diffkit.models.fingerprint import describe_config, fingerprint_module

if TYPE_CHECKING:
    from diffkit.models.families import PipelineKind
    from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = [
    "DTYPES",
    "SizeRule",
    "check_strength",
    "choose_device",
    "choose_dtype",
    "in_batches",
    "render",
    "size_rule",
    "takes_guidance",
    "weights_digest",
]

_FLOW_LCM = "FlowMatchLCMScheduler"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> str:
    """`"auto"` is CUDA, then MPS, then the CPU. Raises `UserError` for a device that is absent."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: is not here ({reason}); try cpu.") from error
    return name


def choose_dtype(name: str, device: str) -> torch.dtype:
    """The torch dtype of a flag; float16 on a CPU is refused with `UserError`."""
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: unknown. Known: {', '.join(DTYPES)}.")
    if name == "fp16" and torch.device(device).type == "cpu":
        raise UserError("--dtype fp16: not on a CPU; use fp32, or bf16 for half the memory.")
    return DTYPES[name]


class SizeRule(NamedTuple):
    """Which picture sizes a model makes: its own, whole multiples, and the largest side."""

    native: Size
    multiple: int
    largest: int | None

    def check(self, size: Size) -> None:
        """Raise `UserError` naming the nearest sizes when this one cannot be made."""
        check_size(size, self.multiple, self.largest)


def size_rule(model: LatentDiffusion) -> SizeRule:
    """Read a model's `SizeRule` out of its configs."""
    factor, geometry = model.codec.factor, model.denoiser.geometry
    height, width = geometry.sample
    largest = None if geometry.largest is None else geometry.largest * factor
    unit = factor * geometry.patch
    if model.conditioner.classes is None:
        # Stock pipelines ask for multiples of 8 whatever the codec's factor is.
        unit = math.lcm(8, unit)
    return SizeRule(Size(width * factor, height * factor), unit, largest)


def takes_guidance(model: LatentDiffusion) -> bool:
    """True for a network with the guidance scale as an input (LCM, Flux-dev): one call makes a
    step, so a negative prompt has no part in it."""
    return model.family.takes_guidance


def weights_digest(model: LatentDiffusion) -> str:
    """Digest of everything loaded that decides pixels: networks, LoRAs, the scheduler's config, and
    what the family does to prompts with the packages that are installed."""
    parts = [fingerprint_module(part, name) for name, part in sorted(model.networks.items())]
    scheduler = model.pipeline().scheduler
    parts.append(type(scheduler).__name__ + describe_config(scheduler.config))
    if model.conditioner.classes is not None:
        parts.append(describe_config(model.conditioner.classes.stored()))
    if rules := model.family.prompt_rules():
        parts.append(rules)
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


def check_strength(strength: float, steps: int) -> None:
    """Refuse a strength outside (0, 1], or so small that no step is left, with `UserError`."""
    if not 0 < strength <= 1:
        raise UserError(f"--strength {strength:g}: must be above 0 and at most 1.")
    if int(steps * strength) < 1:
        least = math.ceil(1 / strength)
        raise UserError(
            f"--strength {strength:g}: leaves none of {steps} steps; give --steps {least} or more."
        )


def render(
    model: LatentDiffusion, recipes: Sequence[Recipe], output_type: str = "pil"
) -> list[Any]:
    """Make one batch of pictures.

    Every picture draws all its noise, that of stochastic samplers included, from a CPU generator
    of its own seed, so the batch split changes floats by rounding only.

    Args:
        model: loaded and on its device, LoRAs applied.
        recipes: at least one; alike in everything but prompt, negative, index and seed.
        output_type: "pil" for RGB pictures, "pt" for float tensors (3, H, W) in [0, 1].

    Returns:
        One picture a recipe. Inpainted "pil" pictures keep the input's pixels outside the mask.
    """
    if model.conditioner.classes is not None:
        with _sampler(model, model.pipeline(), recipes[0]) as pipeline:
            made = sample_labels(model, recipes, pipeline.scheduler).cpu()
        return list(made) if output_type == "pt" else pipeline.numpy_to_pil(_channels_last(made))
    if len({bool(recipe.negative) for recipe in recipes}) == 2:
        return _render_apart(model, recipes, output_type)
    first = recipes[0]
    size = Size(first.width, first.height)
    picture = None if first.image is None else fit(read_picture(first.image), size)
    mask = None if first.mask is None else fit(read_mask(first.mask), size)
    arguments: dict[str, Any] = {
        "prompt": [recipe.prompt for recipe in recipes],
        "num_inference_steps": first.steps,
        "generator": [torch.Generator("cpu").manual_seed(recipe.seed) for recipe in recipes],
        "output_type": output_type,
    }
    family, negatives = model.family, [recipe.negative for recipe in recipes]
    arguments |= family.pipeline_arguments(family, first.guidance, negatives)
    kind, more = _kind(model, recipes, picture, mask)
    generators = arguments["generator"]
    with _sampler(model, model.pipeline(kind), first, generators) as pipeline:
        arguments |= _few_step_times(pipeline.scheduler, first.steps)
        images: list[Any] = list(pipeline(**arguments, **more).images)
    if output_type == "pil" and picture is not None and mask is not None:
        images = [Image.composite(image, picture, mask) for image in images]
    return images


def _channels_last(images: Tensor) -> Any:
    return images.permute(0, 2, 3, 1).numpy()


def _render_apart(model: LatentDiffusion, recipes: Sequence[Recipe], output_type: str) -> list[Any]:
    """`render` in two calls, as a pipeline has a negative prompt for all pictures or for none."""
    made = {}
    for negated in (False, True):
        part = [recipe for recipe in recipes if bool(recipe.negative) == negated]
        made[negated] = iter(render(model, part, output_type))
    return [next(made[bool(recipe.negative)]) for recipe in recipes]


def _kind(
    model: LatentDiffusion,
    recipes: Sequence[Recipe],
    picture: Image.Image | None,
    mask: Image.Image | None,
) -> tuple[PipelineKind, dict[str, Any]]:
    """The stock pipeline for these recipes, and the arguments that only it takes."""
    first, count = recipes[0], len(recipes)
    size = {"width": first.width, "height": first.height}
    if picture is None:
        return "text2image", size
    start = {"image": [picture] * count, "strength": first.strength}
    again: Any = model.family.pipeline_class("image2image").__call__
    if "height" in inspect.signature(again).parameters:
        start |= size  # SD3 would scale the picture to the model's own size
    if mask is None:
        return "image2image", start
    if takes_masks(model):
        return "inpaint", {**size, **start, "mask_image": [mask] * count}
    seeds = [recipe.seed for recipe in recipes]
    keep = {"callback_on_step_end": keep_known(model, picture, mask, seeds)}
    # At full strength nothing of the repainted part may shine through: it starts as pure noise.
    if first.strength == 1:
        return "text2image", {**size, **keep}
    return "image2image", {**start, **keep}


def _few_step_times(scheduler: Any, steps: int) -> dict[str, Any]:
    """Times for the one scheduler whose own are wrong: shifted twice, so that the last of few steps
    would be made where hardly any noise is left. Before the shift they are (n - i) / n."""
    if type(scheduler).__name__ != _FLOW_LCM:
        return {}
    return {"sigmas": [(steps - i) / steps for i in range(steps)]}


@contextmanager
def _sampler(
    model: LatentDiffusion,
    pipeline: Any,
    recipe: Recipe,
    generators: list[torch.Generator] | None = None,
) -> Iterator[Any]:
    """The pipeline with the recipe's scheduler; the model's own is put back afterwards.

    Pipelines of flow models give no generator to a scheduler that adds noise; it gets them here.
    """
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler
    if recipe.scheduler is not None:
        pipeline.scheduler = swap_scheduler(
            own,
            recipe.scheduler,
            model.schedule.kind,
            model.schedule.prediction_type,
            from_noise=recipe.image is None,
            spacing=model.family.flow_spacing,
        )
    if type(pipeline.scheduler).__name__ == _FLOW_LCM:
        seeded = copy.deepcopy(pipeline.scheduler)
        seeded.step = partial(seeded.step, generator=generators)
        pipeline.scheduler = seeded
    try:
        yield pipeline
    finally:
        pipeline.scheduler = own


def in_batches(
    recipes: Sequence[Recipe],
    batch_size: int,
    make: Callable[[Sequence[Recipe]], Sequence[Image.Image]],
) -> Iterator[tuple[Recipe, Image.Image]]:
    """Yield (recipe, picture) in order; a batch that does not fit in memory is halved.

    Raises:
        RunFailed: not even one picture fits.
    """
    done = 0
    while done < len(recipes):
        batch = recipes[done : done + batch_size]
        images = _try_batch(batch, make)
        if images is None:
            batch_size = len(batch) // 2
            torch.cuda.empty_cache()
            warn(f"out of memory with {len(batch)} pictures at once; going on with {batch_size}")
            continue
        yield from zip(batch, images, strict=True)
        done += len(batch)


def _try_batch(
    batch: Sequence[Recipe], make: Callable[[Sequence[Recipe]], Sequence[Image.Image]]
) -> Sequence[Image.Image] | None:
    try:
        return make(batch)
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise RunFailed(
                f"out of memory with one picture of {batch[0].width}x{batch[0].height}; "
                "try --dtype bf16 or a smaller --size. Finished pictures are kept."
            ) from error
        # Returning, not continuing, frees the frames that hold the failed batch's tensors.
        return None
