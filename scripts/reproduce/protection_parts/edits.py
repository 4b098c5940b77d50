"""What an editor makes of a version of the pictures, and how far two versions' edits lie apart.

An edit is SDEdit (Meng et al. 2022) with DDIM steps: strength s noises the latents to the grid time
with round(s n) of n steps left and denoises from there. All versions of a picture get the same
noise, so that their edits differ only by what they were made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffkit.audit.purifiers.registry import parse_purifiers
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.denoising import denoising_loss
from diffkit.perceptual.pixels import ssim
from diffkit.protection.budget import as_signed
from diffkit.protection.losses import mean_square
from diffkit.protection.targets import draw_target
from diffkit.randomness import normal, uniform
from protection_parts.attacks import TARGET
from protection_parts.plan import SHOWN

__all__ = ["Version", "amplification", "compare", "edit_latents", "look_at", "relative_change"]

Version = dict[str, Tensor]
"""All that is measured of one version of the pictures, one row a picture."""


@torch.no_grad()
def encode(model: LatentDiffusion, pixels: Tensor) -> Tensor:
    """Latents from the posterior's mean: uint8 (B, 3, H, W) -> (B, C, h, w)."""
    return model.codec.encode(as_signed(pixels))


@torch.no_grad()
def decode(model: LatentDiffusion, z: Tensor) -> Tensor:
    """uint8 (B, 3, H, W)."""
    x = model.codec.decode(z).clamp(-1, 1)
    return torch.round((x + 1) * 127.5).to(torch.uint8)


@torch.no_grad()
def edit_latents(
    model: LatentDiffusion, z0: Tensor, noise: Tensor, strength: float, steps: int, prompt: str
) -> Tensor:
    """The latents (B, C, h, w) of edited pictures, without guidance."""
    schedule, run = model.schedule, round(strength * steps)
    cond = model.conditioner.encode([prompt], (model.default_size,) * 2).expand(len(z0))
    times = schedule.sampling_timesteps(steps)[-run - 1 :]
    z = schedule.add_noise(z0, noise, times[0].expand(len(z0)))
    for t, s in zip(times[:-1], times[1:], strict=True):
        z = schedule.step(model.denoiser.predict(z, t.expand(len(z)), cond), s)
    return z


def edit_noise(shape: Sequence[int], count: int, seed: int, purpose: str) -> Tensor:
    """(count, *shape): picture i's, whatever version of it is edited."""
    return torch.stack([normal(shape, seed, i, purpose) for i in range(count)])


@torch.no_grad()
def held_out(model: LatentDiffusion, z0: Tensor, draws: int, prompt: str, seed: int) -> Version:
    """L_S, and the network's distance to the pattern z_T that ACE pulls it to, on unseen draws.

    "loss" (B,) is mean (f - y)^2, "pull" (B,) mean (f - z_T)^2, over `draws` noises and as many
    times, one in each equal part of the time axis.
    """
    cond = model.conditioner.encode([prompt], (model.default_size,) * 2).expand(len(z0))
    side = model.default_size
    target = model.codec.encode(draw_target(TARGET, side, side))
    sums = {"loss": torch.zeros(len(z0)), "pull": torch.zeros(len(z0))}
    for k in range(draws):
        eps = edit_noise(z0.shape[1:], len(z0), seed, f"held-out {k}")
        u = torch.cat([uniform((1,), seed, i, k, "held-out time") for i in range(len(z0))])
        t = model.schedule.train_timesteps((u + k) / draws)
        output = model.denoiser(model.schedule.add_noise(z0, eps, t), t, cond)
        sums["loss"] += denoising_loss(output, model.schedule.target(z0, eps, t))
        sums["pull"] += mean_square(output, target)
    return {name: value / draws for name, value in sums.items()}


@torch.no_grad()
def purify(model: LatentDiffusion, pixels: Tensor, name: str, steps: int, seed: int) -> Tensor:
    """uint8 (B, 3, H, W) behind a purifier; every version gets the same noise."""
    if name.startswith("sdedit"):
        z0 = encode(model, pixels)
        noise = edit_noise(z0.shape[1:], len(z0), seed, "purify")
        strength = float(name.removeprefix("sdedit"))
        return decode(model, edit_latents(model, z0, noise, strength, steps, ""))
    (purifier,) = parse_purifiers(name)
    return torch.stack(purifier.many(list(pixels), [seed] * len(pixels)))


