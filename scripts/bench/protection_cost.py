"""What a step of protection costs by counting: operations and saved activations, no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from plain_attack import PlainAttack
from real_sizes import REAL_SIZES, conditioning

from diffkit.models.conditioner import Conditioning
from diffkit.models.cost import count_gradient
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.estimate import StepShape, estimate_step

__all__ = ["STEPS", "ours", "plain", "table", "words"]

STEPS = {
    "encoder only": StepShape("none"),
    "SDS": StepShape("forward"),
    "AdvDM": StepShape("backward"),
    "SDS, low VRAM": StepShape("forward", lean=True),
    "AdvDM, low VRAM": StepShape("backward", lean=True),
}


def ours(
    model: LatentDiffusion, size: int, cond: Conditioning, names: Sequence[str] = tuple(STEPS)
) -> dict[str, dict[str, float]]:
    """TFLOP with and without the products of attention, and GB saved in bf16, of our steps."""
    rows = {}
    for name in names:
        cost = estimate_step(model, size, size, STEPS[name], dtype=torch.bfloat16, cond=cond)
        rows[name] = {
            "tflop": cost.flops / 1e12,
            "tflop_with_attention": cost.flops_with_attention / 1e12,
            "saved_gb": cost.saved_bytes / 1e9,
            "memory_gb": cost.memory_bytes / 1e9,
        }
    return rows


def plain(pipeline: Any, size: int, tokens: torch.Tensor) -> dict[str, float]:
    """The same of the plain attack; `pipeline` is on the meta device."""
    images = torch.zeros(1, 3, size, size, device="meta")
    attack = PlainAttack(pipeline, tokens, images, images)
    leaf = images.clone().requires_grad_()
    cost = count_gradient(lambda: attack.loss(leaf), attack.inputs(leaf), attack.networks)
    return {
        "tflop": cost.flops_without_attention / 1e12,
        "tflop_with_attention": cost.flops / 1e12,
        "saved_gb": 2 * cost.saved_elements / 1e9,
    }


def table(names: Sequence[str] = tuple(REAL_SIZES)) -> dict[str, Any]:
    """Every step of every published model, and of the plain attack on Stable Diffusion 1.5."""
    rows: dict[str, Any] = {}
    for name in names:
        shape = REAL_SIZES[name]
        rows[f"{name}@{shape.size}"] = ours(shape.skeleton(), shape.size, conditioning(shape))
    if "SD1.5" in names:
        shape = REAL_SIZES["SD1.5"]
        with torch.device("meta"):
            pipeline = shape.build()
        pipeline.vae.eval()
        pipeline.unet.eval()
        tokens = conditioning(shape).tokens
        assert tokens is not None
        rows[f"SD1.5@{shape.size}"]["plain AdvDM"] = plain(pipeline, shape.size, tokens)
    return rows


def words(rows: dict[str, Any]) -> str:
    """The table for a person."""
    lines = ["TFLOP a step (with attention's products), activations saved in bf16"]
    for model, steps in rows.items():
        for name, row in steps.items():
            both = f"{row['tflop']:.2f} ({row['tflop_with_attention']:.2f})"
            lines.append(f"{model:16} {name:18} {both:16} {row['saved_gb']:.2f} GB")
    return "\n".join(lines)
