"""Sections of the GPU check about fine-tuning objectives and the kernels of their distances."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diffkit.kernels.choice import Form, forced
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.perceptual.feature_distance import feature_distance, reference_distance
from diffkit.perceptual.unit_distance import unit_distance

sys.path.append(str(Path(__file__).parent / "bench"))  # whose files import one another as scripts
import lpl_step  # noqa: E402
import objective_steps  # noqa: E402
import paired  # noqa: E402

__all__ = ["kernels", "lpl_beside_script", "objectives"]

Distance = Callable[[Tensor, Tensor, Tensor | None], Tensor]

DISTANCES: dict[str, dict[str, Any]] = {
    "prediction": {},
    "prediction, detached": {"stats": "prediction_detached"},
    "target": {"stats": "target"},
    "own": {"stats": "own"},
    "channel norm": {"norm": "channel_norm_target"},
}
ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 6e-3, torch.float16: 2e-3}
SHAPES = ((3, 70, 7, 5), (1, 3, 129, 131), (2, 128, 64, 64))
MAPS = ((1, 512, 128, 128), (1, 256, 512, 512), (1, 128, 512, 512))
"""Of Stable Diffusion's decoder at 512 pixels: what is timed."""


class Setting(Protocol):
    """What is read of the check's own setting."""

    device: str
    scratch: Path

    def model(self, dtype: torch.dtype) -> LatentDiffusion:
        """A model of random weights on the device."""


# -- kernels ------------------------------------------------------------------------------------


def maps(shape: tuple[int, ...], dtype: torch.dtype, device: str, last: bool) -> list[Tensor]:
    """A prediction, a target with an offset, and a mask with an empty row."""
    draws = torch.Generator().manual_seed(0)
    target = torch.randn(shape, generator=draws) + 3
    predicted = target + 0.5 * torch.randn(shape, generator=draws)
    keep = torch.rand(shape, generator=draws) > 0.2
    keep[0, 1] = False
    order = torch.channels_last if last else torch.contiguous_format
    pair = [x.to(device, dtype).contiguous(memory_format=order) for x in (predicted, target)]
    return [*pair, keep.to(device)]


