"""The table of methods: a loss to be ascended and the settings that belong to it.

A method is one function of `scene_losses` and one row. Sources: PhotoGuard (Salman et al. 2023,
arXiv:2302.06588), AdvDM (Liang et al. 2023, arXiv:2302.04578), Mist (Liang & Wu 2023,
arXiv:2305.12683), SDS and SDST (Xue et al. 2023, arXiv:2311.12832), ACE (Zheng et al. 2023,
arXiv:2310.04687), FSMG and ASPL (Van Le et al. 2023, arXiv:2303.15433), PID (Li et al. 2024,
arXiv:2406.15305), DiffusionGuard (Choi et al. 2024, arXiv:2410.05694).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from diffkit.errors import UserError
from diffkit.protection import editing
from diffkit.protection import scene_losses as losses
from diffkit.protection.scene_losses import Loss

__all__ = ["HIGH", "METHODS", "Method", "method_named"]

Passes = Literal["none", "forward", "backward"]


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        name: on the command line.
        words: what it does, for menus.
        loss: J (B,) of a scene; None for the control, which has none.
        targeted: J where a target is given to a method that has none by default.
        score: J for logs and for the best iterate, where that is not the loss.
        denoiser: which passes of the denoiser a draw needs.
        prompt: what the denoiser is told by default.
        t_range: fractions of the time axis between which times are usually drawn, 1 being noise.
        target: the default target picture, "" for a method without one.
        needs_start: it compares with the clean picture's moments.
        edits: it protects against inpainting: its mask says what an editor keeps.
        shrinks_mask: each step sees another, smaller outline of the kept region.
        steps, step_levels: usual number of sign steps and their size in levels.
        random_start: it begins at a random point of the box.
        norm: of the steps, "linf" (sign) or "l2".
        levels: usual budget.
        draws: gradients averaged in a step.
        joint: the schedule of a surrogate that is trained on the pictures; None for a fixed one.
        options: names of the settings that it reads beyond those of all methods.
    """

    name: str
    words: str
    loss: Loss | None
    score: Loss | None = None
    targeted: Loss | None = None
    denoiser: Passes = "none"
    prompt: str = "a picture"
    t_range: tuple[float, float] = (0.0, 1.0)
    target: str = ""
    needs_start: bool = False
    edits: bool = False
    shrinks_mask: bool = False
    steps: int = 100
    step_levels: float = 1.0
    random_start: bool = False
    norm: Literal["linf", "l2"] = "linf"
    levels: int = 8
    draws: int = 1
    joint: Literal["ace", "fsmg", "aspl"] | None = None
    options: frozenset[str] = frozenset()

    @property
    def encoder_only(self) -> bool:
        """True where an autoencoder is enough."""
        return self.loss is not None and self.denoiser == "none"


PATTERN = "text:DIFFKIT"

HIGH = (0.6, 1.0)
"""The noisy part of the time axis: {600..999} of a thousand times, as in the code of ACE."""

_NOISED = frozenset({"t_range", "times", "prompt", "draws", "sampled"})
_TARGETED = _NOISED | {"target"}
_TRAINED = frozenset(
    {"train_steps", "train_text_encoder", "class_prompt", "class_count", "prior_weight"}
)

# What the methods of a kind share.
_ENCODER = Method(
    "encoder", "", None, random_start=True, options=frozenset({"target", "tiles", "ensemble"})
)
_DENOISING = Method("denoising", "", None, denoiser="backward", options=_NOISED)
_SHORT = replace(_DENOISING, denoiser="forward")
_FINE_TUNED = replace(
    _DENOISING, targeted=losses.targeted, step_levels=0.64, options=_TARGETED | _TRAINED
)
_ACE = replace(
    _DENOISING,
    target=PATTERN,
    t_range=HIGH,
    steps=250,
    step_levels=0.75,
    joint="ace",
    options=_TARGETED | _TRAINED | {"output_kind", "rounds"},
)


def _row(kind: Method, name: str, words: str, loss: Loss, **own: Any) -> Method:
    return replace(kind, name=name, words=words, loss=loss, **own)


_ROWS = (
    Method("random", "random noise of the same size, the control", None),
    _row(
        _ENCODER,
        "photoguard",
        "pull the encoding to an empty one",
        losses.photoguard,
        target="zero",
    ),
    _row(
        _ENCODER,
        "texture",
        "pull the encoding to a pattern",
        losses.texture,
        target=PATTERN,
        options=_ENCODER.options | {"sampled"},
    ),
    _row(
        _ENCODER,
        "pid",
        "push the encoding away from itself",
        losses.pid,
        needs_start=True,
        options=_ENCODER.options - {"target"},
    ),
    _row(_DENOISING, "advdm", "make the picture hard to denoise", losses.semantic),
    _row(
        _DENOISING,
        "advdm-",
        "make the picture easy to denoise",
        losses.negative(losses.semantic),
    ),
    _row(
        _DENOISING,
        "mist",
        "make it hard to denoise and encode as a pattern",
        losses.mist,
        target=PATTERN,
        random_start=True,
        options=_TARGETED,
    ),
    _row(
        _SHORT,
        "sds+",
        "make it hard to denoise, by the short gradient",
        losses.sds,
        score=losses.semantic,
    ),
    _row(
        _SHORT,
        "sds-",
        "make it easy to denoise, by the short gradient",
        losses.negative(losses.sds),
        score=losses.negative(losses.semantic),
    ),
    _row(
        _SHORT,
        "sdst+",
        "sds+, and encode as a pattern",
        losses.sdst,
        score=losses.sdst_score(1),
        target=PATTERN,
        options=_TARGETED | {"residual_weight"},
    ),
    _row(
        _SHORT,
        "sdst-",
        "sds-, and encode as a pattern",
        losses.sdst_minus,
        score=losses.sdst_score(-1),
        target=PATTERN,
        options=_TARGETED | {"residual_weight"},
    ),
    _row(_ACE, "ace", "make denoisers put out a pattern; trains a surrogate", losses.ace),
    _row(_ACE, "ace+", "ace, and encode as the pattern", losses.ace_plus),
    _row(
        _FINE_TUNED,
        "fsmg",
        "advdm against a surrogate fine-tuned on the pictures",
        losses.semantic,
        joint="fsmg",
        options=_FINE_TUNED.options | {"surrogate"},
    ),
    _row(
        _FINE_TUNED,
        "aspl",
        "advdm against a surrogate trained in turns",
        losses.semantic,
        steps=300,
        joint="aspl",
        options=_FINE_TUNED.options | {"rounds"},
    ),
    _row(
        _DENOISING,
        "photoguard-diffusion",
        "spoil the result of a whole edit",
        editing.photoguard_diffusion,
        prompt="",
        edits=True,
        steps=200,
        norm="l2",
        levels=16,
        draws=4,
        options=frozenset({"prompt", "draws", "sampled", "norm"}),
    ),
    _row(
        _DENOISING,
        "diffusionguard",
        "spoil the first step of inpainting",
        editing.diffusion_guard,
        prompt="",
        edits=True,
        steps=200,
        step_levels=0.5,
        shrinks_mask=True,
        options=frozenset({"prompt", "draws", "sampled"}),
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ROWS}


def method_named(name: str) -> Method:
    """The row of a name; `UserError` with the known names for another."""
    if name not in METHODS:
        raise UserError(f"method {name!r}: unknown. Known: {', '.join(METHODS)}.")
    return METHODS[name]
