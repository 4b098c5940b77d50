"""The codec: images <-> latents, and every form of decoding that a method may need.

    z_0 = (x_0 - shift) * scale,    x_0 ~ N(mean(image), exp(logvar(image)))
    image = D(z_0 / scale + shift)

Images are float in [-1, 1], (B, 3, H, W); latents are (B, C, h, w), scaled and shifted, with
H = factor h. The networks may be bf16 or fp16; moments, sampling and returned images are float32 at
least. A float16 VAE whose config says `force_upcast` (SDXL) computes in float32, on a copy of its
weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.decode import (
    Checkpoint,
    Stage,
    chain_vjp,
    cuts,
    decoder_stages,
    encoder_stages,
    run,
    up_receptive_field,
    without_float16,
)
from diffkit.models.fingerprint import describe_config, fingerprint_module

__all__ = ["Codec"]

Crop = tuple[int, int, int, int]


class Codec:
    """Encode, decode and differentiate through a diffusers `AutoencoderKL`.

    `diffkit.models.codec_kinds` has the same for `VQModel` and for models of pixels.

    The VAE is used as it stands: it is not copied, moved, frozen or reconfigured, and slicing or
    tiling switched on by a pipeline is ignored here.

    Arguments:
        vae: an `AutoencoderKL`.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self._upcast: Any = None

    # -- what it is ---------------------------------------------------------------------------

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel along one side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return int(self.vae.config.latent_channels)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.vae.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the networks compute."""
        return self.computes(self.vae.dtype)

    def computes(self, dtype: torch.dtype) -> torch.dtype:
        """The same for weights of `dtype`."""
        upcast = dtype == torch.float16 and self.vae.config.force_upcast
        return torch.float32 if upcast else dtype

    @property
    def context(self) -> int:
        """Latent pixels of margin that `decode(crop=...)` adds by default: the up path's reach."""
        return up_receptive_field(self.vae)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of an image of height x width pixels; `UserError` if they do not divide."""
        self._check_size(height, width)
        return (self.channels, height // self.factor, width // self.factor)

    def affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(shift, scale), broadcastable to (B, C, h, w): the VAE decodes z / scale + shift."""
        config = self.vae.config
        scale = torch.tensor(config.scaling_factor)
        shift = torch.tensor(config.get("shift_factor") or 0.0)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            scale = (scale / torch.tensor(std)).view(1, -1, 1, 1)
            shift = torch.tensor(mean).view(1, -1, 1, 1)
        return shift.to(like), scale.to(like)

    def space(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(scale, shift) of `affine` as numbers, one or one a channel: what sets scaled latents of
        equally many channels apart."""
        shift, scale = self.affine(torch.zeros(()))
        return tuple(scale.flatten().tolist()), tuple(shift.flatten().tolist())

    def has_space(self, scale: Sequence[float], shift: Sequence[float]) -> bool:
        """Whether `space` is this one, up to rounding."""
        own = tuple(zip(self.space(), (scale, shift), strict=True))
        return all(
            len(a) == len(b)
            and all(math.isclose(x, y, rel_tol=1e-4) for x, y in zip(a, b, strict=True))
            for a, b in own
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Codec:
        """Move or cast the VAE in place; returns self."""
        # diffusers' own `to` warns of modules to be kept in float32 even where it names none
        nn.Module.to(self.vae, device=device, dtype=dtype)
        self._upcast = None
        return self

    def fingerprint(self) -> str:
        """Hash of class, config and all weights, 32 hexadecimal digits (`fingerprint_module`)."""
        return fingerprint_module(self.vae, describe_config(self.vae.config))

    # -- encoding -----------------------------------------------------------------------------

    def encode_moments(self, images: Tensor, checkpoint: Checkpoint = None) -> Tensor:
        """Mean and log variance of unscaled latents: (B, 3, H, W) -> (B, 2C, h, w), >= float32."""
        self._check_images(images)
        return _at_least_float32(run(self._encoder(), self._cast(images), checkpoint))

    def mean(self, moments: Tensor) -> Tensor:
        """The most likely latents, (mean - shift) * scale: (B, 2C, h, w) -> (B, C, h, w)."""
        return self._scaled(_at_least_float32(moments).chunk(2, dim=1)[0])

    def sample(self, moments: Tensor, eps: Tensor) -> Tensor:
        """(mean + exp(logvar / 2) eps - shift) * scale, logvar limited to [-30, 20].

        Arguments:
            moments: (B, 2C, h, w).
            eps: standard normal noise (B, C, h, w).
        """
        mean, logvar = _at_least_float32(moments).chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
        return self._scaled(mean + std * eps.to(mean))

    def encode(
        self, images: Tensor, eps: Tensor | None = None, checkpoint: Checkpoint = None
    ) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W): sampled with `eps`, the mean without."""
        moments = self.encode_moments(images, checkpoint)
        return self.mean(moments) if eps is None else self.sample(moments, eps)

    def encode_vjp(
        self,
        images: Tensor,
        cotangent: Tensor | Callable[[Tensor], Tensor],
        eps: Tensor | None = None,
        checkpoint: Checkpoint = "resnet",
    ) -> Tensor:
        """J^T c with J the Jacobian of `encode(images, eps)`: -> (B, 3, H, W), >= float32.

        Arguments:
            images: (B, 3, H, W).
            cotangent: c, (B, C, h, w), or a function that gives it from the latents.
            eps: as in `encode`.
            checkpoint: pieces of the second pass; see `vjp`.
        """
        self._check_images(images)

        def head(moments: Tensor) -> Tensor:
            return self.mean(moments) if eps is None else self.sample(moments, eps)

        pieces = [self._cast, *cuts(self._encoder(), checkpoint), head]
        return chain_vjp(pieces, _at_least_float32(images), _as_function(cotangent))[1]

    def encode_moments_vjp(
        self,
        images: Tensor,
        cotangent: Tensor | Callable[[Tensor], Tensor],
        checkpoint: Checkpoint = "resnet",
    ) -> Tensor:
        """As `encode_vjp`, of `encode_moments`: the cotangent (B, 2C, h, w) is that of moments."""
        self._check_images(images)
        pieces = [self._cast, *cuts(self._encoder(), checkpoint), _at_least_float32]
        return chain_vjp(pieces, _at_least_float32(images), _as_function(cotangent))[1]

    # -- decoding -----------------------------------------------------------------------------

    def decode(
        self,
        latents: Tensor,
        checkpoint: Checkpoint = None,
        crop: Crop | None = None,
        context: int | None = None,
        tiled: bool = False,
    ) -> Tensor:
        """Images (B, 3, H, W), >= float32, not clamped, of latents (B, C, h, w).

        Arguments:
            latents: scaled and shifted latents.
            checkpoint: keep for the backward pass only the activations between blocks ("block")
                or between ResNet blocks ("resnet") and recompute the rest; same image, same
                gradients.
            crop: (top, left, height, width) in latent pixels: only this part of the image. The mid
                block, whose attention is global, runs on all latents and is exact; the up blocks
                run on the crop and `context` pixels around it. Their convolutions are exact with
                the default context; their GroupNorm statistics are those of the cropped features,
                an approximation that gets better with more context and vanishes when crop and
                context cover everything.
            context: margin in latent pixels; `self.context` by default.
            tiled: diffusers' tiled decoding with blended seams, in tiles of the VAE's sample size.
                An approximation without gradients: refused where a gradient is asked for.

        Raises:
            UserError: wrong shape, crop outside the latents, or options that exclude one another.
        """
        self._check_latents(latents)
        if context is not None and crop is None:
            raise UserError("context is the margin of a crop; give crop=(top, left, height, width)")
        if tiled:
            return self._decode_tiled(latents, checkpoint, crop)
        x, stages = self._unscaled(latents), self._decoder()
        if crop is None:
            return _at_least_float32(run(stages, x, checkpoint))
        _check_crop(crop, latents)
        margin = self.context if context is None else context
        features = run(stages[:1], x, checkpoint)
        window, inner = _window(crop, margin, features)
        image = _at_least_float32(run(stages[1:], features[window], checkpoint))
        return image[_scaled_window(inner, self.factor)]

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the decoder's features in the order of computation: mid, up_0, ..., up_k."""
        return tuple(stage.name for stage in self._decoder()[:-1])

    def features(
        self, latents: Tensor, blocks: Sequence[str], checkpoint: Checkpoint = None
    ) -> Iterator[Tensor]:
        """The outputs of the named blocks one after the other, in order; nothing after the last.

        The decoder runs on when the next one is asked for, in the grad mode that holds then, and so
        that several decodes can go side by side. A feature is (B, C_l, h r_l, w r_l) in the dtype
        in which the network computes; "out" is the image, at least float32.

        Arguments:
            latents: scaled and shifted latents (B, C, h, w).
            blocks: of `feature_names`, or "out".
            checkpoint: as in `decode`.

        Raises:
            UserError: an unknown name.
        """
        self._check_latents(latents)
        stages = self._decoder()
        names = [stage.name for stage in stages]
        if unknown := sorted(set(blocks) - set(names)):
            raise UserError(f"unknown decoder blocks {unknown}; this decoder has {names}")
        last = max((names.index(name) for name in blocks), default=-1)
        return self._walk(latents, stages[: last + 1], set(blocks), checkpoint)

    def _walk(
        self, latents: Tensor, stages: Sequence[Stage], wanted: set[str], checkpoint: Checkpoint
    ) -> Iterator[Tensor]:
        x = self._unscaled(latents)
        for stage in stages:
            x = run((stage,), x, checkpoint)
            if stage.name in wanted:
                yield _at_least_float32(x) if stage.name == "out" else x

    def decoder_features(
        self,
        latents: Tensor,
        blocks: Sequence[str] | None = None,
        checkpoint: Checkpoint = None,
    ) -> dict[str, Tensor]:
        """`features` by name: of the named blocks, or of all, "out" included."""
        names = [stage.name for stage in self._decoder()]
        wanted = names if blocks is None else blocks
        found = self.features(latents, wanted, checkpoint)
        return dict(zip([name for name in names if name in set(wanted)], found, strict=True))

    def vjp(
        self,
        latents: Tensor,
        cotangent: Tensor | Callable[[Tensor], Tensor],
        checkpoint: Checkpoint = "resnet",
    ) -> Tensor:
        """J^T c with J the Jacobian of `decode(latents)`: -> (B, C, h, w), >= float32.

        Two passes: one without a graph that keeps what lies between the pieces, one backwards that
        builds the graph of one piece at a time. Equal to autograd through `decode`; parameters get
        no gradient; the result carries no graph.

        Arguments:
            latents: (B, C, h, w).
            cotangent: c, (B, 3, H, W), or a function that gives it from the decoded image (for the
                gradient of a loss of the image, without decoding twice).
            checkpoint: how fine the pieces are: "resnet", "block", or None for one piece. Finer
                costs no more time here, and holds less.
        """
        self._check_latents(latents)
        stages = self._decoder()
        pieces = [self._unscaled, *cuts(stages, checkpoint), _at_least_float32]
        return chain_vjp(pieces, _at_least_float32(latents), _as_function(cotangent))[1]

    # -- inside -------------------------------------------------------------------------------

    def _encoder(self) -> tuple[Stage, ...]:
        return encoder_stages(self._network())

    def _decoder(self) -> tuple[Stage, ...]:
        return decoder_stages(self._network())

    def _network(self) -> Any:
        """The VAE that computes: itself, or its float32 copy where the config forces one."""
        if self.dtype == self.vae.dtype:
            return self.vae
        if self._upcast is None or self._upcast.device != self.vae.device:
            self._upcast = copy.deepcopy(self.vae).float().requires_grad_(False)
        return self._upcast

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(device=self.device, dtype=self.dtype)

    def _scaled(self, x: Tensor) -> Tensor:
        shift, scale = self.affine(x)
        return (x - shift) * scale

    def _unscaled(self, latents: Tensor) -> Tensor:
        latents = _at_least_float32(latents)
        shift, scale = self.affine(latents)
        return self._cast(latents / scale + shift)

    def _decode_tiled(self, latents: Tensor, checkpoint: Checkpoint, crop: Crop | None) -> Tensor:
        if checkpoint is not None or crop is not None:
            raise UserError("tiled=True goes with neither checkpoint nor crop; leave them out")
        network = self._network()
        if not hasattr(network, "tiled_decode"):
            name = "pixels" if network is None else type(network).__name__
            raise UserError(f"{name}: there is no tiled decoding for it; leave tiled=True out")
        if latents.requires_grad and torch.is_grad_enabled():
            raise UserError(
                "decode(tiled=True) gives no gradients, but these latents require them; use "
                "checkpoint='block', checkpoint='resnet' or crop=... to save memory"
            )
        with torch.no_grad(), without_float16(latents.device.type):
            image: Tensor = network.tiled_decode(self._unscaled(latents)).sample
        return _at_least_float32(image)

    def _check_size(self, height: int, width: int) -> None:
        f = self.factor
        if height % f or width % f or height < f or width < f:
            right = [max(f, round(side / f) * f) for side in (height, width)]
            raise UserError(
                f"images of {height}x{width} pixels (height x width) do not fit the codec, whose "
                f"sides are multiples of {f}; nearest: {right[0]}x{right[1]}"
            )

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"images must be (B, 3, H, W), not {tuple(images.shape)}")
        self._check_size(*images.shape[-2:])

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise UserError(
                f"latents must be (B, {self.channels}, h, w), not {tuple(latents.shape)}"
            )


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _as_function(cotangent: Tensor | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return (lambda _: cotangent) if isinstance(cotangent, Tensor) else cotangent


def _check_crop(crop: Crop, latents: Tensor) -> None:
    top, left, height, width = crop
    h, w = latents.shape[-2:]
    if min(top, left) < 0 or min(height, width) < 1 or top + height > h or left + width > w:
        raise UserError(
            f"crop (top, left, height, width) = {crop} does not lie inside latents of {h}x{w}"
        )


def _window(crop: Crop, margin: int, x: Tensor) -> tuple[Any, Crop]:
    """Index of the crop with its margin, and the crop's place inside that window."""
    top, left, height, width = crop
    y0, x0 = max(0, top - margin), max(0, left - margin)
    rows, columns = slice(y0, top + height + margin), slice(x0, left + width + margin)
    return (..., rows, columns), (top - y0, left - x0, height, width)


def _scaled_window(crop: Crop, factor: int) -> Any:
    top, left, height, width = (factor * side for side in crop)
    return (..., slice(top, top + height), slice(left, left + width))
