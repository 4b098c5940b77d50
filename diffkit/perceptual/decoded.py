"""Errors of a denoiser as a decoder shows them (Zhang et al. 2024, arXiv:2409.17565, section 3).

    E(b) = mean (D(z_t) - D(z_t + delta))^2,    delta = sigma_t (eps_theta - eps)

The second input is alpha_t z_0 + sigma_t eps_theta: the true data with the predicted noise, and so
z_t itself, to the last bit, for a perfect prediction. To first order E = |J_D(z_t) delta|^2, which
weighs the error of the noise with sigma_t^2, on top of what the decoder makes of it.

Under bfloat16 autocast an almost right prediction meets the floor of rounding: both pictures are
rounded, each in its own way. On a small autoencoder in bfloat16 the value came out 40 % too large
and its gradient wrong by 40 % for a delta of 0.01 (root mean square), and both by 2 % at 0.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.codec import Codec
from diffkit.models.codec_kinds import PixelCodec
from diffkit.models.decode import Checkpoint
from diffkit.models.eager import eager, uncompiled
from diffkit.models.schedule import Schedule
from diffkit.models.tiny_decoder import TinyDecoder
from diffkit.randomness import SampleKeys

__all__ = [
    "Decoder",
    "LatentCrop",
    "check_crop",
    "check_decoder",
    "decoded_error",
    "draw_crop",
    "noise_only_delta",
    "noisy_inputs",
]


class Decoder(Protocol):
    """What turns latents into pictures: a `Codec`, a `TinyDecoder`."""

    def decode(self, latents: Tensor, checkpoint: Checkpoint = None) -> Tensor:
        """Images (B, 3, H, W), at least float32, of latents (B, C, h, w)."""
        ...


def check_decoder(decoder: Codec | TinyDecoder, family: str) -> None:
    """Freeze a decoder that a loss differentiates through: its parameters get no gradient.

    Arguments:
        decoder: D.
        family: name of the model's family, for messages.

    Raises:
        UserError: a model of pixels, which decodes nothing; or networks that compute in float16, in
            which small gradients through a decoder vanish.
    """
    if isinstance(decoder, PixelCodec):
        raise UserError(
            f"model: this {family} model works on pixels and decodes nothing; give a latent "
            "diffusion model."
        )
    if decoder.dtype == torch.float16:
        raise UserError(
            "model: its decoder computes in float16, in which small gradients vanish; load it in "
            "float32 or bfloat16."
        )
    network = decoder.vae if isinstance(decoder, Codec) else decoder.network
    network.requires_grad_(False)


@dataclass(frozen=True)
class LatentCrop:
    """A window of one size a sample, in latent pixels.

    Attributes:
        top, left: (B,) int64, the first row and column.
        height, width: sides.
    """

    top: Tensor
    left: Tensor
    height: int
    width: int

    def of(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, height, width); gradients flow."""
        batch, channels = latents.shape[:2]
        rows, columns = (
            (start[:, None] + torch.arange(side, device=start.device)).to(latents.device)
            for start, side in ((self.top, self.height), (self.left, self.width))
        )
        sample = torch.arange(batch, device=latents.device)[:, None, None, None]
        channel = torch.arange(channels, device=latents.device)[:, None, None]
        return latents[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]

    def to(self, device: torch.device) -> LatentCrop:
        """The same on `device`."""
        top, left = (x.to(device, non_blocking=True) for x in (self.top, self.left))
        return LatentCrop(top, left, self.height, self.width)


def check_crop(size: int | None, height: int, width: int, name: str) -> None:
    """Raise `UserError` for a window, `name` for messages, that is all of height x width latents.

    None and 0 stand for no window. Latents of other shapes, of buckets, may have a shorter side.
    """
    if size and size >= min(height, width):
        raise UserError(
            f"{name}: a window of {size} latent pixels is no part of latents of {height} x "
            f"{width}; give at most {min(height, width) - 1}, or leave it out."
        )


