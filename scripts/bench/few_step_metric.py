"""E-LatentLPIPS beside LPIPS behind the decoder: what a regression loss costs a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lpips
import paired
import real_sizes
import torch
from few_step_setting import Setting, gradient_step, summary
from torch import Tensor

from diffkit.models.codec import Codec
from diffkit.models.cost import count_gradient
from diffkit.perceptual.latent_augment import Augmentation, draw
from diffkit.perceptual.latent_lpips import (
    LatentLpips,
    LatentLpipsConfig,
    Layout,
    NormKind,
    e_latentlpips,
)
from diffkit.perceptual.latent_lpips_io import load_latent_lpips
from diffkit.perceptual.lpips import Lpips

__all__ = ["SIZES", "counted", "latent_network", "metric", "under"]

DECODED = "decoder + LPIPS"
GIVEN = "decoder + LPIPS, target decoded before"
SIZES: dict[str, tuple[int, Layout, NormKind]] = {
    "E-LatentLPIPS": (64, "official", "bn"),
    "E-LatentLPIPS, pre-pool": (64, "pre_pool", "gn"),
}


def picture_lpips(device: str) -> Lpips:
    """LPIPS on VGG16 with random weights."""
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    return Lpips(network).to(device).eval().requires_grad_(False)


def latent_network(
    channels: int, width: int, layout: Layout, norm: NormKind, device: str
) -> LatentLpips:
    """A network of random weights."""
    with torch.device(device):
        return LatentLpips(LatentLpipsConfig(channels, width, layout, norm))


def decoded(
    codec: Codec, network: Lpips, target: Tensor, before: bool = False
) -> Callable[[Tensor], Tensor]:
    """LPIPS of the pictures that both latents decode to; one side without a gradient.

    Pairs of a teacher are latents, so that the target has to be decoded in each step; `before`: as
    if its picture were there.
    """
    with torch.no_grad():
        kept = codec.decode(target)

    def loss(latents: Tensor) -> Tensor:
        with torch.no_grad():
            true = kept if before else codec.decode(target)
        return network(codec.decode(latents), true).flatten()

    return loss


def metric(setting: Setting) -> tuple[dict[str, Any], list[paired.Ratio]]:
    """Steps at batch 1 and at the setting's; multiply-accumulates a sample at Stable Diffusion's
    size. On a GPU autocast gives LPIPS bfloat16, in which the decoder is too."""
    codec = setting.model.codec
    pictures = picture_lpips(setting.device)
    rows: dict[str, Any] = {}
    ratios = []
    for batch in sorted({1, setting.batch}):
        a, b = setting.latents(batch), setting.latents(batch, "target")
        maps = draw(torch.Generator().manual_seed(0), a.shape, "bg").to(a.device)
        theirs = {
            name: under(setting, gradient_step(decoded(codec, pictures, b, before), a))
            for name, before in ((DECODED, False), (GIVEN, True))
        }
        for name, network in networks(setting).items():
            ours = gradient_step(partial(apart, network, b, maps), a)
            for baseline, step in theirs.items():
                found = setting.compare((f"{name}, batch {batch}", baseline), ours, step)
                ratios.append(found)
                row = summary(found) | {"peak_mib": [setting.peak_mib(x) for x in (ours, step)]}
                rows[f"{found.candidate} / {baseline}"] = row
    rows["GMAC a sample of 512 pixels"] = counted()
    return rows, ratios


def networks(setting: Setting) -> dict[str, LatentLpips]:
    """By name: those of full size, and the embedded one for its latents."""
    channels, device = setting.model.codec.channels, setting.device
    found = {name: latent_network(channels, *size, device) for name, size in SIZES.items()}
    if setting.name == "embedded":
        found["embedded E-LatentLPIPS"] = load_latent_lpips(device=device)
    return found


def apart(network: LatentLpips, target: Tensor, maps: Augmentation, z: Tensor) -> Tensor:
    """E-LatentLPIPS to a target."""
    return e_latentlpips(network, z, target, maps)


def under(setting: Setting, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step under the setting's autocast."""

    def run() -> Tensor:
        with setting.trained():
            return step()

    return run


def counted() -> dict[str, float]:
    """GMAC of value and gradient of one sample of 512 pixels, counted without arithmetic."""
    codec = real_sizes.REAL_SIZES["SD1.5"].skeleton().codec
    codec.vae.requires_grad_(False)
    start = torch.empty(1, 4, 64, 64, device="meta", requires_grad=True)
    target = torch.empty_like(start).detach()
    arms: dict[str, tuple[torch.nn.Module, Callable[[Tensor], Tensor]]] = {}
    pictures = picture_lpips("meta")
    for arm, before in ((DECODED, False), (GIVEN, True)):
        arms[arm] = pictures, decoded(codec, pictures, target, before)
    maps = draw(torch.Generator().manual_seed(0), start.shape, "bg").to("meta")
    for name, shape in SIZES.items():
        network = latent_network(4, *shape, "meta")
        arms[name] = network, partial(apart, network, target, maps)
    found = {}
    for name, (network, loss) in arms.items():
        cost = count_gradient(lambda loss=loss: loss(start), start, [network, codec.vae])
        found[name] = round((cost.forward.macs + cost.backward.macs) / 1e9, 1)
    return found