def gradient_of(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient in float64; the gradient of a sum, which float16 can hold."""
    leaf = x.clone().requires_grad_()
    value = call(leaf)
    (grad,) = torch.autograd.grad(value.sum() * x[0].numel(), leaf)
    return value.detach().double(), grad.double()


def unit(x: Tensor, y: Tensor) -> Tensor:
    """LPIPS's distance with weights of one, by its formula."""
    a, b = (maps / maps.norm(dim=1, keepdim=True) for maps in (x, y))
    return (a - b).square().sum(1).mean((1, 2))


def errors_of(
    p: Tensor, t: Tensor, keep: Tensor | None, words: dict[str, Any], form: Form
) -> tuple[float, float]:
    """Relative errors of value and gradient of `feature_distance` against float64."""
    exact = gradient_of(lambda x: reference_distance(x, t.double(), keep, **words), p.double())
    with forced(form):
        found = gradient_of(lambda x: feature_distance(x, t, keep, **words), p)
    return relative(found, exact)


def unit_errors(x: Tensor, y: Tensor, form: Form) -> tuple[float, float]:
    """The same of `unit_distance`."""
    exact = gradient_of(lambda z: unit(z, y.double()), x.double())
    with forced(form):
        found = gradient_of(lambda z: unit_distance(z, y, z.new_ones(z.shape[1])), x)
    return relative(found, exact)


def relative(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """|found - exact| / |exact| of value and gradient."""
    value, grad = (float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
    return value, grad


def worst_errors(device: str, form: Form) -> dict[str, float]:
    """The largest errors over what is allowed, over dtypes, layouts, masks and odd sizes."""
    worst = dict.fromkeys((*DISTANCES, "unit"), 0.0)
    shapes = SHAPES if device == "cuda" else SHAPES[:1]
    for shape, dtype, last in itertools.product(shapes, ROUNDING, (False, True)):
        p, t, keep = maps(shape, dtype, device, last)
        rows = [("unit", unit_errors(p, t, form))]
        for name, words in DISTANCES.items():
            rows += [(name, errors_of(p, t, mask, words, form)) for mask in (None, keep)]
        for name, (value, grad) in rows:
            worst[name] = max(worst[name], value / 1e-5, grad / ROUNDING[dtype])
    return worst


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of some calls, after two to warm up."""
    took = []
    for turn in range(repeats + 2):
        start = paired.synchronized_time()
        call()
        if turn >= 2:
            took.append(paired.synchronized_time() - start)
    return statistics.median(took)


def timed(device: str, shape: tuple[int, ...], masked: bool) -> dict[str, dict[str, float]]:
    """Seconds of value and gradient in bfloat16: kernel, reference in torch, compiled formula."""
    p, t, keep = maps(shape, torch.bfloat16, device, last=False)
    mask = keep if masked else None
    weights = p.new_ones(p.shape[1], dtype=torch.float32)
    cases: dict[str, tuple[Distance, Distance]] = {
        name: (partial(feature_distance, **words), partial(reference_distance, **words))
        for name, words in DISTANCES.items()
    }
    cases["unit"] = (
        lambda x, y, _: unit_distance(x, y, weights),
        lambda x, y, _: unit(x.float(), y.float()),
    )
    leaf = p.requires_grad_()
    rows = {}
    for name, (lean, formula) in cases.items():
        rows[name] = {
            "triton": seconds_of(lean, leaf, t, mask, "triton"),
            "torch": seconds_of(lean, leaf, t, mask, "torch"),
            "compiled": seconds_of(torch.compile(formula), leaf, t, mask, "torch"),
        }
    return rows


def seconds_of(distance: Distance, p: Tensor, t: Tensor, keep: Tensor | None, form: Form) -> float:
    """Of a value and its gradient."""
    with forced(form):
        return seconds(lambda: torch.autograd.grad(distance(p, t, keep).sum(), p), 10)


def kernels(setting: Setting) -> dict[str, Any]:
    """The fused distances: against float64, and their time against torch.compile.

    A kernel that does not beat the compiled formula on every map is not worth its lines: it fails.
    """
    cuda = setting.device == "cuda"
    errors = worst_errors(setting.device, "triton" if cuda else "torch")
    result: dict[str, Any] = {"errors_over_limit": errors}
    if wrong := {name: error for name, error in errors.items() if not error <= 1}:
        raise AssertionError(f"errors over their limits: {wrong}")
    if not cuda:
        return result
    rows = {
        f"{'x'.join(map(str, shape))}{', masked' if masked else ''}": timed("cuda", shape, masked)
        for shape in MAPS
        for masked in (False, True)
    }
    result["seconds"] = rows
    slow = [
        f"{name} on {place}: {row['triton'] * 1e3:.2f} ms, compiled {row['compiled'] * 1e3:.2f} ms"
        for place, kinds in rows.items()
        for name, row in kinds.items()
        if row["triton"] >= row["compiled"]
    ]
    if slow:
        raise AssertionError(f"slower than torch.compile: {'; '.join(slow)}")
    return result


# -- steps --------------------------------------------------------------------------------------


def objectives(setting: Setting) -> dict[str, Any]:
    """A step of every objective in bf16 over one of plain fine-tuning: seconds and peak memory."""
    model = setting.model(torch.float32)
    model.codec.to(dtype=torch.bfloat16)
    rows: dict[str, Any] = {}
    for name in objective_steps.ARMS:
        empty_cache(setting.device)
        step = objective_steps.build(name, model, 4, setting.scratch, autocast=True)
        took = seconds(step, 8)
        rows[name] = {"seconds": took, "peak_bytes": paired.peak_memory()}
        if not step().isfinite():
            raise AssertionError(f"{name}: a loss is not finite")
        del step
    plain = rows[objective_steps.BASELINE]
    for row in rows.values():
        row["time"] = row["seconds"] / plain["seconds"]
        row["memory"] = row["peak_bytes"] / plain["peak_bytes"]
    return {"batch": 4, "rows": rows}


def empty_cache(device: str) -> None:
    """Forget what was held."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def lpl_beside_script(setting: Setting) -> dict[str, Any]:
    """LPL of one sample at 512 pixels beside what diffusers' script does: time and memory."""
    cuda = setting.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    arms = lpl_step.Arms(512 if cuda else 64, setting.device, dtype, tiny=not cuda)
    ratios = lpl_step.speed(arms, 10 if cuda else 1)
    result: dict[str, Any] = {
        "time": {
            f"{r.candidate} / {r.baseline}": [1 / r.high, 1 / r.median, 1 / r.low] for r in ratios
        }
    }
    vae, peaks = arms.vae(), {}
    for name in lpl_step.ARMS:
        empty_cache(setting.device)
        held = torch.cuda.memory_allocated() if cuda else 0
        arms.step(name, vae)()
        peaks[name] = paired.peak_memory() - held
    result["peak_bytes"] = peaks
    if cuda:
        plain, low = (1 / ratio.median for ratio in ratios[:2])
        memory = peaks[lpl_step.LOW] / peaks[lpl_step.SCRIPT]
        if plain > 1 or low > 1.4 or memory > 0.4:
            raise AssertionError(
                f"over the script: time {plain:.2f}, in low memory {low:.2f} (1.4), memory "
                f"{memory:.2f} (0.4)"
            )
    return result
