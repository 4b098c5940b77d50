"""Flags of the distillation of a diffusion model into a one-step generator."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.base import check_finite
from diffkit.objectives.shares import Share

__all__ = ["DiscriminatorKind", "DmdConfig", "GanConfig", "Regression", "loss_shares"]

Regression = Literal["none", "mse", "huber", "lpl", "latentlpips", "e_latentlpips"]
DiscriminatorKind = Literal["none", "unet", "ladd"]
R1 = Literal["none", "exact", "approximate"]
Adversarial = Literal["non_saturating", "relativistic"]

_SHARE = 0.25
_DMD_SHARE = 1.0
_DMD_GUIDANCE = {"Stable Diffusion XL": 8.0}
_EVERY = {"exact": 16, "approximate": 1}
_OF_R1 = ("gamma", "r1_every", "r1_sigma")
_OF_UNET = ("noise_input", "multiscale")
_OPPOSED = ("loss", "share", "weight", "rate", "mismatch", "r1", *_OF_R1, *_OF_UNET)


@dataclass
class GanConfig:
    """What the generator is compared with, and how it is judged."""

    regression: Regression = "e_latentlpips"
    """Between the generator's latents and the teacher's from the same noise: E-LatentLPIPS,
    LatentLPIPS without its random maps, features of the decoder (lpl), pseudo-Huber, squared, or
    none."""
    latent_lpips: str = "embedded"
    """LatentLPIPS network: a file or folder, or `embedded`."""
    augmentation: str | None = None
    """Random maps of E-LatentLPIPS, such as bg; the network's own by default."""
    huber: float = 0.03
    """Width h of the pseudo-Huber distance sqrt(d^2 + h^2) - h."""
    discriminator: DiscriminatorKind | None = None
    """unet: a trainable copy of the teacher, judging at every scale. ladd: heads on the frozen
    teacher, at random noise levels. none: regression alone. By default unet for U-Nets with text,
    else ladd."""
    dmd: bool = False
    """Match distributions too (DMD2): a third network follows the generator's pictures, and the
    generator goes where the teacher's score differs from it."""
    teacher: str | None = None
    """Model that the other networks start from, where the one in training is a student already; the
    model itself by default."""
    pictures: bool = False
    """The data are pictures with captions and not pairs of `diffkit trajectories`."""
    time: int | None = None
    """Training time at which the generator is called; the last one by default. SDXL's eps is
    unstable there: DMD2 calls it at 399, after some steps of regression."""
    loss: Adversarial = "non_saturating"
    """non_saturating: the discriminator calls each latent true or made. relativistic: it tells
    which of two is the true one, the teacher's and the generator's of the same noise, where those
    are given; what sets prompts apart is then no part of what it has to learn."""
    share: float | None = None
    """Length of the discriminator's gradient at the generator's latents, in parts of the first
    loss's; 0.25 by default."""
    weight: float | None = None
    """A fixed weight of the discriminator's loss in place of a share."""
    start: int = 0
    """First training step with the other networks; before it there is regression alone."""
    warmup: int = 200
    """Steps from there in which they train and the generator does not hear of them."""
    rate: float = 1.0
    """Learning rate of the discriminator, in parts of the run's."""
    noise_input: bool | None = None
    """Tell the discriminator the noise that the generator started from; true by default, but for
    pictures."""
    multiscale: bool = True
    """Judge at every scale, from latents of every size, and not at the last one alone."""
    mismatch: float | None = None
    """Part of the generated latents that the discriminator is shown another pair's true ones for;
    0.25 by default, 0 for pictures, and where no prompt and no noise would tell them."""
    r1: R1 | None = None
    """Penalty of the discriminator's gradient at true latents: of one sample, by second
    derivatives; approximately, by noise; or none. By default exact for unet, whose attention then
    keeps its float32 maps; approximate for ladd, a network of many tokens, and for pictures."""
    gamma: float = 0.1
    """Strength of the penalty, gamma / 2 |gradient|^2."""
    r1_every: int | None = None
    """Steps from one penalty to the next, each as strong as all of them; 16 by default, 1 for the
    approximate one."""
    r1_sigma: float = 0.1
    """Deviation of the approximation's noise."""
    diversity_every: int = 100
    """Steps from one look at how much pictures of one prompt differ to the next; where they become
    alike the run warns, then stops. 0 for no look."""

    def check(self) -> None:
        """Raise `UserError` for impossible values, and for those that would do nothing."""
        check_finite(self, "gan")
        self._check_ranges()
        self._check_regression()
        if self.discriminator == "none":
            self._refuse(_OPPOSED, "there is no discriminator")
            if not self.dmd:
                self._refuse(("start", "warmup", "teacher"), "no other network trains")
        if self.regression == "none" and self.discriminator == "none" and not self.dmd:
            raise UserError("gan.regression: nothing would be learnt; leave it out.")
        if self.regression == "none" and self.start:
            raise UserError("gan.start: there is no regression to begin with; leave it out.")
        if self.pictures:
            self._check_pictures()
        if self.share is not None and self.weight is not None:
            raise UserError("gan.share: the weight is fixed by gan.weight; leave one of them out.")
        alone = self.regression == "none" and not self.dmd
        if alone:
            self._refuse(("share", "weight"), "there is no other loss to weigh it by")
        if self.discriminator == "ladd":
            self._refuse(_OF_UNET, "they are for --gan.discriminator unet")
        if self.r1 == "none":
            self._refuse(_OF_R1, "there is no penalty")
        if self.r1 == "exact":
            self._refuse(("r1_sigma",), "it is for --gan.r1 approximate")

    def exact_penalty(self) -> bool:
        """Whether the discriminator surely needs second derivatives; `resolve` decides the rest."""
        if self.discriminator == "none":
            return False
        usual = self.r1 is None and self.discriminator == "unet" and not self.pictures
        return self.r1 == "exact" or usual

    def _check_ranges(self) -> None:
        for name in ("huber", "rate", "gamma", "r1_sigma", "r1_every", "share", "weight"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"gan.{name}: {value} must be above 0.")
        for name in ("start", "warmup", "diversity_every"):
            if getattr(self, name) < 0:
                raise UserError(f"gan.{name}: {getattr(self, name)} must not be negative.")
        if self.mismatch is not None and not 0 <= self.mismatch < 1:
            raise UserError(f"gan.mismatch: {self.mismatch} is not in [0, 1).")

    def _check_regression(self) -> None:
        if not self.regression.endswith("latentlpips"):
            self._refuse(("latent_lpips",), f"the regression is {self.regression}")
        if self.regression != "e_latentlpips":
            self._refuse(("augmentation",), "it is for --gan.regression e_latentlpips")
        if self.regression != "huber":
            self._refuse(("huber",), "it is for --gan.regression huber")

    def _check_pictures(self) -> None:
        if self.regression != "none":
            raise UserError(
                "gan.pictures: pictures belong to no noise that a generator could be compared at; "
                "use --gan.regression none."
            )
        self._refuse(("mismatch",), "pictures are not looked up by number")
        if self.r1 == "exact":
            raise UserError("gan.r1: exact is for trajectories; use --gan.r1 approximate.")
        if self.noise_input:
            raise UserError(
                "gan.noise_input: a picture belongs to no noise, by which it would be known; "
                "leave it out."
            )

    def _refuse(self, names: tuple[str, ...], reason: str) -> None:
        _refuse(self, "gan", names, reason)

    def sampling(self, model: LatentDiffusion) -> dict[str, Any]:
        """How the result is sampled: "guidance_scale", what the generator is told, and "steps"."""
        return {"guidance_scale": model.family.train_guidance or 1.0, "steps": 1}

    def resolve(self, model: LatentDiffusion) -> GanConfig:
        """The values that None stands for with this model, the one in training.

        Raises `UserError` for what this model cannot be trained with.
        """
        schedule, kind = model.schedule, self.discriminator
        if schedule.kind == "edm":
            raise UserError("model: diffusers has no one-step scheduler for an EDM model.")
        if kind is None:
            kind = "unet" if model.denoiser.inputs else "ladd"
            changed = [name for name in _OF_UNET if getattr(self, name) != getattr(_USUAL, name)]
            if kind == "ladd" and changed:
                raise UserError(f"gan.{changed[0]}: is for U-Nets with text; leave it out.")
        if kind == "ladd":
            model.family.require("taps")
        told = kind == "unet" and not self.pictures
        if self.noise_input is not None:
            told = self.noise_input
        named: dict[str, Any] = {"noise_input": told, "mismatch": self._mismatch(model, told)}
        r1 = self.r1
        if r1 is None:
            r1 = "exact" if replace(self, discriminator=kind).exact_penalty() else "approximate"
        if r1 == "exact":
            self._refuse(("r1_sigma",), "it is for --gan.r1 approximate")
        named |= {"r1": r1, "r1_every": self.r1_every or _EVERY.get(r1, 1)}
        time = _time(model) if self.time is None else self.time
        _check_time(model, time)
        return replace(self, discriminator=kind, time=time, **named)

    def _mismatch(self, model: LatentDiffusion, told: bool) -> float:
        """The part of mixed rows; `UserError` where nothing would tell them from true ones."""
        classes = model.conditioner.classes
        blind = not told and classes is not None and not classes.count
        if blind and self.mismatch:
            raise UserError(
                "gan.mismatch: the discriminator is told neither a prompt nor the noise, so that "
                "it would call true latents both true and made; leave it out."
            )
        if self.mismatch is None:
            return 0.0 if blind or self.pictures else 0.25
        return self.mismatch


