"""How much an encoder enlarges a change of the pixels, against random noise of the same kind.

    A = (||dz|| / ||z||) / (||dx|| / ||x||),  z and dz from the posterior's mean, x in [0, 1]

Transparent pictures are seen on white, as the attack sees them. A alone depends on the picture; its
ratio to the A of random noise of the same largest change does not, for ||x|| and ||z|| cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffkit.models.codec import Codec
from diffkit.protection.budget import as_signed
from diffkit.protection.gradients import Pictures
from diffkit.protection.views import View

__all__ = ["amplification_ratio"]


@torch.no_grad()
def amplification_ratio(
    codec: Codec,
    clean: Tensor,
    other: Tensor,
    control: Tensor,
    view: View,
    alpha: Tensor | None = None,
) -> float | None:
    """A(other) / A(control) of one picture, seen through a view; None if either did not change.

    Arguments:
        codec: of the attacked model.
        clean, other, control: uint8 (C, H, W), C 1 or 3.
        view: a whole view of the picture.
        alpha: uint8 (1, H, W); None is opaque.
    """
    rows = torch.stack([clean, other, control]).to(codec.device)
    opaque = None if alpha is None else alpha.to(codec.device, torch.float32)[None] / 255
    x = Pictures(rows, [], opaque).shown(as_signed(rows))
    z = codec.mean(codec.encode_moments(view.apply(x)))
    dx = (x[1:] - x[:1]).flatten(1).norm(dim=1)
    dz = (z[1:] - z[:1]).flatten(1).norm(dim=1)
    if not bool((dx > 0).all()) or not bool(dz[1] > 0):
        return None
    gain = dz / dx
    return float(gain[0] / gain[1])
