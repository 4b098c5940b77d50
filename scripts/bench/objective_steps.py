"""Training steps of the fine-tuning objectives on one model, beside those of plain denoising.

Latents and embeddings come from caches, so that a step is the objective's own work. An arm of pairs
trains on as many pictures as the others: half as many pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from diffkit.data.batch import Batch
from diffkit.data.preferences import PreferenceBatch
from diffkit.models.conditioner import Sizes
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.adaptive_dpo import AdaptiveConfig
from diffkit.objectives.base import Objective
from diffkit.objectives.denoising import DenoisingConfig, DenoisingObjective
from diffkit.objectives.latent_perceptual import LatentPerceptualObjective
from diffkit.objectives.latent_perceptual_config import LatentPerceptualConfig
from diffkit.objectives.pixel_space import PixelConfig, PixelObjective
from diffkit.objectives.preference import PreferenceObjective
from diffkit.objectives.preference_config import PreferenceConfig
from diffkit.randomness import SampleKeys, normal

__all__ = ["ARMS", "BASELINE", "Steps", "build"]

BASELINE = "plain fine-tuning"
EVERY_PROMPT = DenoisingConfig(condition_dropout=0.0)
KAPPA = 200.0
RUN = 100  # steps that Adaptive-DPO is told of; its warm-up is over after a tenth of them


@dataclass(frozen=True)
class Arm:
    """How an objective is made, and whether its data are pairs."""

    objective: Callable[[LatentDiffusion, Path], Objective]
    pairs: bool = False


def lpl(**config: Any) -> Arm:
    """The latent perceptual loss at a fixed weight."""
    flags = LatentPerceptualConfig(weight=3.0, **config)
    return Arm(lambda model, _: LatentPerceptualObjective(model, flags, EVERY_PROMPT))


def pixel(**config: Any) -> Arm:
    """The pixel-space loss at a fixed weight, of whole pictures unless told."""
    flags = PixelConfig(weight=2.0, **({"crop_latent": 0} | config))
    return Arm(lambda model, _: PixelObjective(model, flags, EVERY_PROMPT))


def cropped(model: LatentDiffusion, _: Path) -> Objective:
    """The pixel-space loss of windows of half the edge."""
    side = model.latent_shape(model.default_size, model.default_size)[-1] // 2
    return PixelObjective(model, PixelConfig(weight=2.0, crop_latent=side), EVERY_PROMPT)


def with_tiny_decoder(model: LatentDiffusion, scratch: Path) -> Objective:
    """The pixel-space loss through a tiny decoder of the usual width and random weights."""
    folder = scratch / "tiny decoder"
    if not folder.exists():
        levels = model.codec.factor.bit_length()
        torch.manual_seed(0)
        network = AutoencoderTiny(
            latent_channels=model.codec.channels,
            encoder_block_out_channels=(64,) * levels,
            decoder_block_out_channels=(64,) * levels,
            num_encoder_blocks=(1, *(3,) * (levels - 1)),
            num_decoder_blocks=(*(3,) * (levels - 1), 1),
        )
        network.save_pretrained(folder)
    config = PixelConfig(weight=2.0, decoder=str(folder), memory="plain", crop_latent=0)
    return PixelObjective(model, config, EVERY_PROMPT)


def preference(**config: Any) -> Arm:
    """Preference optimisation of all weights."""
    flags = PreferenceConfig(kappa=KAPPA, drift_limit=None, **config)

    def objective(model: LatentDiffusion, _: Path) -> Objective:
        return PreferenceObjective(model, flags, AdaptiveConfig(), EVERY_PROMPT, RUN)

    return Arm(objective, pairs=True)


ARMS: dict[str, Arm] = {
    BASELINE: Arm(lambda model, _: DenoisingObjective(model, EVERY_PROMPT)),
    "LPL": lpl(),
    "LPL, low memory": lpl(memory="low"),
    "pixel space": pixel(memory="plain"),
    "pixel space, low memory": pixel(memory="low"),
    "pixel space, crop": Arm(cropped),
    "pixel space, tiny decoder": Arm(with_tiny_decoder),
    "DPO": preference(),
    "Adaptive-DPO": preference(loss="adaptive_dpo"),
}


def build(
    name: str, model: LatentDiffusion, batch: int, scratch: Path, autocast: bool = False
) -> Steps:
    """The steps of an arm on a model of its own, `batch` pictures a step."""
    arm, cache = ARMS[name], Cache(model, batch)
    model.codec.vae.requires_grad_(False)
    model.denoiser.model.requires_grad_(True).train()
    objective = arm.objective(model, scratch)
    return Steps(objective, model.device, cache.pairs if arm.pairs else cache.pictures, autocast)


class Steps:
    """What the trainer does, one optimizer step a call, its logs and checkpoints aside."""

    def __init__(
        self,
        objective: Objective,
        device: torch.device,
        batches: Callable[[int], Any],
        autocast: bool,
    ) -> None:
        self.objective, self.batches, self.device = objective, batches, device
        self.phase = objective.phases()[0]
        self.player = objective.players()[self.phase.player]
        self.weights = [p for p in self.player.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-5)
        self.autocast = autocast
        self.made = RUN // 10
        objective.place(self.device)

    def __call__(self) -> Tensor:
        """One step; the mean loss."""
        step, objective = self.made, self.objective
        self.made += 1
        objective.begin(step)
        draws = objective.draw(self.batches(step), 0)
        with torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext():
            with torch.no_grad():
                shared = objective.shared(draws)
            terms = self.player(self.phase.name, draws, shared)
        loss = terms["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        watched = [name for name in objective.watched() if name in terms]
        objective.stepped(self.phase.name, {name: mean(terms[name]) for name in watched})
        return loss.detach()


def mean(term: Tensor | Sequence[Tensor]) -> Tensor:
    """Over the batch: a number, or two of a pair."""
    if isinstance(term, Tensor):
        return term.detach().float().mean()
    return torch.stack([part.detach().float().mean() for part in term])


class Cache:
    """Batches of cached samples of noise, at other addresses at each step."""

    def __init__(self, model: LatentDiffusion, batch: int) -> None:
        self.batch = batch
        self.size = model.default_size
        self.shape = model.latent_shape(self.size, self.size)
        with torch.no_grad():
            found = model.conditioner.encode(["a picture"] * batch)
        self.conditioning = replace(found.to("cpu"), time_ids=None)

    def pictures(self, step: int) -> Batch:
        """A batch of pictures."""
        return self._samples(step, self.batch, "picture")

    def pairs(self, step: int) -> PreferenceBatch:
        """Half as many pairs."""
        winners, losers = (self._samples(step, self.batch // 2, n) for n in ("winner", "loser"))
        return PreferenceBatch(winners, losers)

    def _samples(self, step: int, count: int, name: str) -> Batch:
        keys = SampleKeys(0, (step,) * count, tuple(range(count)))
        channels, height, width = self.shape
        moments = normal((count, 2 * channels, height, width), "objectives", name)
        moments[:, channels:] = -10  # the posterior's log variance
        sizes = [Sizes((self.size,) * 2, (0, 0), (self.size,) * 2)] * count
        words = ["a picture"] * count
        cond = self.conditioning.select(slice(0, count))
        return Batch(keys, None, moments, words, cond, None, sizes, words, [{}] * count)
