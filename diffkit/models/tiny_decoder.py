"""A small stand-in for a codec's decoder: TAESD and its kin (Bohan 2023), for losses of pictures.

An `AutoencoderTiny` decodes the latents of the large VAE that it was distilled from, with neither
normalisation nor attention, at some percent of the cost. It squashes its input to +-3, so that it
sees little of very noisy latents, and it draws less fine detail.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.codec import Codec
from diffkit.models.decode import Checkpoint, Stage, run
from diffkit.models.loading import is_hub_id
from diffkit.models.weights import only_pickles, refuse_pickles

__all__ = ["TinyDecoder", "load_tiny_decoder"]

_CLASS = "AutoencoderTiny"


class TinyDecoder:
    """Decode with a diffusers `AutoencoderTiny`, which is frozen here.

    Arguments:
        network: its decoder is used, as it stands.
    """

    def __init__(self, network: Any) -> None:
        self.network = network.requires_grad_(False).eval()

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return int(self.network.config.latent_channels)

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel along one side."""
        ups = sum(isinstance(layer, nn.Upsample) for layer in self.network.decoder.layers)
        return int(self.network.config.upsampling_scaling_factor**ups)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.network.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the network computes."""
        found: torch.dtype = self.network.dtype
        return found

    def to(self, device: torch.device | str) -> TinyDecoder:
        """Move the weights in place; returns self."""
        nn.Module.to(self.network, device=device)
        return self

    def decode(self, latents: Tensor, checkpoint: Checkpoint = None) -> Tensor:
        """Images (B, 3, H, W) in about [-1, 1], at least float32, of latents (B, C, h, w).

        Arguments:
            latents: as the denoiser sees them; tiny autoencoders take these as they are (their
                scaling factor is 1), and one whose config says another gets it undone.
            checkpoint: "block" recomputes from one resolution to the next in the backward pass,
                "resnet" block by block; see `Codec.decode`.
        """
        config = self.network.config
        x = latents.to(torch.promote_types(latents.dtype, torch.float32))
        x = x / config.scaling_factor + (config.get("shift_factor") or 0.0)
        image = run(self._stages(), x.to(self.device, self.network.dtype), checkpoint)
        return image.to(torch.promote_types(image.dtype, torch.float32))

    def _stages(self) -> tuple[Stage, ...]:
        """One a resolution; the network's own forward pass, operation by operation."""
        stages: list[Stage] = []
        units: list[Any] = [lambda x: torch.tanh(x / 3) * 3]
        for layer in self.network.decoder.layers:
            if isinstance(layer, nn.Upsample):
                stages.append(Stage(f"up_{len(stages)}", tuple(units)))
                units = []
            units.append(layer)
        return (*stages, Stage("out", (*units, lambda x: x.mul(2).sub(1))))


def load_tiny_decoder(source: str, codec: Codec) -> TinyDecoder:
    """The tiny decoder in a folder or of a hub id, for the latents of `codec`.

    Raises:
        UserError: no such folder or repository, pickled weights, another class, or a decoder that
            was made for other latents.
    """
    decoder = TinyDecoder(_load(source))
    found, needed = (decoder.channels, decoder.factor), (codec.channels, codec.factor)
    if found != needed:
        raise UserError(
            f"{source}: decodes latents of {found[0]} channels, each a square of {found[1]} pixels "
            f"wide; this model's have {needed[0]} channels and squares of {needed[1]}. Give the "
            "tiny autoencoder that was made for this model."
        )
    return decoder


def _load(source: str) -> Any:
    from diffusers import AutoencoderTiny

    path = Path(source).expanduser()
    options: dict[str, Any] = {"use_safetensors": True}
    if path.is_dir():
        _check_folder(path)
        options["local_files_only"] = True
    elif not is_hub_id(source) or path.parent.is_dir():  # owner/name beside a folder "owner"
        raise UserError(
            f"{source}: no such tiny decoder. Give a folder with an {_CLASS} (config.json and "
            "safetensors), or a hub id such as 'owner/name'."
        )
    try:
        return AutoencoderTiny.from_pretrained(path if path.is_dir() else source, **options)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        if not path.is_dir() and "safetensors" in first:
            raise only_pickles(source) from error
        if not path.is_dir() and isinstance(error, OSError):
            raise UserError(
                f"{source}: cannot be fetched from the hub, nor is it a path ({first})"
            ) from error
        raise UserError(f"{source}: cannot be loaded as an {_CLASS}: {first}") from error


def _check_folder(path: Path) -> None:
    refuse_pickles(path)
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path}: there is no config.json in it; give the folder of an {_CLASS}.")
    name = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    if name != _CLASS:
        article = "an" if str(name)[:1] in "AEIOU" else "a"
        raise UserError(f"{path}: holds {article} {name}, not an {_CLASS}.")
