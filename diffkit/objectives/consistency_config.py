"""Flags of latent consistency distillation, and what a model has to be for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from diffkit.errors import UserError
from diffkit.generation.card import Card, read_card
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.base import check_finite

__all__ = ["FEW_STEPS", "ConsistencyConfig"]

FEW_STEPS = 4
"""Steps that the result's card names; one to eight are usual."""

Target = Literal["ema", "online"]
Distance = Literal["huber", "l2", "e_latentlpips"]


@dataclass
class ConsistencyConfig:
    """The solver's grid, guidance, target and distance of latent consistency distillation."""

    solver_steps: int = 50
    """Intervals that the teacher's ODE is cut into."""
    segments: int = 1
    """Parts of the trajectory, each with an end of its own; the student then samples in as many
    steps, without fresh noise."""
    guidance_min: float | None = None
    """Lowest guidance scale that the teacher is asked with; each sample draws one. 1 is none. For a
    student that is told the scale by default half of the way from 1 to the model's usual scale,
    4.25 of 7.5, else the usual scale."""
    guidance_max: float | None = None
    """Highest guidance scale; by default twice that way, 14 of 7.5, or the usual scale."""
    embedding: bool | None = None
    """Tell the student the guidance scale. By default a U-Net that trains whole gets this input,
    and a network that has it (Flux-dev) is told; others are trained for the scales on average."""
    embedding_dim: int = 256
    """Width of the embedding of the scale."""
    embedding_init: Literal["zero", "default"] = "zero"
    """How the new input starts: without effect, or as a random linear map."""
    target: Target | None = None
    """What the student should say: what its moving average says one interval further on (ema), or
    what it says itself (online). By default online for a LoRA, else ema."""
    decay: float = 0.95
    """Of the moving average; 0.999 and more is for runs of 100,000 steps."""
    distance: Distance = "huber"
    """Between student and target: pseudo-Huber, squared, or E-LatentLPIPS."""
    huber: float = 1e-3
    """Width h of the pseudo-Huber distance sqrt(d^2 + h^2) - h."""
    latent_lpips: str = "embedded"
    """E-LatentLPIPS network: a file or folder, or `embedded`."""
    diversity_every: int = 100
    """Steps from one look at how much pictures of one prompt differ to the next; where they become
    alike the run warns, then stops. 0 for no look."""

    def check(self) -> None:
        """Raise `UserError` for impossible values, and for those that would do nothing."""
        check_finite(self, "lcd")
        for name in ("solver_steps", "segments", "huber"):
            if not getattr(self, name) > 0:
                raise UserError(f"lcd.{name}: {getattr(self, name)} must be above 0.")
        if self.diversity_every < 0:
            raise UserError(f"lcd.diversity_every: {self.diversity_every} must not be negative.")
        if self.solver_steps % self.segments:
            raise UserError(
                f"lcd.segments: {self.segments} parts of {self.solver_steps} solver steps are not "
                "equal; use a divisor of --lcd.solver-steps."
            )
        if not 0 <= self.decay < 1:
            raise UserError(f"lcd.decay: {self.decay} is not in [0, 1); 0 is --lcd.target online.")
        self._check_guidance()
        self._check_unused()

    def _check_guidance(self) -> None:
        low, high = self.guidance_min, self.guidance_max
        if (low is None) != (high is None):
            raise UserError("lcd.guidance_min, guidance_max: give both or none.")
        if low is not None and high is not None and not 0 <= low <= high:
            raise UserError(
                f"lcd.guidance_min: {low} to {high} is no range of scales; 1 is no guidance."
            )
        if self.embedding_dim < 4 or self.embedding_dim % 2:
            raise UserError(f"lcd.embedding_dim: {self.embedding_dim} must be even and at least 4.")

    def _check_unused(self) -> None:
        usual = ConsistencyConfig()
        needs = {
            "decay": (self.target != "online", "--lcd.target ema"),
            "huber": (self.distance == "huber", "--lcd.distance huber"),
            "latent_lpips": (self.distance == "e_latentlpips", "--lcd.distance e_latentlpips"),
            "embedding_dim": (self.embedding is not False, "--lcd.embedding true"),
            "embedding_init": (self.embedding is not False, "--lcd.embedding true"),
        }
        for name, (used, remedy) in needs.items():
            if getattr(self, name) != getattr(usual, name) and not used:
                raise UserError(f"lcd.{name}: has no effect without {remedy}.")
        if self.segments > 1 and self.distance == "e_latentlpips":
            raise UserError(
                "lcd.distance: e_latentlpips compares clean latents, and segments end in noisy "
                "ones; use --lcd.segments 1, or --lcd.distance huber."
            )

    def resolve(self, model: LatentDiffusion, lora: bool) -> ConsistencyConfig:
        """The values that None stands for with this model, before or after it was prepared.

        Raises `UserError` for what this model cannot be distilled with.
        """
        self._check_schedule(model)
        target: Target = self.target or ("online" if lora else "ema")
        if target == "online" and self.decay != ConsistencyConfig().decay:
            raise UserError("lcd.decay: has no effect without --lcd.target ema.")
        embedding = self._embedding(model, lora)
        low, high = self._scales(model, embedding)
        return replace(
            self, target=target, embedding=embedding, guidance_min=low, guidance_max=high
        )

    def _check_schedule(self, model: LatentDiffusion) -> None:
        schedule = model.schedule
        times = schedule.num_train_timesteps
        if schedule.kind == "edm":
            raise UserError("model: latent consistency distillation has no form for EDM models.")
        if schedule.prediction_type == "epsilon" and schedule.zero_terminal_snr:
            raise UserError(
                "model: it predicts eps on a schedule that ends in pure noise, where eps says "
                "nothing of the picture; one step of it is undefined."
            )
        if schedule.kind == "ddpm" and self.solver_steps > times:
            raise UserError(
                f"lcd.solver_steps: {self.solver_steps}; this model has {times} training times."
            )
        if self.segments == 1:
            return
        if schedule.kind == "ddpm" and times % self.solver_steps:
            raise UserError(
                f"lcd.segments: {self.solver_steps} solver steps do not divide the {times} "
                "training times, so that no scheduler stops at the edges; use --lcd.solver-steps "
                "50."
            )
        if schedule.kind == "flow" and model.family.flow_spacing != "fractions":
            raise UserError(
                f"lcd.segments: the {model.family.name} pipeline does not stop at the edges of "
                "segments; use --lcd.segments 1."
            )

    def _embedding(self, model: LatentDiffusion, lora: bool) -> bool:
        can = "time_cond_proj_dim" in model.denoiser.model.config  # type: ignore[operator]
        own = model.family.takes_guidance and not can
        if self.embedding is None:
            embedding = own or (can and not lora)
        else:
            embedding = self.embedding
        if embedding and not own and lora:
            raise UserError(
                "lcd.embedding: a LoRA file has no place for the new input; leave it out, or train "
                "all weights without --lora-rank."
            )
        if embedding and not own and not can:
            raise UserError(
                f"lcd.embedding: stock {model.family.name} networks have no input for the guidance "
                "scale; leave it out."
            )
        if own and not embedding:
            raise UserError(
                f"lcd.embedding: this {model.family.name} model is always told a guidance scale; "
                "leave it out, and make guidance_min and guidance_max equal for one scale."
            )
        changed = [
            name
            for name in ("embedding_dim", "embedding_init")
            if getattr(self, name) != getattr(ConsistencyConfig(), name)
        ]
        if changed and not (embedding and can):
            raise UserError(f"lcd.{changed[0]}: this student gets no new input; leave it out.")
        return embedding

    def sampling(self, model: LatentDiffusion) -> dict[str, Any]:
        """How the result is sampled, of a resolved config: "guidance_scale" and "steps".

        The scale is the usual one, or the nearest to it that was trained.
        """
        low, high = self.guidance_min, self.guidance_max
        assert low is not None and high is not None  # resolved
        told = model.family.takes_guidance
        guidance = min(max(usual_guidance(model), low), high) if told else 1.0
        steps = FEW_STEPS
        if self.segments > 1:
            steps = self.segments
        elif model.schedule.kind == "ddpm":  # whose times are some of the solver's
            steps = min(steps, self.solver_steps)
        return {"guidance_scale": guidance, "steps": steps}

    def _scales(self, model: LatentDiffusion, told: bool) -> tuple[float, float]:
        guided = model.family.takes_guidance or "cfg" in model.family.capabilities
        if self.guidance_min is not None and self.guidance_max is not None:
            if not guided:
                raise UserError(
                    f"lcd.guidance_min: this {model.family.name} model has no guidance; leave "
                    "guidance_min and guidance_max out."
                )
            return self.guidance_min, self.guidance_max
        usual = usual_guidance(model)
        if not guided or usual <= 1:
            return 1.0, 1.0
        return (1 + (usual - 1) / 2, 1 + 2 * (usual - 1)) if told else (usual, usual)


def usual_guidance(model: LatentDiffusion) -> float:
    """The guidance scale of the model's own card, else of its family."""
    card = read_card(model.source, model.revision) if model.source else Card()
    return card.guidance(model.family.guidance_scale)
