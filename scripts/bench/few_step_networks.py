"""One-step pictures beside the teacher's, and training steps of discriminators and rewards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import open_clip
import paired
import torch
from few_step_metric import SIZES, latent_network, under
from few_step_setting import Setting, gradient_step, summary
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.clip import Clip
from diffkit.models.conditioner import Conditioning
from diffkit.models.discriminators import Given, twice_differentiable, unet_discriminator
from diffkit.models.eager import eager_sum
from diffkit.models.few_step import one_step
from diffkit.models.one_step import one_step_scheduler
from diffkit.objectives.adversarial_losses import (
    approximate_r1,
    discriminator_loss,
    generator_loss,
    mean_logit,
    r1_penalty,
)
from diffkit.perceptual.latent_augment import draw
from diffkit.perceptual.latent_lpips import e_latentlpips
from diffkit.rewards.base import Reward
from diffkit.rewards.clip import ClipReward
from diffkit.rewards.latent_clip import Tower
from diffkit.rewards.proxies import new_latent_clip, new_tap_proxy
from diffkit.rewards.spec import load_reward

__all__ = ["gan", "latency", "reward"]

Rows = tuple[dict[str, Any], list[paired.Ratio]]
PENALTY_EVERY = 16
GUIDANCE = 3.0


def latency(setting: Setting) -> Rows:
    """Pictures from given embeddings by stock pipelines, to tensors, as their users wait for."""
    model, batch = setting.model, setting.batch
    teacher: Any = setting.pipeline
    student = copy.copy(teacher)
    last = teacher.scheduler.config.num_train_timesteps - 1
    student.register_modules(scheduler=one_step_scheduler(model, last))
    cond, noise = setting.cond(batch), setting.latents(batch)

    def pictures(pipeline: Any, steps: int, guidance: float) -> Tensor:
        with torch.no_grad():
            return pipeline(
                **embedded(cond, guidance > 1, setting.dtype),
                latents=noise.to(setting.dtype),
                num_inference_steps=steps,
                guidance_scale=guidance,
                output_type="pt",
            ).images

    for pipeline in (teacher, student):
        pipeline.set_progress_bar_config(disable=True)
    times = torch.full((batch,), last, device=setting.device)
    with torch.no_grad():
        denoiser = setting.seconds(lambda: model.denoiser(noise, times, cond))
        decode = setting.seconds(lambda: model.codec.decode(noise))
    found = setting.compare(
        ("one step", f"{setting.steps} guided steps"),
        partial(pictures, student, 1, 1.0),
        partial(pictures, teacher, setting.steps, GUIDANCE),
    )
    calls = 2 * setting.steps
    bound = (calls * denoiser + decode) / (denoiser + decode)
    rows = {
        "one step / teacher": summary(found),
        "n": calls,
        "bound": round(bound, 2),
        "part_of_bound": round(found.median / bound, 3),
        "denoiser, ms": round(1e3 * denoiser, 2),
        "decode, ms": round(1e3 * decode, 2),
    }
    return rows, [found]


def embedded(cond: Conditioning, guided: bool, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """The pipeline's words for embeddings; the unconditional ones are as long."""
    assert cond.tokens is not None
    tokens = cond.tokens.to(dtype)
    return {"prompt_embeds": tokens, "negative_prompt_embeds": tokens if guided else None}


def gan(setting: Setting) -> Rows:
    """A step of the discriminator without a penalty, each penalty by itself, and the generator's.

    The exact penalty is of one sample, every 16th step: `r1_share` is what it adds to a mean step.
    """
    model, rows = setting.model, dict[str, Any]()
    example = Given(setting.cond(1), setting.latents(1, "noise"))
    judge = unet_discriminator(model.denoiser, example).to(setting.device)
    weights = [p for p in judge.parameters() if p.requires_grad]
    for batch in sorted({2, setting.batch}):
        given = Given(setting.cond(batch), setting.latents(batch, "noise"))
        real, fake = setting.latents(batch), setting.latents(batch, "fake")
        steps = {
            "discriminator": partial(judged, setting, judge, given, real, fake, weights),
            "r1": partial(exact, judge, given, real, weights),
            "approximate r1": partial(approximate, setting, judge, given, real, weights),
        }
        found = {name: setting.seconds(step) for name, step in steps.items()}
        rows[f"batch {batch}"] = {
            **{f"{name}, ms": round(1e3 * seconds, 2) for name, seconds in found.items()},
            "r1_share": round(found["r1"] / PENALTY_EVERY / found["discriminator"], 4),
            "peak_mib": setting.peak_mib(steps["discriminator"]),
        }
    for weight in weights:
        weight.requires_grad_(False)
    rows["generator, ms"] = round(1e3 * setting.seconds(generator(setting, judge)), 2)
    return rows, []


