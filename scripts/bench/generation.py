"""Making one picture with diffkit beside the stock diffusers pipeline, with the embedded model.

    python scripts/bench/generation.py --pairs 20 --threads 2 --output outputs/bench

One prompt, 25 guided steps, batch 1, equal seeds. Two ways against `StableDiffusionPipeline` as its
users call it: `render`, which is what `diffkit generate` does, and `sample`, the own loop through
`Denoiser` and `Schedule` that methods use. The pictures of all three are compared first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import paired
import torch
from diffusers import DiffusionPipeline

from diffkit.generation.card import read_card
from diffkit.generation.engine import render
from diffkit.generation.plan import Request, plan
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.loading import resolve
from diffkit.models.sampling import sample

SEED = 0


def stock(source: str, prompt: str, steps: int, guidance: float) -> Callable[[], torch.Tensor]:
    """What a user of plain diffusers writes."""
    pipeline: Any = DiffusionPipeline.from_pretrained(resolve(source), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def make() -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED)
        options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
        return pipeline(prompt, generator=generator, **options).images

    return make


def rendered(source: str, prompt: str, steps: int, guidance: float) -> Callable[[], torch.Tensor]:
    """What `diffkit generate` does for each batch."""
    model = LatentDiffusion.load(source)
    request = Request((prompt,), model=source, steps=steps, guidance=guidance, seed=SEED)
    recipes = plan(request, model)
    return lambda: torch.stack(list(render(model, recipes, "pt")))


def looped(source: str, prompt: str, steps: int, guidance: float) -> Callable[[], torch.Tensor]:
    """The loop that training methods and evaluations build on."""
    model = LatentDiffusion.load(source)
    size = model.default_size
    shape = (1, *model.latent_shape(size, size))

    @torch.no_grad()
    def make() -> torch.Tensor:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
        cond = model.conditioner.encode([prompt], (size, size))
        null = model.conditioner.null(1, (size, size))
        options = {"steps": steps, "guidance_scale": guidance}
        latents = sample(model.denoiser, noise, cond, null, **options)
        return (model.codec.decode(latents) / 2 + 0.5).clamp(0, 1)

    return make


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare pictures, then times; write OUTPUT/generation.json."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    card = read_card(args.model)
    prompt = card.example_prompts[0] if card.example_prompts else "a picture"
    settings = (args.model, prompt, args.steps, card.guidance(7.5))
    plain = stock(*settings)
    ratios, differences = [], {}
    for name, make in (("render", rendered(*settings)), ("sample", looped(*settings))):
        differences[name] = float((make() - plain()).abs().max())
        ratios.append(paired.measure(make, plain, names=(name, "stock"), pairs=args.pairs))
    results = {"steps": args.steps, "prompt": prompt, "picture_difference": differences}
    paired.save(args.output / "generation.json", results, ratios)


if __name__ == "__main__":
    main()
