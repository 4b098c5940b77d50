"""Sections of the GPU check about protection: memory, gradients in half precision, step times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from bench import paired, real_sizes
from torch import Tensor

from diffkit.models.conditioner import Conditioning
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.joint_training import Examples, Training
from diffkit.protection.learner import learner
from diffkit.protection.protect import Attack, plan_for, prepared
from diffkit.protection.settings import Settings
from diffkit.protection.surrogate import Surrogate, frozen

__all__ = ["LIMITS", "protection"]

LIMITS = {"SD1.5": ("ace", True, 6e9), "SDXL": ("sds+", False, 12e9)}
"""Published models: the method, whether in two passes, and the bytes that it must stay under."""


class Setting(Protocol):
    """What is read of the check's own setting."""

    device: str

    def model(self, dtype: torch.dtype) -> LatentDiffusion:
        """A model of random weights on the device."""


@contextmanager
def ready(
    model: LatentDiffusion, cond: Conditioning, method: str, size: int, lean: bool
) -> Iterator[Attack]:
    """An attack on one picture of noise, told `cond`; surrogates that train stay untrained."""
    settings = Settings(method, views=1, steps=8)
    told = model.family.guidance_scale if model.family.takes_guidance else None
    surrogate = Surrogate(
        model.codec, model.denoiser, model.conditioner, cond.to(model.device), None, told
    )
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, size, size), generator=draws).to(torch.uint8)
    with frozen(surrogate.networks(), [model.denoiser.model] if lean else []):
        plan = plan_for(model, settings, size, size)
        pixels = pixels.to(model.device)
        yield Attack.prepare(pixels, [surrogate], settings, seeds=[0], plan=plan, lean=lean)


def peak(device: str) -> int:
    """The most bytes held since the last call."""
    found = paired.peak_memory()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return found


def steps_of(
    model: LatentDiffusion, cond: Conditioning, method: str, size: int, lean: bool
) -> dict[str, float]:
    """Median seconds of a step and the peak of some, weights included.

    A method whose surrogate trains makes one training step too.
    """
    device = model.device.type
    peak(device)
    with ready(model, cond, method, size, lean) as attack:
        assert attack.gradient is not None
        state, took = attack.pgd.start(), []
        for step in range(4):
            start = paired.synchronized_time()
            attack.pgd.advance(state, attack.gradient, step, 1)
            took.append(paired.synchronized_time() - start)
        if attack.settings.row.joint is not None:
            train(model, attack)
    return {"seconds": sorted(took[1:])[1], "peak_bytes": peak(device)}


def train(model: LatentDiffusion, attack: Attack) -> None:
    """One training step of the surrogate, on the clean picture, and a step against it."""
    assert attack.gradient is not None
    surrogate, settings = attack.gradient.surrogates[0], attack.settings
    with learner(model, settings, surrogate, 0) as trained:
        examples = Examples(model.codec, [lambda: attack.pictures.clean], [attack.gradient.plan])
        Training(trained, None, ("check",)).run(examples, 1)
        attack.gradient(attack.pgd.origin, 4)


def encoders_wait(model: LatentDiffusion) -> int:
    """Text encoders that are on the CPU during an attack; they must come back as they were."""

    def places() -> list[str]:
        return [part.device.type for part in model.conditioner.encoders.values()]

    before = [p.clone() for part in model.conditioner.encoders.values() for p in part.parameters()]
    with prepared(model, Settings("advdm", views=1)):
        during = places()
    after = [p for part in model.conditioner.encoders.values() for p in part.parameters()]
    if set(during) != {"cpu"} or set(places()) != {model.device.type}:
        raise AssertionError(f"text encoders were on {during}, and are on {places()}")
    if not all(map(torch.equal, before, after)):
        raise AssertionError("the weights of text encoders were changed by moving them")
    return len(during)


def signs(model: LatentDiffusion, cond: Conditioning, size: int) -> Tensor:
    """Signs of the gradient of AdvDM in the model's present dtype."""
    with ready(model, cond, "advdm", size, False) as attack:
        assert attack.gradient is not None
        return attack.gradient(attack.pgd.origin, 0).sign()


def published(name: str, device: str) -> tuple[LatentDiffusion, Conditioning]:
    """A published model in bf16, with random weights and without text encoders."""
    shape = real_sizes.REAL_SIZES[name]
    with torch.device(device):
        torch.manual_seed(0)
        pipeline = shape.build()
    for part in (pipeline.vae, pipeline.unet):
        part.eval().to(torch.bfloat16)
    return LatentDiffusion(pipeline), real_sizes.conditioning(shape, device)


def protection(setting: Setting) -> dict[str, Any]:
    """Steps of ACE, SDS and AdvDM: seconds and memory; bf16 against float32; published sizes."""
    model = setting.model(torch.float32)
    size, cond = model.default_size, model.conditioner.encode(["a picture"])
    waiting = encoders_wait(model)
    exact = signs(model, cond, size)
    again = float((signs(model, cond, size) == exact).float().mean())
    if again < 0.99:
        raise AssertionError(f"of two equal gradients only {again:.2%} of the signs agree")
    model.to(dtype=torch.bfloat16)
    agreement = float((signs(model, cond, size) == exact).float().mean())
    rows = {
        f"{method}{', two passes' if lean else ''}": steps_of(model, cond, method, size, lean)
        for method in ("texture", "sds+", "advdm", "ace")
        for lean in (False, True)
    }
    result: dict[str, Any] = {
        "rows": rows,
        "bf16_sign_agreement": agreement,
        "repeat_sign_agreement": again,
        "encoders_aside": waiting,
    }
    if agreement < 0.8:
        raise AssertionError(f"in bf16 only {agreement:.0%} of the gradient's signs are right")
    if setting.device != "cuda":
        return result
    if rows["sds+"]["peak_bytes"] >= rows["advdm"]["peak_bytes"]:
        raise AssertionError(f"SDS needs as much memory as AdvDM: {rows}")
    del model
    result["published"] = {}
    for name, (method, lean, limit) in LIMITS.items():
        torch.cuda.empty_cache()
        found = steps_of(*published(name, "cuda"), method, real_sizes.REAL_SIZES[name].size, lean)
        result["published"][name] = {"method": method, **found}
        if found["peak_bytes"] > limit:
            raise AssertionError(f"{name} {method}: {found['peak_bytes'] / 1e9:.2f} GB")
    return result
