"""What a user chooses of a method; everything that shapes the bytes of the result is in here."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from diffkit.errors import UserError
from diffkit.protection.budget import check_levels
from diffkit.protection.methods import Method, method_named
from diffkit.protection.pgd import StepRule
from diffkit.protection.targets import check_target
from diffkit.protection.transforms import parse_transforms

if TYPE_CHECKING:
    from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["STRENGTHS", "Settings"]

STRENGTHS = {"low": 4, "medium": 8, "high": 16}
"""Budgets in levels by their names."""

_CHOSEN = frozenset(
    {"prompt", "target", "t_range", "times", "draws", "sampled", "tiles", "ensemble", "norm",
     "output_kind", "residual_weight", "surrogate", "rounds", "train_steps", "train_text_encoder",
     "class_prompt", "class_count", "prior_weight"}
)  # fmt: skip
"""What only some methods read: those that name it among their options."""


_FLAGS = {
    "levels": "strength",
    "draws": "eot",
    "sampled": "sample-latents",
    "output_kind": "ace-output",
}
"""Fields whose flags have other names."""


@dataclass(frozen=True)
class Settings:
    """A method and its options. None means the method's own usual value, see `METHODS`.

    Attributes:
        method: a name of `METHODS`.
        levels: the budget k, 0 to 32.
        steps: sign steps (for methods that train a surrogate: over all rounds).
        step_levels: size of a step in levels.
        prompt: what the denoiser is told; of a model of classes the name or number of one, or None
            for its null class.
        target: "text:WORD", "checker", a picture file, or "zero" for an empty encoding.
        t_range: fractions of the time axis between which times are drawn, 1 being noise.
        times: "uniform" in t_range, or "greedy" by SimAC's choice.
        draws: gradients averaged in a step.
        sampled: encode to samples of the posterior instead of its mean.
        transforms: input transforms that the attack is to survive, one a draw.
        views: views of a step; None lets the device and the method decide.
        tiles: look at all of a large picture in tiles at the model's resolution.
        ensemble: further models whose autoencoders are attacked too.
        momentum: of the steps; 0 is none.
        decay: shrink the steps to 1 % towards the end.
        norm: "linf" or "l2".
        random_start: begin at a random point of the box.
        keep_best: return the iterate with the best score instead of the last.
        contrast: give flat areas less of the budget, down to a quarter.
        output_kind: what ACE pulls to the target: the network's own output or its noise.
        residual_weight: of the residual in sdst, 5 or 1 in its paper.
        surrogate: what fsmg trains, a LoRA or all weights of the denoiser; "lora" by default.
        rounds: of attack and training; by default 5 (ace), or one for 6 steps (aspl).
        train_steps: training steps of a round; by default 5 (ace), 3 (aspl), 1000 (fsmg).
        train_text_encoder: put LoRA on the CLIP text encoders of the surrogate too.
        class_prompt: of the pictures that remind the surrogate of what the model knew.
        class_count: how many of them are made; 200 by default.
        prior_weight: of their loss; by default 1, and 0 on a CPU.
        seed: of all draws, together with the file's bytes.
    """

    method: str = "texture"
    levels: int | None = None
    steps: int | None = None
    step_levels: float | None = None
    prompt: str | None = None
    target: str | None = None
    t_range: tuple[float, float] | None = None
    times: Literal["uniform", "greedy"] = "uniform"
    draws: int | None = None
    sampled: bool = False
    transforms: tuple[str, ...] = ()
    views: int | None = None
    tiles: bool = False
    ensemble: tuple[str, ...] = ()
    momentum: float = 0.0
    decay: bool = False
    norm: Literal["linf", "l2"] | None = None
    random_start: bool | None = None
    keep_best: bool = False
    contrast: bool = False
    output_kind: Literal["native", "eps"] | None = None
    residual_weight: float | None = None
    surrogate: Literal["lora", "full"] | None = None
    rounds: int | None = None
    train_steps: int | None = None
    train_text_encoder: bool = False
    class_prompt: str | None = None
    class_count: int | None = None
    prior_weight: float | None = None
    seed: int = 0

    @property
    def row(self) -> Method:
        """The method's row; with its targeted loss where a target turns that on."""
        row = method_named(self.method)
        if self.target is None or row.targeted is None:
            return row
        return replace(row, loss=row.targeted)

    def rule(self) -> StepRule:
        """How the loop walks, with the method's usual values filled in."""
        row = self.row
        start = row.random_start if self.random_start is None else self.random_start
        return StepRule(
            levels=_or(self.levels, row.levels),
            steps=_or(self.steps, row.steps),
            step_levels=_or(self.step_levels, row.step_levels),
            random_start=start,
            decay=self.decay,
            momentum=self.momentum,
            norm=_or(self.norm, row.norm),
            keep_best=self.keep_best,
        )

    @property
    def shown_range(self) -> tuple[float, float]:
        """The fractions of the time axis between which times are drawn."""
        return _or(self.t_range, self.row.t_range)

    @property
    def shown_target(self) -> str:
        """The target that is drawn; "" for a method without one."""
        return _or(self.target, self.row.target)

    @property
    def shown_prompt(self) -> str:
        """The prompt that is used; "" where the method reads none."""
        return _or(self.prompt, self.row.prompt) if self.row.denoiser != "none" else ""

    def prompt_for(self, model: LatentDiffusion) -> str:
        """The prompt that this model is told; "", its null class, of a model of classes."""
        if self.prompt is None and model.conditioner.classes is not None:
            return ""
        return self.shown_prompt

    def check(self) -> None:
        """Raise `UserError` for unknown names, impossible values, and options that do nothing."""
        row = self.row
        self.rule().check()
        if self.levels is not None:
            check_levels(self.levels)
        self._check_idle(row)
        low, high = self.shown_range
        if not 0 <= low < high <= 1:
            raise UserError(f"--t-range: {low:g}-{high:g} must satisfy 0 <= low < high <= 1.")
        if self.draws is not None and self.draws < 1:
            raise UserError(f"--eot: {self.draws} must be at least 1.")
        if self.views is not None and self.views < 1:
            raise UserError(f"--views: {self.views} must be at least 1, the whole picture.")
        if row.needs_start and self.random_start is False:
            raise UserError(
                f"--random-start: {row.name} needs it; at the picture itself its gradient is "
                "exactly 0 and nothing would move."
            )
        self._check_training()
        parse_transforms(",".join(self.transforms))
        if self.shown_target not in ("", "zero"):
            check_target(self.shown_target)

    def _check_training(self) -> None:
        """Of the surrogate's training."""
        for name in ("rounds", "train_steps", "class_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{_flag(name)}: {value} must be at least 1.")
        if self.rounds is not None and self.rounds > self.rule().steps:
            raise UserError(f"--rounds: {self.rounds} are more than the {self.rule().steps} steps.")
        if self.class_prompt is None:
            for name in ("class_count", "prior_weight"):
                if getattr(self, name) is not None:
                    raise UserError(f"{_flag(name)}: does nothing without --class-prompt.")
        elif self.class_prompt == "":
            raise UserError("--class-prompt: is empty; leave it out, or say what is to be seen.")
        if self.prior_weight is not None and not self.prior_weight > 0:
            raise UserError(f"--prior-weight: {self.prior_weight} must be above 0.")
        if self.surrogate == "full" and self.train_text_encoder:
            raise UserError("--train-text-encoder: puts a LoRA on it; leave out --surrogate full.")
        if self.keep_best and self.row.joint in ("ace", "aspl"):
            raise UserError(
                f"--keep-best: {self.method} trains its surrogate between the steps, and scores of "
                "two surrogates cannot be compared; leave it out."
            )

    def _check_idle(self, row: Method) -> None:
        usual = Settings(self.method)
        if row.loss is None:
            allowed = {"method", "levels", "seed", "contrast"}
        else:
            allowed = {field.name for field in fields(self)} - (_CHOSEN - row.options)
            if self.transforms or (self.sampled and "sampled" in allowed):
                allowed |= {"draws"}  # the encoder's methods have nothing else to draw
        for field in fields(self):
            value = getattr(self, field.name)
            if value != getattr(usual, field.name) and field.name not in allowed:
                more = " without --transforms" if field.name == "draws" and row.encoder_only else ""
                raise UserError(
                    f"{_flag(field.name)}: does nothing for the method {row.name}{more}; leave it "
                    "out."
                )
        if self.times == "greedy" and self.t_range is not None:
            raise UserError("--t-range: the greedy choice of times has none; leave it out.")


def _flag(name: str) -> str:
    """The flag of a field."""
    return f"--{_FLAGS.get(name, name).replace('_', '-')}"


def _or(value: Any, usual: Any) -> Any:
    return usual if value is None else value
