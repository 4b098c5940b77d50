"""What a protection will cost before it starts: operations, time and memory.

A step is one encoder pass forward and back, and for each draw no, a forward, or a forward and a
backward pass of the denoiser. Everything is counted on the networks themselves, usually without
their weights (`diffkit.models.skeleton`).

Plain: the encoder's graph lives while the denoiser runs. Lean: the encoder runs forward twice and
keeps only the inputs of its pieces, and the denoiser computes its activations again block by block:

    plain   E_f + E_b + K (D_f + D_b)           peak: saved(E) + peak(D)
    lean    2 E_f + E_b + K (2 D_f + D_b)       peak: inputs(E) + peak(one block of D)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffkit.models.conditioner import Conditioning
from diffkit.models.cost import (
    Cost,
    GradientCost,
    Rates,
    count,
    count_gradient,
    count_vjp,
    parameter_count,
)
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.sparing import sparing
from diffkit.protection.editing import STEPS, photoguard_diffusion
from diffkit.protection.gradients import HELD_OUT
from diffkit.protection.methods import Passes
from diffkit.protection.settings import Settings
from diffkit.protection.surrogate import Surrogate, frozen

__all__ = ["Estimate", "StepCost", "StepShape", "estimate_step", "in_bytes", "in_time"]


@dataclass(frozen=True)
class StepShape:
    """What one gradient of one view runs through.

    Attributes:
        denoiser: passes of the denoiser that a draw needs.
        lean: two passes and recomputed activations.
        draws: K.
        transformed: every draw sees another picture and has an encoder pass of its own.
        unrolled: steps of a sampler in the graph of one draw, each computed again in the backward
            pass, with the decoded picture at its end; 0 is one call of the denoiser and no picture.
        guided: each of these steps calls the denoiser twice.
        batch: pictures at once.
    """

    denoiser: Passes = "none"
    lean: bool = False
    draws: int = 1
    transformed: bool = False
    unrolled: int = 0
    guided: bool = False
    batch: int = 1

    @classmethod
    def of(cls, settings: Settings, *, lean: bool = False, batch: int = 1) -> StepShape:
        """That of a method with its options."""
        row = settings.row
        unrolled = row.loss is photoguard_diffusion
        return cls(
            denoiser=row.denoiser,
            lean=lean,
            draws=row.draws if settings.draws is None else settings.draws,
            transformed=bool(settings.transforms),
            unrolled=STEPS if unrolled else 0,
            guided=unrolled and settings.shown_prompt != "",
            batch=batch,
        )


@dataclass(frozen=True)
class StepCost:
    """One gradient of one view of a batch.

    Attributes:
        passes: every pass of a network for one picture: (how often, its cost).
        score: the passes behind one value of J on the held-out draws.
        batch: pictures at once.
        weight_bytes: of the networks that the step runs through.
        saved_bytes: activations that wait for their backward pass when most do.
        memory_bytes: estimated peak: weights and all live activations of the batch. Workspaces of
            kernels and the memory of the framework itself are not in it.
    """

    passes: tuple[tuple[int, Cost], ...]
    score: tuple[tuple[int, Cost], ...]
    batch: int
    weight_bytes: int
    saved_bytes: int
    memory_bytes: int

    @property
    def flops(self) -> int:
        """Floating-point operations of layers with weights: 2 a multiply-accumulate."""
        return self.batch * sum(n * cost.flops_without_attention for n, cost in self.passes)

    @property
    def flops_with_attention(self) -> int:
        """The same with the products of queries, keys and values."""
        return self.batch * sum(n * cost.flops for n, cost in self.passes)

    def seconds(self, rates: Rates) -> float:
        """Estimated seconds at measured rates, memory traffic left out."""
        return self.batch * rates.seconds(*_repeated(self.passes))

    def score_seconds(self, rates: Rates) -> float:
        """The same of one value of J."""
        return self.batch * rates.seconds(*_repeated(self.score))


@dataclass(frozen=True)
class Estimate:
    """A whole job.

    Attributes:
        step: of one view; its batch is one picture of `pictures` or several.
        steps: sign steps a picture.
        views: a step.
        pictures: all of the job.
        rates: of the machine; None where the time is not known.
        scores: values of J a picture: before, after, and where the best iterate is kept between.
    """

    step: StepCost
    steps: int
    views: int = 1
    pictures: int = 1
    rates: Rates | None = None
    scores: int = 2

    @property
    def flops(self) -> int:
        """Floating-point operations of the gradients, attention's products left out."""
        return self.step.flops // self.step.batch * self.steps * self.views * self.pictures

    @property
    def seconds(self) -> float | None:
        """Estimated seconds at `rates`; None without them."""
        if self.rates is None:
            return None
        gradients = self.step.seconds(self.rates) * self.steps
        values = self.step.score_seconds(self.rates) * self.scores
        return (gradients + values) * self.views * self.pictures / self.step.batch

    @property
    def memory_bytes(self) -> int:
        """Estimated peak, see `StepCost`."""
        return self.step.memory_bytes

    def words(self) -> str:
        """For a person: "about 4 min, 2.3 GB"."""
        storage = in_bytes(self.memory_bytes)
        return storage if self.seconds is None else f"{in_time(self.seconds)}, {storage}"


