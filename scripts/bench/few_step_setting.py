"""The model, its inputs and the clock of the benchmark of few-step training."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import paired
import real_sizes
import torch
from torch import Tensor

from diffkit.models.conditioner import Conditioning
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.randomness import normal

__all__ = ["MODELS", "Setting", "gradient_step", "summary"]

MODELS = ("embedded", "SD1.5")

Call = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """What is measured, and how often."""

    name: str
    device: str
    batch: int
    steps: int
    pairs: int

    @property
    def dtype(self) -> torch.dtype:
        """Of frozen networks."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @cached_property
    def pipeline(self) -> Any:
        """The teacher as its users call it."""
        if self.name == "embedded":
            return self.model.pipeline()
        torch.manual_seed(0)
        with torch.device(self.device):
            pipeline = real_sizes.REAL_SIZES[self.name].build()
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                torch.nn.Module.to(part, dtype=self.dtype).eval().requires_grad_(False)
        return pipeline

    @cached_property
    def model(self) -> LatentDiffusion:
        """The teacher, frozen."""
        if self.name == "embedded":
            return LatentDiffusion.load("embedded", device=self.device, dtype=self.dtype)
        return LatentDiffusion(self.pipeline)

    def cond(self, count: int) -> Conditioning:
        """What `count` prompts are encoded to."""
        if self.name == "embedded":
            return self.model.conditioner.encode(["red apple"] * count)
        one = real_sizes.conditioning(real_sizes.REAL_SIZES[self.name], self.device)
        return one.select(torch.zeros(count, dtype=torch.int64, device=self.device))

    def latents(self, count: int, name: str = "latents") -> Tensor:
        """Standard normal latents (count, C, h, w) in float32."""
        side = self.model.default_size
        return normal((count, *self.model.latent_shape(side, side)), 0, name).to(self.device)

    def trained(self) -> AbstractContextManager[Any]:
        """The precision in which trained networks compute."""
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds: of this process on a CPU, after the device has finished on a GPU."""
        return time.process_time if self.device == "cpu" else paired.synchronized_time

    def compare(
        self,
        names: tuple[str, str],
        candidate: Callable[[], object],
        baseline: Callable[[], object],
    ) -> paired.Ratio:
        """seconds(baseline) / seconds(candidate), turn by turn."""
        return paired.measure(
            candidate, baseline, names=names, pairs=self.pairs, warmup=2, clock=self.clock
        )

    def seconds(self, call: Callable[[], object]) -> float:
        """The median of as many calls."""
        for _ in range(2):
            call()
        found = []
        for _ in range(self.pairs):
            start = self.clock()
            call()
            found.append(self.clock() - start)
        return sorted(found)[len(found) // 2]

    def peak_mib(self, call: Callable[[], object]) -> float | None:
        """MiB that a call holds at most beside what was there; None without a GPU."""
        if self.device != "cuda":
            return None
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def gradient_step(loss: Callable[[Tensor], Tensor], latents: Tensor) -> Callable[[], Tensor]:
    """A call that gives the gradient of the sum of loss(latents), (B,), in the latents."""
    start = latents.detach().requires_grad_()

    def step() -> Tensor:
        return torch.autograd.grad(loss(start).sum(), start)[0]

    return step


def summary(found: paired.Ratio) -> dict[str, Any]:
    """A comparison for the report; the milliseconds are the medians of both sides."""
    sides = found.candidate_seconds, found.baseline_seconds
    return {
        "times_faster": round(found.median, 2),
        "interval": [round(found.low, 2), round(found.high, 2)],
        "milliseconds": [round(1e3 * sorted(side)[len(side) // 2], 2) for side in sides],
    }
