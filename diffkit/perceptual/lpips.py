"""LPIPS, the learned perceptual distance of Zhang et al. 2018, from weights on this machine."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.named_weights import load_named_weights, optional_module
from diffkit.perceptual.unit_distance import unit_distance

__all__ = ["Lpips", "load_lpips", "lpips_name"]

_BACKBONES = {
    "alex": ("alexnet", "alexnet-owt-7be5be79.pth"),
    "vgg": ("vgg16", "vgg16-397923af.pth"),
}
_BACKBONE_URL = "https://download.pytorch.org/models/"


def load_lpips(spec: str, device: torch.device) -> Any:
    """The LPIPS network of the package lpips (version 0.1) with a backbone from a file.

    `spec` is "alex", "vgg" (the backbone from torch hub's cache folder), "alex:PATH" or "vgg:PATH".
    The linear layers come with the package; nothing is downloaded. Raises `UserError`. The network
    takes two batches (B, 3, H, W) in [-1, 1] and gives (B, 1, 1, 1), 0 for equal pictures.
    """
    kind, _, path = spec.partition(":")
    if kind not in _BACKBONES:
        raise UserError(f"lpips {spec!r}: unknown. Known: alex, vgg, alex:PATH, vgg:PATH.")
    lpips = optional_module("lpips", "evaluate", "the metric lpips")
    name, cached = _BACKBONES[kind]
    file = Path(path) if path else Path(torch.hub.get_dir()) / "checkpoints" / cached
    if not path and not file.is_file():
        raise UserError(
            f"lpips: the weights of its backbone {name} are not on this machine. Download "
            f"{_BACKBONE_URL}{cached} and give the file as {kind}:PATH."
        )
    state = load_named_weights(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchvision's, about how lpips calls it
        # `pnet_rand` keeps torchvision from downloading the backbone.
        network = lpips.LPIPS(net=kind, pnet_rand=True, verbose=False)
    # slice2.3.weight of lpips is features.3.weight of torchvision.
    wanted = {key: f"features.{key.partition('.')[2]}" for key in network.net.state_dict()}
    try:
        network.net.load_state_dict({key: state[source] for key, source in wanted.items()})
    except (KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{file}: are not weights of torchvision's {name} ({first}).") from error
    return Lpips(network).to(device).eval().requires_grad_(False)


class Lpips(nn.Module):
    """The package's network with `unit_distance` in place of its last steps.

    Equal to the package's own up to rounding; no copies of the features are kept, and gradients at
    pixels without any feature are 0 instead of NaN.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, other: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) in [-1, 1] -> (B, 1, 1, 1)."""
        package = self.network
        pair = [package.net(package.scaling_layer(x)) for x in (images, other)]
        layers = zip(*pair, package.lins, strict=True)
        parts = [unit_distance(x, y, lin.model[-1].weight.flatten()) for x, y, lin in layers]
        return torch.stack(parts).sum(0)[:, None, None, None]


def lpips_name(spec: str) -> str:
    """What a report calls the network of a spec that `load_lpips` takes: "lpips 0.1, alexnet"."""
    return f"lpips 0.1, {_BACKBONES[spec.partition(':')[0]][0]}"