def draw_crop(
    keys: SampleKeys, height: int, width: int, size: int | None, purpose: str
) -> LatentCrop | None:
    """A random window of size x size in latents of height x width, by address; on the CPU.

    A side shorter than `size` is taken whole. None where the window would be all of it, or for
    `size` None.
    """
    if size is None or (size >= height and size >= width):
        return None
    sides = min(size, height), min(size, width)
    top, left = (
        keys.integers(0, whole - side + 1, f"{purpose}/{name}")
        for whole, side, name in zip((height, width), sides, ("top", "left"), strict=True)
    )
    return LatentCrop(top, left, *sides)


def noise_only_delta(schedule: Schedule, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
    """delta = sigma_t (eps_theta - eps): only the noise is replaced by the predicted one.

    (B, ...) in at least float32, without a division, exactly 0 for output = target:

        eps  sigma_t (eps_theta - eps)          v     alpha_t sigma_t (v_theta - v)
        x0   alpha_t (z_0 - x_theta)            flow  t (1 - t) (v_theta - v),  v = eps - z_0

    Arguments:
        schedule: of the model, whose one table of parametrisations this comes from.
        output, target: of the network, and what it should have put out.
        t: (B,) times in the model's units.
    """
    return schedule.noise_delta(output, target, t)


def noisy_inputs(
    schedule: Schedule, z_t: Tensor, output: Tensor, target: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """(z, delta) with D(z) and D(z + delta) to be compared: z_t and `noise_only_delta`.

    For EDM both are divided by sqrt(alpha_t^2 + sigma_t^2): its z_t has a standard deviation of up
    to 80, of which a decoder knows nothing, and these are the same latents on the schedule that
    preserves variance, as DDPM's are.

    Arguments:
        schedule: of the model.
        z_t: noisy latents (B, C, h, w).
        output, target, t: as in `noise_only_delta`.
    """
    delta = noise_only_delta(schedule, output, target, t)
    if schedule.kind != "edm":
        return z_t, delta
    norm = torch.hypot(*schedule.alpha_sigma(t, delta.dtype)).view(-1, 1, 1, 1)
    return z_t / norm, delta / norm


@uncompiled
def decoded_error(
    decoder: Decoder,
    latents: Tensor,
    delta: Tensor,
    *,
    crop: LatentCrop | None = None,
    checkpoint: Checkpoint = "resnet",
    lean: bool = False,
    relative: bool = False,
) -> Tensor:
    """mean (D(z) - D(z + delta))^2 over channels and pixels: (B,), at least float32.

    The first picture is the target: it carries no gradient. Parameters of the decoder get none
    where they ask for none.

    With a crop the decoder is given the same window of both latents and sees nothing around it:
    its attention and normalisation are those of a smaller picture, another operator than the whole
    decode's crop, but the same for both, at the cost of the window in every block. (With
    `Codec.decode(crop=...)` the mid block would run on everything, and a tiny decoder has no such
    thing.) A cropped picture is never compared with a crop of a whole one.

    torch.compile leaves it out (`uncompiled`).

    Arguments:
        decoder: D.
        latents: z, (B, C, h, w); no gradient flows into it.
        delta: the same shape, with gradients.
        crop: window of both.
        checkpoint: what the backward pass recomputes; see `Codec.decode`.
        lean: take the gradient at once, one sample at a time, and keep nothing of the decoder: see
            `eager`. Same value and gradient.
        relative: divide by the variance of D(z) over channels and pixels, for errors that are
            compared between pictures of unlike contrast.
    """
    z = latents.detach().to(delta)
    if crop is not None:
        z, delta = crop.of(z), crop.of(delta)

    def error(change: Tensor, start: Tensor) -> Tensor:
        with torch.no_grad():
            target = decoder.decode(start)
        found = decoder.decode(start + change, checkpoint=checkpoint)
        value = (found - target).square().flatten(1).mean(1)
        return value / target.flatten(1).var(1).clamp_min(1e-12) if relative else value

    return eager(error, delta, z) if lean else error(delta, z)