def look_at(
    model: LatentDiffusion,
    network: FeatureNetwork,
    pixels: Tensor | None,
    z0: Tensor | None,
    settings: Mapping[str, Any],
    seed: int,
) -> Version:
    """Edits at all strengths, held-out losses, and edits behind the purifiers.

    Latents are given for a version that has no pixels; it has no purified edits.
    """
    prompt, steps = settings["attack"]["prompt"], settings["steps"]
    if z0 is None:
        assert pixels is not None
        z0 = encode(model, pixels)
    noise = edit_noise(z0.shape[1:], len(z0), seed, "edit")
    found: Version = {"z": z0}
    found |= held_out(model, z0, settings["held_out_draws"], prompt, seed)
    for strength in settings["strengths"]:
        z = edit_latents(model, z0, noise, strength, steps, prompt)
        found[f"edit {strength}"] = z
        pictures = decode(model, z)
        found[f"picture {strength}"] = pictures
        with torch.no_grad():
            found[f"features {strength}"] = network.features(as_signed(pictures))
    if pixels is not None:
        found["pixels"] = pixels
        for name in settings["purifiers"]:
            purified = purify(model, pixels, name, steps, seed)
            found[f"purified {name}"] = purified
            z = edit_latents(model, encode(model, purified), noise, SHOWN, steps, prompt)
            found[f"edit {name}"] = z
            found[f"picture {name}"] = decode(model, z)
    return found


def rms(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(mean (a - b)^2) of each picture, (B,)."""
    return mean_square(a, b).sqrt()


def relative_change(pixels: Tensor, clean: Tensor) -> Tensor:
    """|dx| / |x| (B,), x in [0, 1]."""
    x, y = (p.float().flatten(1) / 255 for p in (clean, pixels))
    return (y - x).norm(dim=1) / x.norm(dim=1)


def amplification(version: Version, clean: Version) -> Tensor:
    """A = (|dz| / |z|) / (|dx| / |x|), (B,), x in [0, 1], z the posterior's mean."""
    dz = (version["z"] - clean["z"]).flatten(1).norm(dim=1) / clean["z"].flatten(1).norm(dim=1)
    return dz / relative_change(version["pixels"], clean["pixels"])


def compare(version: Version, clean: Version, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a cell: how far a version's edits lie from those of the clean pictures.

    Lists over pictures; "latent", "ssim" (1 - SSIM) and "features" by strength, and "latent" and
    "ssim" by purifier, of edits at strength 0.3.
    """
    values: dict[str, Any] = {
        "loss": (version["loss"] - clean["loss"]).tolist(),
        "pull": (version["pull"] - clean["pull"]).tolist(),
        "loss_clean": clean["loss"].mean().item(),
        "pull_clean": clean["pull"].mean().item(),
    }
    latent, structure, features = {}, {}, {}
    for s in settings["strengths"]:
        latent[f"{s}"] = rms(version[f"edit {s}"], clean[f"edit {s}"]).tolist()
        pair = version[f"picture {s}"], clean[f"picture {s}"]
        structure[f"{s}"] = (1 - ssim(*pair)).tolist()
        features[f"{s}"] = (
            (version[f"features {s}"] - clean[f"features {s}"]).norm(dim=1).mean().item()
        )
    if "pixels" in version:
        values["amplification"] = amplification(version, clean).tolist()
        values["change"] = relative_change(version["pixels"], clean["pixels"]).tolist()
        for name in settings["purifiers"]:
            latent[name] = rms(version[f"edit {name}"], clean[f"edit {name}"]).tolist()
            pair = version[f"picture {name}"], clean[f"picture {name}"]
            structure[name] = (1 - ssim(*pair)).tolist()
    shown = {name for name in structure if name == f"{SHOWN}" or name in settings["purifiers"]}
    values["latent"] = latent
    values["ssim"] = {k: v if k in shown else _mean(v) for k, v in structure.items()}
    values["features"] = features
    return rounded(values)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def rounded(value: Any) -> Any:
    """Numbers to five significant digits, in whatever holds them."""
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
