"""Rewards by name. Nothing is downloaded unless the name says so.

embedded                 the text-image scorer of `diffkit.assets`, offline
hpsv2                    HPS v2.1 from the hub (xswu/HPSv2)
hpsv2:PLACE              the same from a file, a folder or another hub id
pickscore[:PLACE]        PickScore v1 (yuvalkirstain/PickScore_v1)
imagereward[:PLACE]      ImageReward v1.0 (zai-org/ImageReward)
clip[:ARCH:WEIGHTS]      a CLIP model of open_clip; ViT-H-14:laion2b_s32b_b79k
aesthetic[:PLACE]        LAION's aesthetic predictors of CLIP features
NAME@N[:PLACE]           any of them, of pictures averaged down to N pixels
"""

from __future__ import annotations

import importlib
import math
import re
from typing import TYPE_CHECKING

from diffkit.errors import UserError

if TYPE_CHECKING:
    import torch

    from diffkit.rewards.base import Reward

__all__ = ["REWARDS", "load_reward", "parse_reward", "parse_rewards"]

REWARDS = {
    "embedded": "embedded:load",
    "hpsv2": "clip:load_hps",
    "pickscore": "pickscore:load",
    "imagereward": "image_reward:load",
    "clip": "clip:load",
    "aesthetic": "aesthetic:load",
}
"""The module and function of each reward: (place or "" for the usual, device, dtype) -> Reward."""

_SPEC = re.compile(r"(?P<kind>[a-z0-9]+)(@(?P<side>\d+))?(:(?P<place>.+))?")


def parse_reward(spec: str) -> tuple[str, int | None, str]:
    """(name, side in pixels or None, place or "") of "NAME[@N][:PLACE]"; nothing is loaded.

    Raises `UserError` for an unknown name or a malformed specification.
    """
    match = _SPEC.fullmatch(spec.strip())
    kind, side, place = match.group("kind", "side", "place") if match else ("", None, None)
    if kind not in REWARDS:
        raise UserError(f"reward {spec!r}: unknown. Known: {', '.join(REWARDS)}; see the README.")
    if side is not None and int(side) < 1:
        raise UserError(f"reward {spec!r}: pictures cannot be averaged to {side} pixels.")
    if kind == "embedded" and place:
        raise UserError(f"reward {spec!r}: the embedded scorer lies in the package; no place fits.")
    return kind, None if side is None else int(side), place or ""


def parse_rewards(text: str) -> list[tuple[str, float]]:
    """(specification, weight) of "hpsv2:1,imagereward:0.1,embedded"; nothing is loaded.

    A last part that is a number is the weight, 1 where there is none; so a place that is a bare
    number needs its weight: "clip:ViT-B-32:7:1". Raises `UserError` for unknown rewards, weights
    that are not above 0, and a reward that is named twice.
    """
    found: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        spec, _, last = item.rpartition(":")
        try:
            weight = float(last)
        except ValueError:
            spec, weight = item, 1.0
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"reward {item!r}: its weight must be a number above 0.")
        parse_reward(spec)
        if spec in found:
            raise UserError(f"reward {spec!r}: is named twice; give it one weight.")
        found[spec] = weight
    if not found:
        raise UserError(f"rewards {text!r}: name at least one: {', '.join(REWARDS)}.")
    return list(found.items())


def load_reward(
    spec: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Reward:
    """The frozen reward of a specification, see the module.

    Arguments:
        dtype: of the large networks, float32 unless told; scores are float32 whatever it is. The
            embedded scorer, which is small, always computes in float32.

    Raises `UserError` for an unknown name, a package that is missing (with the line that installs
    it), and weights that cannot be had or do not fit.
    """
    import torch

    from diffkit.rewards.base import PooledReward

    kind, side, place = parse_reward(spec)
    module, _, function = REWARDS[kind].partition(":")
    load = getattr(importlib.import_module(f"diffkit.rewards.{module}"), function)
    reward: Reward = load(place, torch.device(device), dtype or torch.float32)
    return reward if side is None else PooledReward(reward, side)
