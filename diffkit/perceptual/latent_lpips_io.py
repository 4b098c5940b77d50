"""LatentLPIPS networks on disk: our folders, and the two formats in which others publish theirs.

    ours      a folder with config.json and model.safetensors
    package   a flat state dict of 101 entries (layout "official", norm "bn"): `net.slice1.0.weight`
              ..., `lin0.model.1.weight` (1, C, 1, 1) and the same five once more under `lins.`
    pre-pool  a flat state dict of 57 entries (layout "pre_pool", norm "gn"): `slice1.0.weight` ...
              and `linear1.model.1.weight` ...

Other people's weights are only ever read from a path that the user gives; they have licences of
their own (those of the package mingukkang/elatentlpips: not for commercial use).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffkit.assets import path as asset
from diffkit.console import warn
from diffkit.errors import UserError
from diffkit.files import atomic_directory
from diffkit.models.codec import Codec
from diffkit.models.feature_network import half_parameters, load_strictly, read_config
from diffkit.models.named_weights import load_named_weights
from diffkit.perceptual.latent_lpips import LatentLpips, LatentLpipsConfig, Layout, NormKind

__all__ = [
    "check_latent_space",
    "from_package",
    "from_pre_pool",
    "from_torchvision",
    "load_latent_lpips",
    "save_latent_lpips",
    "to_package",
    "to_pre_pool",
    "to_torchvision",
]

EMBEDDED = "embedded"


def load_latent_lpips(
    source: str | os.PathLike[str] = EMBEDDED, device: torch.device | str = "cpu"
) -> LatentLpips:
    """A frozen network from "embedded", a folder, or a file in one of the published formats.

    Raises:
        UserError: a missing or broken file, or one in none of the formats.
    """
    if source == EMBEDDED:
        source = asset("latent_lpips")
    place = Path(source).expanduser()
    if place.is_file():
        network = _from_file(place)
    else:
        network = LatentLpips(LatentLpipsConfig(**read_config(place, LatentLpipsConfig)))
        load_strictly(network, place / "model.safetensors")
    return network.to(device)


def check_latent_space(network: LatentLpips, codec: Codec, flag: str) -> None:
    """Raise `UserError` for a network of other latents than this autoencoder's, as far as it says.

    Ours say how their latents were scaled and shifted. Of others, published files among them, only
    the channels are known, and a warning says so.

    Arguments:
        flag: that named the network, for messages.
    """
    config, told = network.config, network.config.provenance
    named, (scale, shift) = f"{config.channels} channels", codec.space()
    known = "scale" in told and "shift" in told
    if known:
        named += f", scaled by {told['scale']} after a shift by {told['shift']}"
    same = config.channels == codec.channels
    if not same or (known and not codec.has_space(told["scale"], told["shift"])):
        raise UserError(
            f"{flag}: reads latents of {named}; this model's have {codec.channels}, {scale} and "
            f"{shift}. Give a network that was trained for its autoencoder "
            "(scripts/train_latent_lpips.py makes one)."
        )
    if not known:
        warn(f"{flag}: does not say whose latents it reads; they are taken for this model's")


def save_latent_lpips(
    network: LatentLpips, folder: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write `config.json` and `model.safetensors`: the trunk in float16, the rest in float32.

    Raises `UserError` when `folder` exists and `overwrite` is false.
    """
    with atomic_directory(folder, overwrite=overwrite) as place:
        text = json.dumps(asdict(network.config), indent=1, ensure_ascii=False)
        (place / "config.json").write_text(text + "\n", encoding="utf-8")
        state = half_parameters(network)
        for name in state:
            if name.startswith("heads."):  # whose range float16 may not have
                state[name] = network.get_parameter(name).detach().cpu().float().contiguous()
        save_file(state, place / "model.safetensors")


# -- published formats --------------------------------------------------------------------------


def to_package(network: LatentLpips) -> dict[str, Tensor]:
    """The 101 entries of the package elatentlpips.

    Raises `UserError` for another layout or norm than "official" and "bn".
    """
    _demand(network.config, "official", "bn", "the package's format")
    state = {f"net.{name}": value.clone() for name, value in network.trunk.state_dict().items()}
    for prefix in ("lin{}", "lins.{}"):
        for stage, head in enumerate(network.heads):
            weight = head.detach().clone()[None, :, None, None]
            state[f"{prefix.format(stage)}.model.1.weight"] = weight
    return state