def estimate_step(
    model: LatentDiffusion,
    height: int,
    width: int,
    shape: StepShape,
    *,
    dtype: torch.dtype | None = None,
    cond: Conditioning | None = None,
) -> StepCost:
    """Count one gradient of one view of height x width pixels.

    A model on the meta device is counted in no time and memory; any other runs one step in earnest.

    Args:
        model: usually a `skeleton`.
        height, width: of the view, multiples that the model takes.
        shape: what is done.
        dtype: of weights and activations, for the bytes; the model's own by default.
        cond: what the denoiser is told, a batch of one; by default a prompt of one letter, encoded.
    """
    dtype = dtype or model.dtype
    size, own = dtype.itemsize, model.codec.computes(dtype).itemsize
    denoiser = model.denoiser if shape.denoiser != "none" else None
    networks = Surrogate(model.codec, denoiser).networks()
    lean = [model.denoiser.model] if shape.lean and shape.denoiser == "backward" else []
    with frozen(networks, lean):
        encoder = _encoder(model, height, width, shape.lean)
        encode = count(lambda: model.codec.encode_moments(_picture(model, height, width)))
        head = _Head.of(model, height, width, shape, cond, own // size)
    rounds = shape.draws if shape.transformed else 1
    passes = [(rounds, encoder.forward), (rounds, encoder.backward)]
    passes += [(shape.draws * n, cost) for n, cost in head.passes]
    peak = max(own * encoder.peak_elements, own * encoder.saved_elements + size * head.peak)
    weights = size * sum(parameter_count(network) for network in networks)
    if own != size and isinstance(model.codec.vae, nn.Module):
        weights += own * parameter_count(model.codec.vae)  # computes on a copy
    return StepCost(
        passes=tuple(passes),
        score=((1, encode), *((HELD_OUT * n, cost) for n, cost in head.score)),
        batch=shape.batch,
        weight_bytes=weights,
        saved_bytes=shape.batch * (own * encoder.saved_elements + size * head.saved),
        memory_bytes=weights + shape.batch * peak,
    )


@dataclass(frozen=True)
class _Head:
    """What happens between the encoder's two passes, for one draw.

    saved and peak are in elements of the denoiser's size, of which one of the codec's may be two.
    """

    passes: tuple[tuple[int, Cost], ...] = ()
    score: tuple[tuple[int, Cost], ...] = ()
    saved: int = 0
    peak: int = 0

    @classmethod
    def of(
        cls,
        model: LatentDiffusion,
        height: int,
        width: int,
        shape: StepShape,
        cond: Conditioning | None,
        wide: int,
    ) -> _Head:
        if shape.denoiser == "none":
            return cls()
        if cond is None:
            cond = model.conditioner.encode([model.conditioner.example], (height, width))
        call, z = _denoiser(model, height, width, cond)
        forward = count(call)
        if shape.denoiser == "forward":
            return cls(((1, forward),), ((1, forward),), 0, forward.peak_elements)
        both = count_gradient(call, z, [model.denoiser])
        if shape.unrolled == 0:
            passes = ((1, both.forward), (1, both.backward))
            return cls(passes, ((1, forward),), both.saved_elements, both.peak_elements)
        decoder = _decoder(model, height, width)
        return cls._unrolled(forward, both, decoder, z.numel(), shape, wide)

    @classmethod
    def _unrolled(
        cls,
        forward: Cost,
        both: GradientCost,
        decoder: GradientCost,
        latents: int,
        shape: StepShape,
        wide: int,
    ) -> _Head:
        """A sampler whose steps keep their latents only, and the decoded picture."""
        halves = 2 if shape.guided else 1
        calls = halves * shape.unrolled
        again = ((calls, forward), (calls, both.forward), (calls, both.backward))
        passes = (*again, (1, decoder.forward), (1, decoder.backward))
        kept = shape.unrolled * latents
        step = (halves - 1) * both.saved_elements + both.peak_elements
        return cls(
            passes,
            ((calls, forward), (1, decoder.forward)),
            kept + wide * decoder.saved_elements,
            kept + max(step, wide * decoder.peak_elements),
        )


def _picture(model: LatentDiffusion, height: int, width: int) -> Tensor:
    return torch.zeros(1, 3, height, width, device=model.device)


def _encoder(model: LatentDiffusion, height: int, width: int, lean: bool) -> GradientCost:
    codec, x = model.codec, _picture(model, height, width)
    if lean:
        return count_vjp(lambda cotangent: codec.encode_moments_vjp(x, cotangent))
    x.requires_grad_()

    def encode() -> Tensor:
        with sparing(x):
            return codec.encode_moments(x)

    return count_gradient(encode, x, Surrogate(codec).networks())


def _decoder(model: LatentDiffusion, height: int, width: int) -> GradientCost:
    codec = model.codec
    z = torch.zeros(1, *codec.latent_shape(height, width), device=model.device).requires_grad_()
    networks = Surrogate(codec).networks()
    return count_gradient(lambda: codec.decode(z, checkpoint="resnet"), z, networks)


def _denoiser(
    model: LatentDiffusion, height: int, width: int, cond: Conditioning
) -> tuple[Callable[[], Tensor], Tensor]:
    """A call of the denoiser, and the z_t that its gradient is wanted at."""
    _, h, w = model.codec.latent_shape(height, width)
    z = torch.zeros(1, model.denoiser.geometry.channels, h, w, device=model.device)
    t = torch.ones(1, device=model.device)
    told = t if model.family.takes_guidance else None
    return (lambda: model.denoiser(z, t, cond, told)), z.requires_grad_()


def _repeated(passes: tuple[tuple[int, Cost], ...]) -> list[Cost]:
    return [cost for n, cost in passes for _ in range(n)]


def in_time(seconds: float) -> str:
    """Time in words: "under a second", "about 40 s", "about 4 min", "about 2.5 h"."""
    if seconds < 1:
        return "under a second"
    if seconds < 99.5:
        return f"about {seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.2g} h"


def in_bytes(count: int) -> str:
    """Memory in words, decimal: "350 MB", "2.3 GB"."""
    if count < 999.5e6:
        return f"{count / 1e6:.0f} MB"
    return f"{count / 1e9:.1f} GB"