def _refuse(config: Any, section: str, names: tuple[str, ...], reason: str) -> None:
    usual = type(config)()
    for name in names:
        if getattr(config, name) != getattr(usual, name):
            raise UserError(f"{section}.{name}: would do nothing, as {reason}; leave it out.")


def _time(model: LatentDiffusion) -> int:
    times = model.schedule.num_train_timesteps
    return times if model.schedule.kind == "flow" else times - 1


def _check_time(model: LatentDiffusion, time: int) -> None:
    """Raise `UserError` for a time at which one call gives no picture, or no stock pipeline it."""
    last, schedule = _time(model), model.schedule
    if schedule.kind == "flow" and time != last:
        raise UserError(
            f"gan.time: the pipelines of {model.family.name} begin at {last}; leave it out."
        )
    if not 1 <= time <= last:
        raise UserError(f"gan.time: {time} is not one of this model's times, 1 to {last}.")
    if schedule.prediction_type == "epsilon" and schedule.zero_terminal_snr and time == last:
        raise UserError(
            "model: it predicts eps on a schedule that ends in pure noise, where eps says nothing "
            f"of the picture; use an earlier time, such as --gan.time {last * 2 // 5}."
        )


@dataclass
class DmdConfig:
    """Distribution matching (DMD2); read with gan.dmd."""

    share: float | None = None
    """Length of its gradient at the generator's latents, in parts of the regression's; 1 by
    default. Without a regression it is the first loss."""
    weight: float | None = None
    """A fixed weight in place of a share."""
    updates: int = 5
    """Steps of the network that follows the generator, to one of the generator."""
    rate: float = 1.0
    """Its learning rate, in parts of the run's."""
    guidance: float | None = None
    """Guidance scale of the teacher's score; by default DMD2's, 8 for SDXL and 1.75 for others, 1
    for a model without guidance and for one that is told its scale."""
    low: float = 0.02
    """Noise levels are uniform from this part of the training times on,"""
    high: float = 0.98
    """to this one."""

    def check(self, gan: GanConfig) -> None:
        """Raise `UserError` for impossible values, and for those that would do nothing."""
        check_finite(self, "dmd")
        if not gan.dmd:
            names = tuple(field.name for field in fields(self))
            _refuse(self, "dmd", names, "distributions are not matched without --gan.dmd")
            return
        for name in ("share", "weight", "updates", "rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"dmd.{name}: {value} must be above 0.")
        if not 0 <= self.low < self.high <= 1:
            raise UserError(f"dmd.low: {self.low} to {self.high} is no range within [0, 1].")
        if self.guidance is not None and not self.guidance >= 1:
            raise UserError(f"dmd.guidance: {self.guidance} must be at least 1, no guidance.")
        if self.share is not None and self.weight is not None:
            raise UserError("dmd.share: the weight is fixed by dmd.weight; leave one of them out.")
        if gan.regression == "none":
            _refuse(self, "dmd", ("share", "weight"), "it is the first loss itself")

    def scale(self, model: LatentDiffusion) -> float:
        """The guidance scale with this model; `UserError` for one that it does not have."""
        can = "cfg" in model.family.capabilities
        if self.guidance is not None and self.guidance != 1 and not can:
            raise UserError(
                f"dmd.guidance: this {model.family.name} model has no classifier-free guidance; "
                "leave it out."
            )
        if self.guidance is None:
            usual = _DMD_GUIDANCE.get(model.family.name, 1.75)
            return usual if can and not model.family.takes_guidance else 1.0
        return self.guidance


_USUAL = GanConfig()


def loss_shares(gan: GanConfig, dmd: DmdConfig) -> dict[str, Share]:
    """The generator's losses by name, the first one first, and how each counts; of that one 1.

    Arguments:
        gan: resolved.
    """
    found = {}
    if gan.regression != "none":
        found["regression"] = Share(weight=1.0)
    if gan.dmd:
        share = _DMD_SHARE if dmd.share is None else dmd.share
        found["dmd"] = Share(share) if dmd.weight is None else Share(weight=dmd.weight)
    if gan.discriminator != "none":
        share = _SHARE if gan.share is None else gan.share
        found["adversarial"] = Share(share) if gan.weight is None else Share(weight=gan.weight)
    return found