def from_package(state: Mapping[str, Tensor]) -> LatentLpips:
    """The network of the package's 101 entries; raises `UserError` for anything else."""
    heads = [_head(state, f"lin{stage}.model.1.weight") for stage in range(5)]
    for stage, head in enumerate(heads):
        again = f"lins.{stage}.model.1.weight"
        if again in state and not torch.equal(_head(state, again), head):
            raise UserError(f"LatentLPIPS weights: {again} and lin{stage} must be equal.")
    trunk = {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}
    return _assembled(trunk, heads, "official", "bn")


def to_pre_pool(network: LatentLpips) -> dict[str, Tensor]:
    """The 57 entries of layout "pre_pool", norm "gn"; raises `UserError` for another network."""
    _demand(network.config, "pre_pool", "gn", "the format of 57 entries")
    state = {name: value.clone() for name, value in network.trunk.state_dict().items()}
    for stage, head in enumerate(network.heads, start=1):
        state[f"linear{stage}.model.1.weight"] = head.detach().clone()[None, :, None, None]
    return state


def from_pre_pool(state: Mapping[str, Tensor]) -> LatentLpips:
    """The network of the 57 entries; raises `UserError` for anything else."""
    heads = [_head(state, f"linear{stage}.model.1.weight") for stage in range(1, 6)]
    trunk = {k: v for k, v in state.items() if k.startswith("slice")}
    return _assembled(trunk, heads, "pre_pool", "gn")


def to_torchvision(network: LatentLpips) -> dict[str, Tensor]:
    """The state of torchvision's `vgg16_bn().features` (the layers before its pools) of our trunk.

    Its first convolution takes latents. Raises `UserError` for a network that it cannot be.
    """
    _demand(network.config, "official", "bn", "torchvision's vgg16_bn")
    return {name.partition(".")[2]: v.clone() for name, v in network.trunk.state_dict().items()}


def from_torchvision(features: Mapping[str, Tensor]) -> LatentLpips:
    """A network, heads 1, from the state of `vgg16_bn().features`, of any width.

    Its pools have no weights; ours are those of the layout "official". Raises `UserError` for
    another state.
    """
    starts = (0, 7, 14, 24, 34)
    trunk = {}
    for name, value in features.items():
        index = int(name.partition(".")[0])
        stage = sum(index >= start for start in starts)
        trunk[f"slice{stage}.{name}"] = value
    return _assembled(trunk, None, "official", "bn")


def _from_file(place: Path) -> LatentLpips:
    state = load_named_weights(place)
    if "lin0.model.1.weight" in state:
        network = from_package(state)
    elif "linear1.model.1.weight" in state:
        network = from_pre_pool(state)
    else:
        first = ", ".join(sorted(state)[:3]) or "nothing"
        raise UserError(
            f"{place}: is no LatentLPIPS network (it has {first} ...). Give a folder of diffkit's, "
            "a file *_vgg16_tuned.pth of elatentlpips (101 entries), or one with 57 entries "
            "(slice1.0.weight ... linear5.model.1.weight)."
        )
    return network


def _head(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state or state[name].ndim != 4:
        raise UserError(f"LatentLPIPS weights: {name} of shape (1, C, 1, 1) is missing.")
    head = state[name].flatten()
    if bool((head < 0).any()):
        raise UserError(f"LatentLPIPS weights: {name} must not be negative, as in a distance.")
    return head


def _assembled(
    trunk: Mapping[str, Tensor], heads: list[Tensor] | None, layout: Layout, norm: NormKind
) -> LatentLpips:
    first = trunk.get("slice1.0.weight")
    if first is None or first.ndim != 4:
        raise UserError("LatentLPIPS weights: slice1.0.weight of shape (64, C, 3, 3) is missing.")
    config = LatentLpipsConfig(first.shape[1], first.shape[0], layout, norm)
    with torch.device("meta"):
        network = LatentLpips(config)
    state = {f"trunk.{name}": value.float() for name, value in trunk.items()}
    counters = {name for name in network.state_dict() if name.endswith("num_batches_tracked")}
    for name in counters:
        state[name] = trunk.get(name.removeprefix("trunk."), torch.tensor(0)).long()
    for stage, width in enumerate(config.widths):
        state[f"heads.{stage}"] = torch.ones(width) if heads is None else heads[stage].float()
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"LatentLPIPS weights: do not fit layout {layout!r}, norm {norm!r}: {error}"
        ) from error
    return network


def _demand(config: LatentLpipsConfig, layout: Layout, norm: NormKind, what: str) -> None:
    if (config.layout, config.norm) != (layout, norm):
        raise UserError(
            f"{what} holds layout {layout!r} and norm {norm!r} only; this network has "
            f"{config.layout!r} and {config.norm!r}. Keep it in diffkit's own folder."
        )
