"""Why purification leaves what it leaves: where an effect sits, and what an edit removes anyway.

For one attack and ever stronger purifiers P, with d = E(y) - E(x) of a protected picture y and its
clean twin x, and d' = E(P(y)) - E(P(x)), E being the encoder, or the edit of strength 0.3:

    size     mean |d'| / mean |d|
    along    sum <d', d> / sum |d|^2

A purifier that only scatters its input, as coarse rounding does, has size without direction. The
same of the attack's change cut to one half of the spectrum says where its effect sits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffkit.models.latent_diffusion import LatentDiffusion
from protection_parts.edits import edit_latents, edit_noise, encode, purify, rounded
from protection_parts.plan import SHOWN

__all__ = ["band", "causes", "shares"]


def band(delta: Tensor, low: bool) -> Tensor:
    """The part of a change (B, C, H, W) below half of Nyquist in both directions, or the rest."""
    spectrum = torch.fft.fft2(delta.double())
    rows, columns = (torch.fft.fftfreq(side).abs() < 0.25 for side in delta.shape[-2:])
    kept = rows[:, None] & columns[None, :]
    return torch.fft.ifft2(spectrum * (kept if low else ~kept)).real


def shares(left: Sequence[Tensor], whole: Sequence[Tensor]) -> dict[str, float]:
    """Size and direction of what is left, of latents and of edits; each pair (B, ...) (B, ...)."""
    found = {}
    for name, a, b in zip(("latents", "edits"), left, whole, strict=True):
        a, b = a.flatten(1).double(), b.flatten(1).double()
        found[name] = float(a.norm(dim=1).mean() / b.norm(dim=1).mean())
        found[f"{name} along"] = float((a * b).sum() / b.square().sum())
    return found


@torch.no_grad()
def causes(
    model: LatentDiffusion, clean: Tensor, version: Tensor, settings: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """What is left behind each purifier, and of each half of the spectrum with its energy.

    Arguments:
        clean, version: uint8 (B, 3, H, W).
        settings: `purifiers`, `steps`, and the attack's prompt.
    """
    steps, prompt = settings["steps"], settings["attack"]["prompt"]

    def differences(a: Tensor, b: Tensor) -> list[Tensor]:
        """Of two versions' latents, and of their edits' from the same noises."""
        z = [encode(model, pixels) for pixels in (a, b)]
        noise = edit_noise(z[0].shape[1:], len(a), seed, "edit")
        edits = [edit_latents(model, one, noise, SHOWN, steps, prompt) for one in z]
        return [z[0] - z[1], edits[0] - edits[1]]

    whole = differences(version, clean)
    delta = version.double() - clean.double()
    found: dict[str, Any] = {}
    for name, low in (("low half", True), ("high half", False)):
        part = band(delta, low)
        cut = (clean + part).round().clamp(0, 255).to(torch.uint8)
        energy = float(part.square().sum() / delta.square().sum())
        found[name] = {**shares(differences(cut, clean), whole), "energy": energy}
    for name in settings["purifiers"]:
        purified = [purify(model, pixels, name, steps, seed) for pixels in (version, clean)]
        found[name] = shares(differences(*purified), whole)
    result: dict[str, Any] = rounded(found)
    return result
