"""Protect pictures in memory: uint8 in, uint8 out, within the budget exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.codec_kinds import PixelCodec
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.budget import as_signed
from diffkit.protection.contrast import contrast_weight
from diffkit.protection.gradients import Draws, ImageGradient, Pictures
from diffkit.protection.pgd import Pgd, State, random_noise
from diffkit.protection.settings import Settings
from diffkit.protection.surrogate import Surrogate, aside, frozen
from diffkit.protection.timesteps import greedy_choice
from diffkit.protection.views import ViewPlan, plan_views

__all__ = [
    "Attack",
    "ProtectionResult",
    "budget_weight",
    "check_mask",
    "check_model",
    "idle_networks",
    "plan_for",
    "prepared",
    "protect",
]


@dataclass(frozen=True)
class ProtectionResult:
    """One protected picture.

    Attributes:
        pixels: uint8 (C, H, W).
        stats: what happened: steps, skipped steps, first and last score, largest and mean change in
            levels; numbers of the saved pixels, not of the float ones.
    """

    pixels: Tensor
    stats: dict[str, Any] = field(default_factory=dict)


@dataclass
class Attack:
    """A batch of pictures of one size on its way: the walk, its gradient and where it stands."""

    settings: Settings
    pictures: Pictures
    pgd: Pgd
    gradient: ImageGradient | None
    state: State | None = None
    done: int = 0

    @classmethod
    def prepare(
        cls,
        pixels: Tensor,
        surrogates: Sequence[Surrogate],
        settings: Settings,
        *,
        seeds: Sequence[int],
        plan: ViewPlan | None,
        alpha: Tensor | None = None,
        mask: Tensor | None = None,
        lean: bool = False,
    ) -> Attack:
        """Everything but the first step; see `protect`."""
        row, device = settings.row, pixels.device
        weight = budget_weight(pixels, settings, alpha, mask)
        opaque = None if alpha is None else alpha.to(device, torch.float32) / 255
        keep = mask.to(device, torch.float32) if row.edits and mask is not None else None
        pictures = Pictures(pixels, list(seeds), opaque, keep)
        pgd = Pgd(pixels, settings.rule(), seeds, weight)
        if row.loss is None or plan is None:
            return cls(settings, pictures, pgd, None)
        schedule = surrogates[0].denoiser
        usual = "eps" if schedule is not None and schedule.schedule.kind == "flow" else "native"
        draws = Draws(
            t_range=settings.shown_range,
            sampled=settings.sampled,
            count=row.draws if settings.draws is None else settings.draws,
            transforms=settings.transforms,
            target=settings.shown_target,
            output_kind=settings.output_kind or usual,
            residual_weight=5.0 if settings.residual_weight is None else settings.residual_weight,
        )
        gradient = ImageGradient(surrogates, row, pictures, plan, draws, lean)
        return cls(settings, pictures, pgd, gradient)

    @property
    def x(self) -> Tensor:
        """The pictures as they are now, (B, C, H, W) float32, unrounded."""
        return self.pgd.origin if self.state is None else self.state.x

    def to(self, device: torch.device | str) -> None:
        """Move all pictures of the walk; the models stay where they are.

        Only the 8-bit pictures and x are kept, what a step needs beside them is made again then.
        """
        self.pgd.to(device)
        if self.state is not None:
            self.state.to(device)
        self.pictures = self.pictures.to(device)
        if self.gradient is not None:
            self.gradient.pictures = self.pictures

    @property
    def first(self) -> Tensor:
        """J (B,) at the clean pictures, under the surrogate as it is now."""
        assert self.gradient is not None
        return self.gradient.score(self.pgd.origin)

    def advance(self, count: int, each: Callable[[int], None] | None = None) -> None:
        """`count` more steps; the first call starts the walk."""
        if self.gradient is None:
            return
        if self.state is None:
            if self.settings.times == "greedy":
                choice = greedy_choice(self.gradient, self.pgd)
                self.gradient.draws = replace(self.gradient.draws, choose=choice)
            self.state = self.pgd.start()
        score = self.gradient.score if self.settings.keep_best else None
        self.pgd.advance(self.state, self.gradient, self.done, count, score, each)
        self.done += count

    def finish(self) -> list[ProtectionResult]:
        """The saved pixels and what can be said of them."""
        if self.gradient is None or self.state is None:
            levels = self.pgd.rule.levels
            noisy = random_noise(self.pgd.pixels, levels, self.pictures.seeds, self.pgd.weight)
            return [ProtectionResult(q, _change(q, p)) for q, p in _pairs(noisy, self.pgd.pixels)]
        q = self.pgd.finish(self.state)
        last = self.gradient.score(as_signed(q)).tolist()
        # Both are read now: the surrogate may have been trained meanwhile.
        first, skipped = self.first.tolist(), self.state.skipped.tolist()
        results = []
        for i, (mine, clean) in enumerate(_pairs(q, self.pgd.pixels)):
            stats = {
                "steps": self.done,
                "skipped_steps": skipped[i],
                "score_first": first[i],
                "score_last": last[i],
                **_change(mine, clean),
            }
            results.append(ProtectionResult(mine, stats))
        return results


def protect(
    pixels: Tensor,
    model: LatentDiffusion | None,
    settings: Settings,
    *,
    seeds: Sequence[int],
    alpha: Tensor | None = None,
    mask: Tensor | None = None,
    ensemble: Sequence[LatentDiffusion] = (),
    lean: bool = False,
    surrogates: Sequence[Surrogate] | None = None,
    each: Callable[[int], None] | None = None,
) -> list[ProtectionResult]:
    """Protect pictures of one size with a method whose surrogate is fixed.

    The result depends on each picture, its seed and the settings, not on the batch that it is in
    (up to the rounding of kernels). Equal bytes in every run are promised on a CPU with one number
    of threads; on a GPU some gradients are summed in an order that changes from run to run, so that
    a few pixels may differ. Methods that train a surrogate need all pictures of an artist at once:
    see `diffkit.protection.joint`.

    Arguments:
        pixels: uint8 (B, C, H, W), C = 3, or 1 for grey pictures, of any size.
        model: the attacked model, unchanged; the random control needs none.
        settings: method and options.
        seeds: one a picture.
        alpha: uint8 (B, 1, H, W); pixels with alpha 0 keep their bits, the model sees the others on
            white. None is opaque.
        mask: float (B, 1, H, W) in [0, 1], 1 where pixels may change. For methods against editing 1
            is also what the editor keeps.
        ensemble: further models whose autoencoders are attacked too, by methods of the encoder.
        lean: two passes and recomputed activations, for less memory.
        surrogates: of `prepared`, where several calls share it.
        each: called with the number of every finished step.

    Raises:
        UserError: options that the method or the model cannot use.
        RunFailed: gradients were not finite.
    """
    settings.check()
    if settings.row.joint is not None:
        raise UserError(f"{settings.method}: trains a surrogate on a set; use protect_set.")
    if model is not None:
        check_mask(model, settings, mask is not None)
    with contextlib.ExitStack() as stack:
        if surrogates is None:
            surrogates = stack.enter_context(prepared(model, settings, ensemble))
        stack.enter_context(_still(surrogates, lean))
        plan = None
        if model is not None and settings.row.loss is not None:
            plan = plan_for(model, settings, *pixels.shape[-2:])
            pixels = pixels.to(model.device)
        options: dict[str, Any] = {"alpha": alpha, "mask": mask, "lean": lean}
        attack = Attack.prepare(pixels, surrogates, settings, seeds=seeds, plan=plan, **options)
        attack.advance(settings.rule().steps, each)
        return attack.finish()


@contextlib.contextmanager
def prepared(
    model: LatentDiffusion | None,
    settings: Settings,
    ensemble: Sequence[LatentDiffusion] = (),
    lean: bool = False,
) -> Iterator[list[Surrogate]]:
    """The surrogates of a method, frozen inside the block and as before after it.

    Networks that no step runs through, such as text encoders, wait in the memory of the CPU inside
    the block; a prompt can be encoded there all the same.
    """
    row = settings.row
    if ensemble and not row.encoder_only:
        raise UserError(
            f"--ensemble: does nothing for the method {row.name}, which is no attack on "
            "autoencoders alone; leave it out."
        )
    if len(settings.ensemble) not in (0, len(ensemble)):
        raise UserError(
            f"ensemble: the settings name {len(settings.ensemble)} further models, and "
            f"{len(ensemble)} are given; load them and give them as the argument ensemble."
        )
    if row.loss is None:
        yield []
        return
    if model is None:
        raise UserError(f"{row.name}: needs a model to compute the protection against.")
    for one in (model, *ensemble):
        check_model(one, settings)
    if row.encoder_only:
        surrogates = [Surrogate(m.codec) for m in (model, *ensemble)]
    else:
        surrogates = [Surrogate.of(model, settings.prompt_for(model))]
    idle = [network for one in (model, *ensemble) for network in idle_networks(one, settings)]
    with aside(idle), _still(surrogates, lean):
        yield surrogates


def _still(surrogates: Sequence[Surrogate], lean: bool) -> contextlib.AbstractContextManager[None]:
    networks = [network for surrogate in surrogates for network in surrogate.networks()]
    denoisers = [s.denoiser.model for s in surrogates if s.denoiser is not None]
    return frozen(networks, denoisers if lean else ())


def idle_networks(model: LatentDiffusion, settings: Settings) -> list[nn.Module]:
    """What no step runs through: text encoders that do not train, safety checkers."""
    used: list[Any] = [model.codec.vae, model.denoiser.model]
    if settings.train_text_encoder:
        used += model.conditioner.encoders.values()
    return [net for net in model.networks.values() if all(net is not one for one in used)]


def check_model(model: LatentDiffusion, settings: Settings) -> None:
    """Raise `UserError` where the model lacks what the method needs."""
    row, channels = settings.row, model.codec.channels
    if row.encoder_only:
        if isinstance(model.codec, PixelCodec):
            raise UserError(
                f"{row.name}: attacks an autoencoder, and this model works on pixels without one. "
                "Give a latent diffusion model."
            )
        return
    taken = model.denoiser.geometry.channels
    if row.name == "diffusionguard" and taken != 2 * channels + 1:
        raise UserError(
            f"{row.name}: needs an inpainting model, whose denoiser takes 2C + 1 channels; this "
            f"one takes {taken} and its latents have {channels}."
        )
    if row.targeted is not None and settings.target is not None and model.schedule.kind != "ddpm":
        raise UserError(
            f"--target: with {row.name} it is what the posterior of a DDPM is pulled to, and this "
            "model has none; leave it out, or use ace."
        )
    if not row.edits and taken != channels:
        raise UserError(
            f"{row.name}: this denoiser takes {taken} channels and its latents have {channels}: an "
            "inpainting or editing model. Give the text-to-image model that it was made from."
        )


def check_mask(model: LatentDiffusion, settings: Settings, masked: bool) -> None:
    """Raise `UserError` where an inpainting model is to be attacked without a mask."""
    inpaints = Surrogate(model.codec, model.denoiser).inpaints
    if settings.row.edits and inpaints and not masked:
        raise UserError(
            f"--mask: {settings.method} needs it with an inpainting model; white is what an editor "
            "keeps."
        )


def plan_for(
    model: LatentDiffusion,
    settings: Settings,
    height: int,
    width: int,
    device: torch.device | None = None,
) -> ViewPlan:
    """The views of a picture of this size through this model, on its own device by default."""
    return plan_views(
        height,
        width,
        model.default_size,
        model.working_multiple,
        square=model.family.square,
        views=settings.views,
        tiles=settings.tiles,
        encoder_only=settings.row.encoder_only,
        on_cpu=(device or model.device).type == "cpu",
    )


def budget_weight(
    pixels: Tensor, settings: Settings, alpha: Tensor | None, mask: Tensor | None
) -> Tensor | None:
    """The share of the budget of each pixel, (B, 1, H, W) in [0, 1], or None where it is 1."""
    parts = []
    if mask is not None:
        parts.append(mask.to(pixels.device, torch.float32))
    if alpha is not None:
        parts.append((alpha.to(pixels.device) > 0).float())
    if settings.contrast:
        parts.append(contrast_weight(pixels))
    if not parts:
        return None
    weight = parts[0]
    for part in parts[1:]:
        weight = weight * part
    return weight


def _pairs(q: Tensor, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(q.cpu(), pixels.cpu(), strict=True))


def _change(q: Tensor, clean: Tensor) -> dict[str, float]:
    delta = (q.to(torch.int16) - clean.to(torch.int16)).float()
    return {
        "max_change": float(delta.abs().max()),
        "mean_change": float(delta.abs().mean()),
        "mean_shift": float(delta.mean()),
    }
