"""How imitators are trained: usual values of each kind, and what a user may change."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffkit.errors import UserError
from diffkit.generation.engine import choose_device

__all__ = ["DEFAULT_PROMPT", "RECIPES", "WORD", "MimicrySettings", "Recipe", "check_device"]

DEFAULT_PROMPT = "a picture in the style of {}"


@dataclass(frozen=True)
class Recipe:
    """Usual values of one kind of imitation.

    Attributes:
        steps, batch_size, learning_rate: of training.
        class_count: pictures of prior preservation, where it is asked for.
        source: whose values they are.
    """

    steps: int
    batch_size: int
    learning_rate: float
    class_count: int
    source: str


RECIPES = {
    "lora": Recipe(1000, 1, 1e-4, 100, "ACE, arXiv:2310.04687"),
    "dreambooth": Recipe(1000, 2, 5e-7, 200, "Anti-DreamBooth, arXiv:2303.15433"),
    "textual-inversion": Recipe(6000, 1, 2e-3, 0, "Mist, arXiv:2305.12683"),
}
WORD = "sks"
"""What stands for {} in prompts of those that learn no new word."""


@dataclass(frozen=True)
class MimicrySettings:
    """What a user may change; None is the recipe's own.

    Attributes:
        steps, learning_rate: of training.
        rank: of lora.
        vectors: embedding rows of the new word in textual inversion; 8 are Mist's.
        instance_prompt: what the pictures are learnt as; None is their captions, else a default.
            {} stands for the new word of textual inversion, and for "sks" elsewhere.
        class_prompt: adds prior preservation with this prompt.
        class_images: a folder of class pictures; None lets the model draw them.
        samples: pictures that each imitator draws.
        sample_prompts: what it draws; empty for what it learnt.
        partial: further sets of which so many per cent are protected.
    """

    steps: int | None = None
    rank: int = 4
    learning_rate: float | None = None
    vectors: int = 8
    instance_prompt: str | None = None
    class_prompt: str | None = None
    class_images: Path | None = None
    samples: int = 100
    sample_prompts: tuple[str, ...] = ()
    partial: tuple[int, ...] = ()

    def check(self, kinds: Sequence[str]) -> None:
        """Raise `UserError` for values that cannot work, and for those that nothing reads."""
        usual = MimicrySettings()
        for name in vars(usual):
            given = getattr(self, name) != getattr(usual, name)
            flag = "--" + name.replace("_", "-")
            if given and not kinds:
                raise UserError(f"{flag}: is for imitators; add one to --threats.")
        for name, kind in (("rank", "lora"), ("vectors", "textual-inversion")):
            if getattr(self, name) != getattr(usual, name) and kind not in kinds:
                raise UserError(f"--{name}: is for {kind}; add it to --threats.")
        if "textual-inversion" in kinds:
            self._check_inversion(kinds)
        if self.class_images is not None and self.class_prompt is None:
            raise UserError("--class-images: needs --class-prompt, what they show.")
        for name in ("steps", "rank", "vectors", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be above 0.")
        if self.samples < 2:
            raise UserError(f"--samples {self.samples}: a distance of sets needs at least 2.")
        for share in self.partial:
            if not 0 < share < 100:
                raise UserError(f"--partial {share}: must lie between 0 and 100 per cent.")

    def _check_inversion(self, kinds: Sequence[str]) -> None:
        if self.instance_prompt is not None and self.instance_prompt.count("{}") != 1:
            raise UserError(
                f"--instance-prompt {self.instance_prompt!r}: must hold {{}} once for "
                "textual-inversion, where the new word goes."
            )
        if self.class_prompt is not None and list(kinds) == ["textual-inversion"]:
            raise UserError("--class-prompt: textual-inversion has no class; leave it out.")


def check_device(device: str) -> None:
    """Raise `UserError` where training, which accelerate places, would not take this device."""
    asked = torch.device(device)
    taken = "cpu" if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") else None
    place = torch.device(taken or choose_device("auto"))
    if asked.type != place.type or (asked.index or 0) != (place.index or 0):
        hide = "CUDA_VISIBLE_DEVICES= hides the GPUs, CUDA_VISIBLE_DEVICES=1 shows the second only"
        raise UserError(
            f"--device {device}: imitators are trained where accelerate puts them, on {place}; "
            f"leave --device out, or choose by the environment ({hide}; ACCELERATE_USE_CPU=1 takes "
            "the CPU)."
        )