def judged(
    setting: Setting, judge: Any, given: Given, real: Tensor, fake: Tensor, weights: list[Tensor]
) -> Sequence[Tensor]:
    """Gradients of the discriminator's loss."""
    with setting.trained():
        maps = judge(torch.cat([real, fake]), given.twice())
    sides = zip(*(m.chunk(2) for m in maps), strict=True)
    loss = discriminator_loss(*sides).mean()
    return torch.autograd.grad(loss, weights, allow_unused=True)


def exact(judge: Any, given: Given, real: Tensor, weights: list[Tensor]) -> Sequence[Tensor]:
    """Gradients of the exact penalty of the first sample of a batch."""
    row = given.select(slice(0, 1))
    with twice_differentiable(judge):
        value = r1_penalty(lambda x: mean_logit(judge(x, row)), real[:1])
    return torch.autograd.grad(value.sum(), weights, allow_unused=True)


def approximate(
    setting: Setting, judge: Any, given: Given, real: Tensor, weights: list[Tensor]
) -> Sequence[Tensor]:
    """Gradients of the approximate penalty, the logits of the clean latents not counted."""
    with torch.no_grad(), setting.trained():
        clean = judge(real, given)
    with setting.trained():
        noisy = judge(real + 0.01 * real.roll(1), given)
    value = approximate_r1(clean, noisy, 0.01)
    return torch.autograd.grad(value.mean(), weights, allow_unused=True)


def generator(setting: Setting, judge: Any) -> Callable[[], Sequence[Tensor]]:
    """Gradients of a one-step generator with E-LatentLPIPS and the discriminator's opinion."""
    model, batch = setting.model, setting.batch
    student = copy.deepcopy(model.denoiser).to(torch.float32).requires_grad_(True)
    weights = list(student.parameters())
    network = latent_network(model.codec.channels, *SIZES["E-LatentLPIPS"], setting.device)
    cond, noise, real = setting.cond(batch), setting.latents(batch, "noise"), setting.latents(batch)
    given = Given(cond, noise)
    maps = draw(torch.Generator().manual_seed(0), real.shape, "bg").to(real.device)
    last = int(model.scheduler.config.num_train_timesteps) - 1
    times = torch.full((batch,), last, device=noise.device)

    def step() -> Sequence[Tensor]:
        with setting.trained():
            total, _, _ = eager_sum(
                [
                    lambda y, x: e_latentlpips(network, y, x, maps),
                    lambda y, x: generator_loss(judge(y, given)),
                ],
                torch.ones(2, device=noise.device),
                one_step(student, noise, cond, times),
                real,
                chunks=[None, None],
            )
        return torch.autograd.grad(total.mean(), weights, allow_unused=True)

    return step


def reward(setting: Setting) -> Rows:
    """Gradient in latents of a reward of decoded pictures, and of three proxies for it.

    The embedded scorer beside the embedded model; CLIP ViT-H/14 of random weights, the network of
    HPS v2.1, beside a large one.
    """
    model, batch = setting.model, setting.batch
    expert, text = experts(setting)
    prompts = ["red apple"] * batch
    told, latents, cond = expert.embed_prompts(prompts), setting.latents(batch), setting.cond(batch)

    def direct(z: Tensor) -> Tensor:
        return expert.score(model.codec.decode(z), told)

    baseline = gradient_step(direct, latents)
    proxies: dict[str, Callable[[Tensor], Tensor]] = {}
    taps = new_tap_proxy(model.denoiser, cond).to(setting.device)
    proxies["head on the teacher"] = lambda z: taps(z, cond)
    side = latents.shape[-1]
    towers: tuple[Tower, ...] = ("vit", "resnet") if side % 32 == 0 else ("vit",)
    for tower in towers:
        clip = new_latent_clip(model.codec, side, text, tower).to(setting.device)
        tokens = clip.text.tokens(prompts)
        proxies[f"latent {tower}"] = partial(
            proxied, clip, tokens, clip.embed_text(tokens).detach()
        )
    rows, ratios = dict[str, Any](), []
    for name, proxy in proxies.items():
        step = under(setting, gradient_step(proxy, latents))
        found = setting.compare((name, f"decoder + {expert.name}"), step, baseline)
        ratios.append(found)
        rows[name] = summary(found) | {"peak_mib": [setting.peak_mib(x) for x in (step, baseline)]}
    return rows, ratios


def proxied(clip: Any, tokens: Tensor, text: Tensor, z: Tensor) -> Tensor:
    return clip(z, tokens, text)


def experts(setting: Setting) -> tuple[Reward, str]:
    """A reward of pictures, and the text tower of its proxies."""
    device = torch.device(setting.device)
    if setting.name == "embedded":
        return load_reward("embedded", device, torch.float32), "embedded"
    if setting.device != "cuda":
        raise UserError("--parts reward: at this size it needs --device cuda; or --model embedded.")
    arch = "ViT-H-14"
    with device:
        network = open_clip.create_model(arch, pretrained=None, device=device)
    network.to(setting.dtype)
    return ClipReward(Clip(arch, arch, network, open_clip.get_tokenizer(arch))), "embedded"
