"""The other codecs: vector-quantized latents, and none at all.

Both are deterministic: what `encode_moments` gives is (B, C, h, w), and `sample` uses no noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.codec import Codec
from diffkit.models.decode import Stage
from diffkit.models.fingerprint import fingerprint_tensors

__all__ = ["PixelCodec", "VqCodec", "open_codec"]


class _Deterministic(Codec):
    """A codec whose latents have no posterior."""

    def mean(self, moments: Tensor) -> Tensor:
        """(moments - shift) * scale: (B, C, h, w), >= float32."""
        return self._scaled(moments.to(torch.promote_types(moments.dtype, torch.float32)))

    def sample(self, moments: Tensor, eps: Tensor) -> Tensor:
        """The same as `mean`: there is nothing to draw."""
        return self.mean(moments)


class VqCodec(_Deterministic):
    """Encode, decode and differentiate through a diffusers `VQModel`.

    Latents are what the encoder gives, not yet quantized, times the scaling factor; decoding takes
    the nearest code of each first, through which gradients pass as if it were the identity.

    Arguments:
        vae: a `VQModel`.

    Raises `UserError` for one with spatial normalisation (MoVQ), whose decoder needs the codes too.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__(vae)
        if vae.config.norm_type != "group":
            raise UserError(
                f"VQModel: norm_type {vae.config.norm_type!r} is not supported, only 'group'."
            )

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return int(self.vae.config.vq_embed_dim or self.vae.config.latent_channels)

    def _decoder(self) -> tuple[Stage, ...]:
        quantize = self._network().quantize
        first, *rest = super()._decoder()
        return (Stage(first.name, (lambda z: quantize(z)[0], *first.units)), *rest)


class PixelCodec(_Deterministic):
    """Images are the latents: factor 1, no shift, no scale.

    Arguments:
        channels: of the denoiser; 3, or 1 for grey pictures, whose three channels are averaged and
            come back equal.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__(None)
        if channels not in (1, 3):
            raise UserError(f"a model of pixels has 1 or 3 channels, not {channels}.")
        self._channels = channels
        self._device = torch.device("cpu")

    @property
    def factor(self) -> int:
        """1."""
        return 1

    @property
    def channels(self) -> int:
        """3, or 1 for grey pictures."""
        return self._channels

    @property
    def device(self) -> torch.device:
        """Where it was last moved; it has no weights, and takes tensors of any device."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """float32."""
        return torch.float32

    def computes(self, dtype: torch.dtype) -> torch.dtype:
        """float32."""
        return torch.float32

    @property
    def context(self) -> int:
        """0: a pixel depends on no other."""
        return 0

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PixelCodec:
        """Remember the device; returns self."""
        if device is not None:
            self._device = torch.empty(0, device=device).device
        return self

    def fingerprint(self) -> str:
        """Hash of its channels, 32 hexadecimal digits."""
        return fingerprint_tensors({}, f"pixels, {self._channels} channels")

    def _encoder(self) -> tuple[Stage, ...]:
        if self._channels == 3:
            return (Stage("out", ()),)
        return (Stage("out", (lambda images: images.mean(1, keepdim=True),)),)

    def _decoder(self) -> tuple[Stage, ...]:
        return (Stage("out", (lambda latents: latents.expand(-1, 3, -1, -1),)),)

    def _network(self) -> Any:
        return None

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """0 and 1."""
        return like.new_zeros(()), like.new_ones(())


_KINDS: dict[str, type[Codec]] = {"AutoencoderKL": Codec, "VQModel": VqCodec}


def open_codec(network: Any, channels: int) -> Codec:
    """The codec of an autoencoder; of None, that of a model of pixels with `channels` channels.

    Raises `UserError` for an autoencoder of another class: its layers are not those that the
    codec's stages, features and products are made of.
    """
    if network is None:
        return PixelCodec(channels)
    for base in type(network).__mro__:
        if base.__name__ in _KINDS:
            return _KINDS[base.__name__](network)
    name = type(network).__name__
    right = f"give a model whose autoencoder is one of {', '.join(_KINDS)}."
    if name == "AutoencoderTiny":
        right = (
            "it stands in for a full one and has no features of its own; give the model with the "
            "AutoencoderKL that it was made from."
        )
    raise UserError(f"model: its autoencoder is a {name}, which diffkit cannot take apart; {right}")
