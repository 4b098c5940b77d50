"""What diffusers' script for the latent perceptual loss computes, written anew to compare with it.

Its features start behind `decoder.conv_in`, without `post_quant_conv`; pixels are normalised over
the channels, either each map by itself ("default") or both by the target's norm ("shared"); the
outlier mask multiplies the target's features before that; layers are averaged. Autograd is left to
find the gradient, optionally with every block of the decoder checkpointed, as the script does under
--gradient_checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["README", "ScriptLoss"]


@dataclass(frozen=True)
class ScriptLoss:
    """(B,) of predicted and true latents (B, C, h, w); the defaults are those of the script.

    Arguments:
        vae: an `AutoencoderKL`, frozen.
        blocks: up blocks whose features are compared beside the mid block's.
        shared: normalise both maps by the target's norm.
        halving: weights 1, 1/2, 1/4, 1/8, 1/8 of the layers, "pow_law".
        masked: leave outliers out.
        checkpointed: recompute the decoder's blocks.
    """

    vae: Any
    blocks: int = 4
    shared: bool = False
    halving: bool = False
    masked: bool = False
    checkpointed: bool = False

    def __call__(self, predicted: Tensor, target: Tensor) -> Tensor:
        ours = self.features(predicted)
        with torch.no_grad():
            theirs = self.features(target)
        layers = [self.layer(i, x, y) for i, (x, y) in enumerate(zip(ours, theirs, strict=True))]
        return torch.stack(layers).mean(0)

    def features(self, latents: Tensor) -> list[Tensor]:
        """Of the mid block and of the up blocks."""
        config, decoder = self.vae.config, self.vae.decoder
        unscaled = latents / config.scaling_factor + (config.shift_factor or 0)
        x = decoder.conv_in(unscaled.to(self.vae.dtype))
        found = []
        for block in (decoder.mid_block, *decoder.up_blocks[: self.blocks]):
            if self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(block, x, None, use_reentrant=False)
            else:
                x = block(x, None)
            found.append(x)
        return found

    def layer(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """The distance of one layer, (B,)."""
        kept = torch.ones_like(y).bool()
        if self.masked and index >= 2:
            with torch.no_grad():
                kept = inliers(y, 2 if index == 2 else 1)
                y = y * kept
        # float32 from here on: what autocast makes of the script's powers and sums
        norm_y = y.float().square().sum(1, keepdim=True).sqrt()
        norm_x = norm_y if self.shared else x.float().square().sum(1, keepdim=True).sqrt()
        eps = 1e-6 if self.shared else 1e-10
        squares = nn.functional.mse_loss(x / (norm_x + eps), y / (norm_y + eps), reduction="none")
        weight = 2.0 ** -min(index, 3) if self.halving else 1.0
        return (weight * (squares * kept).sum((2, 3)) / kept.sum((2, 3))).mean(1)


README = {"shared": True, "halving": True, "masked": True}
"""What the script's README recommends."""


def inliers(maps: Tensor, down: int) -> Tensor:
    """The script's mask: exact quantiles of whole maps, pooling in floats."""
    flat = maps.flatten(2)
    low, high = (
        flat.kthvalue(int(share * flat.shape[2]), dim=2).values[..., None, None]
        for share in (0.02, 0.98)
    )
    margin = 2 * flat.std(2)[..., None, None]
    kept = ((low - margin < maps) & (maps < high + margin)).float()
    closing, opening = (3, 5) if down == 1 else (1, 3)
    kept = nn.functional.max_pool2d(kept, closing, 1, closing // 2)
    return -nn.functional.max_pool2d(-kept, opening, 1, opening // 2) > 0
