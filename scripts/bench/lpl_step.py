"""The latent perceptual loss at a decoder's size, beside what diffusers' script does.

A step is the loss of one sample and its gradient in the predicted latents. The decoder is Stable
Diffusion's with random weights; on a CPU it computes in float32, elsewhere in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import paired
import real_sizes
import torch
from diffusers import AutoencoderKL
from lpl_script import README, ScriptLoss
from torch import Tensor

from diffkit.models.codec import Codec
from diffkit.models.cost import Live, saved_for_backward
from diffkit.perceptual.decoder_features import FeatureLoss, latent_perceptual_loss

__all__ = ["ARMS", "Arms", "LOW", "PLAIN", "SCRIPT", "counted", "peak", "speed"]

SCRIPT = "diffusers' script"
PLAIN, LOW = "LPL", "LPL, low memory"
SCRIPTS = {
    SCRIPT: {},
    f"{SCRIPT}, blocks checkpointed": {"checkpointed": True},
    f"{SCRIPT}, README": README,
}
ARMS = (*SCRIPTS, PLAIN, LOW)
MIB = 2**20


@dataclass(frozen=True)
class Arms:
    """Ways to compute the loss of one sample, on equal decoders.

    Attributes:
        size: edge of the picture.
        device, dtype: of the decoder.
        blocks: K.
        tiny: a decoder of a few channels, to try the benchmark itself.
    """

    size: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    blocks: int = 4
    tiny: bool = False

    def vae(self) -> Any:
        """Stable Diffusion's autoencoder; equal weights at every call."""
        torch.manual_seed(0)
        with torch.device(self.device):
            found = tiny_autoencoder() if self.tiny else real_sizes.autoencoder(self.size)
        del found.encoder, found.quant_conv
        # not diffusers' own `to`, which warns of nothing
        torch.nn.Module.to(found, dtype=self.dtype)
        return found.eval().requires_grad_(False)

    def latents(self) -> tuple[Tensor, Tensor]:
        """A prediction, which asks for a gradient, and the true latents."""
        draws = torch.Generator().manual_seed(1)
        shape = (1, 4, self.size // 8, self.size // 8)
        true = torch.randn(shape, generator=draws)
        predicted = true + 0.1 * torch.randn(shape, generator=draws)
        return predicted.to(self.device).requires_grad_(), true.to(self.device)

    def loss(self, name: str, vae: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of an arm by name."""
        if name in SCRIPTS:
            return ScriptLoss(vae, self.blocks, **SCRIPTS[name])
        codec, features, lean = Codec(vae), FeatureLoss(self.blocks), name == LOW
        return lambda p, t: latent_perceptual_loss(codec, p, t, features, lean=lean).value

    def step(self, name: str, vae: Any) -> Callable[[], Tensor]:
        """Loss and gradient."""
        loss, (predicted, true) = self.loss(name, vae), self.latents()

        def step() -> Tensor:
            return torch.autograd.grad(loss(predicted, true).sum(), predicted)[0]

        return step


def tiny_autoencoder() -> AutoencoderKL:
    """Stable Diffusion's layout in a few channels."""
    return AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=2,
    )


def speed(arms: Arms, pairs: int, clock: Callable[[], float] | None = None) -> list[paired.Ratio]:
    """Our steps against the script's defaults, plain also against its README's settings."""
    vae, found = arms.vae(), []
    wanted = ((PLAIN, SCRIPT), (LOW, SCRIPT), (PLAIN, f"{SCRIPT}, README"))
    for ours, theirs in wanted:
        steps = arms.step(ours, vae), arms.step(theirs, vae)
        found.append(
            paired.measure(*steps, names=(ours, theirs), pairs=pairs, warmup=1, clock=clock)
        )
    return found


def peak(arms: Arms, name: str) -> int:
    """Peak bytes of this process after two steps; of the decoder alone for any other name."""
    vae = arms.vae()
    if name in ARMS:
        step = arms.step(name, vae)
        for _ in range(2):
            step()
    return paired.peak_memory()


def counted(size: int, blocks: int = 4, tiny: bool = False) -> dict[str, dict[str, float]]:
    """MiB of every arm in bfloat16, counted on the meta device: no weights, no arithmetic.

    "kept" is what waits for the backward pass of the denoiser; "working" the most that is held at
    any moment of the step, results of all operations, weights not.
    """
    arms = Arms(size, "meta", torch.bfloat16, blocks, tiny)
    vae, rows = arms.vae(), {}
    for name in ARMS:
        loss, latents = arms.loss(name, vae), arms.latents()
        kept = saved_bytes(loss, latents, vae, eager=name == LOW)
        with Live() as live:
            torch.autograd.grad(loss(*latents).sum(), latents[0])
        rows[name] = {"kept": kept / MIB, "working": live.peak_bytes / MIB}
    return rows


def saved_bytes(
    loss: Callable[[Tensor, Tensor], Tensor], latents: tuple[Tensor, Tensor], vae: Any, eager: bool
) -> int:
    """Bytes that wait between forward and backward pass; `eager` graphs live in the forward one."""
    if eager:
        node: Any = loss(*latents).grad_fn
        return sum(tensor.nbytes for tensor in node.saved_tensors)
    with saved_for_backward([vae]) as saved:
        loss(*latents)
    return saved.bytes
