"""A proxy on the teacher's own encoder: its features of the latents, and a small trained head.

Features of the denoiser itself make a better surrogate of a reward than towers of their own (Jia et
al. 2024, LaSRO, arXiv 2411.15247), and need no pretraining: the network has seen such latents, and
through its conditioning it knows the prompt.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.files import atomic_directory, write_json
from diffkit.models.conditioner import Conditioning
from diffkit.models.denoiser import Denoiser
from diffkit.models.feature_network import load_strictly, read_config
from diffkit.models.schedule import Schedule
from diffkit.randomness import normal
from diffkit.rewards.proxy import LatentProxy, Told

__all__ = ["TapProxy", "TapProxyConfig", "default_taps", "keep_until"]

_MOST_TAPS = 4


@dataclass(frozen=True)
class TapProxyConfig:
    """What a `TapProxy` reads and the sizes of its head, kept in its `config.json`.

    Attributes:
        taps: names of blocks of the denoiser, in the order of computation.
        features: their channels.
        text: length of the vector that the conditioning gives, 0 where there is none.
        place: in (0, 1), where on the noise schedule the network is asked.
        embedding_size: D of the common space.
    """

    taps: tuple[str, ...]
    features: tuple[int, ...]
    text: int
    place: float = 0.2
    embedding_size: int = 256


class TapProxy(LatentProxy):
    """S(z, c) = <f, g>: f of the denoiser's features of z and c, g of c, see `LatentProxy`.

        z_t = alpha_t z + sigma_t eps_0,    f = normalize(W2 gelu(W1 norm([mean, std of each tap])))
        g = normalize(V norm(mean of the text states, or the pooled one))

    The noise eps_0 is one fixed draw, the same for all samples: candidates of a prompt are compared
    under the same noise, and a latent has one score. The denoiser is the frozen teacher and not a
    part of this module; of its computation only what lies before the last tap is run. All
    parameters of the head are trained. A model without text has a learned g.

    Arguments:
        denoiser: the teacher; its dtype computes the features.
    """

    def __init__(self, config: TapProxyConfig, denoiser: Denoiser) -> None:
        super().__init__()
        self.config = config
        self._teacher = (denoiser,)  # in a tuple: not a submodule
        width, total = config.embedding_size, 2 * sum(config.features)
        self.image = nn.Sequential(
            nn.LayerNorm(total), nn.Linear(total, width), nn.GELU(), nn.Linear(width, width)
        )
        if config.text:
            self.text = nn.Sequential(nn.LayerNorm(config.text), nn.Linear(config.text, width))
        else:
            self.constant = nn.Parameter(torch.randn(width))
        self.eval()

    @classmethod
    def on(cls, denoiser: Denoiser, cond: Conditioning, **options: Any) -> TapProxy:
        """A new head on the first half of a denoiser: a U-Net's encoder and its middle.

        Arguments:
            cond: any conditioning of the model, on its device, for the sizes.
            options: `place`, `embedding_size` of the config.
        """
        config = TapProxyConfig(default_taps(denoiser), (), 0, **options)
        return cls(_measured(config, denoiser, cond), denoiser)

    def check(self, cond: Conditioning) -> None:
        """Raise `UserError` unless its teacher's features and text have the lengths that it reads.

        Arguments:
            cond: any conditioning of the model, on its device.
        """
        own, there = self.config, _measured(self.config, self._teacher[0], cond)
        if own != there:
            raise UserError(
                f"proxy: reads features of {own.features} channels and text of {own.text}; this "
                f"model has {there.features} and {there.text}. It was made for another model."
            )

    def told(self, prompts: Sequence[str], cond: Conditioning) -> Told:
        """The conditioning as it is."""
        return cond

    def embed_text(self, told: Told) -> Tensor:
        """Unit vectors (B, D) of a conditioning."""
        assert isinstance(told, Conditioning)
        states = _text(told)
        vectors = self.constant.expand(len(told), -1) if states is None else self.text(states)
        return F.normalize(vectors.float(), dim=-1)

    def embed_latents(self, latents: Tensor, told: Told) -> Tensor:
        """Unit vectors (B, D) of scaled latents (B, C, h, w) with their conditioning."""
        assert isinstance(told, Conditioning)
        found = _features(self._teacher[0], self.config, latents, told)
        return F.normalize(self.image(torch.cat(found, dim=1)).float(), dim=-1)

    def unlocked(self) -> list[str]:
        """All parameters: the teacher's are none of them."""
        return [name for name, _ in self.named_parameters()]

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `config.json` and `model.safetensors`, the head alone.

        Raises `UserError` when `folder` exists and `overwrite` is false.
        """
        with atomic_directory(folder, overwrite=overwrite) as place:
            write_json(place / "config.json", asdict(self.config))
            state = {name: value.float().contiguous() for name, value in self.state_dict().items()}
            save_file(state, place / "model.safetensors")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], denoiser: Denoiser) -> TapProxy:
        """Read what `save` wrote, on the CPU, for the denoiser that it was made for.

        Raises `UserError` when a file, a key of the configuration or a weight is missing or does
        not fit, and for a denoiser without such blocks.
        """
        path = Path(folder)
        values = dict(read_config(path, TapProxyConfig))
        values |= {name: tuple(values[name]) for name in ("taps", "features")}
        config = TapProxyConfig(**values)
        missing = [name for name in config.taps if name not in denoiser.tap_names]
        if missing:
            raise UserError(
                f"{path}: reads the block {missing[0]} of its teacher, which this model has not; "
                "it was made for another model."
            )
        proxy = cls(config, denoiser)
        load_strictly(proxy, path / "model.safetensors")
        return proxy


def _measured(config: TapProxyConfig, denoiser: Denoiser, cond: Conditioning) -> TapProxyConfig:
    """The same taps with the lengths that this denoiser gives, of latents as small as can be."""
    one, side = cond.select(slice(0, 1)), 2 * denoiser.multiple
    zeros = torch.zeros(1, denoiser.geometry.channels, side, side, device=denoiser.device)
    with torch.no_grad():
        found = _features(denoiser, config, zeros, one)
    text = _text(one)
    features = tuple(feature.shape[1] // 2 for feature in found)
    return replace(config, features=features, text=0 if text is None else text.shape[1])


def keep_until(denoiser: Denoiser, last: str) -> None:
    """Drop the weights of all blocks behind one, for a network that is asked no further.

    Arguments:
        last: a name of `tap_names`.
    """
    names = tuple(name for name in denoiser.tap_names if ":" not in name)
    for name in names[names.index(last) + 1 :]:
        parent, _, own = name.rpartition(".")
        setattr(denoiser.model.get_submodule(parent), own, nn.Identity())


def default_taps(denoiser: Denoiser) -> tuple[str, ...]:
    """The blocks of the first half: of a U-Net the encoder and the middle; at most four."""
    names = tuple(name for name in denoiser.tap_names if ":" not in name)  # whole blocks
    half = names[: len(names) // 2 + 1]
    if len(half) <= _MOST_TAPS:
        return half
    steps = (len(half) - 1) / (_MOST_TAPS - 1)
    return tuple(half[round(i * steps)] for i in range(_MOST_TAPS))


def _features(
    denoiser: Denoiser, config: TapProxyConfig, latents: Tensor, cond: Conditioning
) -> list[Tensor]:
    """[mean, std] over all places, (B, 2 C) float32, of each tap."""
    t = _time(denoiser.schedule, config.place, latents.device).expand(len(latents))
    noise = normal(latents.shape[1:], "tap proxy").to(latents.device)
    z_t = denoiser.schedule.add_noise(latents, noise.expand_as(latents), t)
    guidance = None
    if "guidance_embedding" in denoiser.family.capabilities:
        guidance = torch.full((len(latents),), denoiser.family.guidance_scale, device=t.device)
    last = denoiser.model.get_submodule(config.taps[-1])
    with denoiser.taps(config.taps) as found:
        handle = last.register_forward_hook(_stop)  # after the tap's own hook
        try:
            denoiser(z_t, t, cond, guidance)
        except _EnoughError:
            pass
        finally:
            handle.remove()
    return [_moments(found[name]) for name in config.taps]


class _EnoughError(Exception):
    """The last tap was reached: the rest of the network need not run."""


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _EnoughError


def _moments(feature: Tensor) -> Tensor:
    # U-Net blocks give (B, C, h, w), transformer blocks (B, L, C).
    places = feature.float().flatten(2) if feature.ndim == 4 else feature.float().transpose(1, 2)
    std = (places.var(-1, correction=0) + 1e-6).sqrt()
    return torch.cat([places.mean(-1), std], dim=1)


def _time(schedule: Schedule, place: float, device: torch.device) -> Tensor:
    """(1,), the time at `place`, see `Schedule.place`."""
    if schedule.kind == "edm":
        return torch.tensor([math.log(place) / 4], device=device)  # sigma = place
    time = torch.tensor([place * schedule.num_train_timesteps], device=device)
    return time.long() if schedule.kind == "ddpm" else time


def _text(cond: Conditioning) -> Tensor | None:
    """(B, D) float32: the pooled text, or the mean of its states; None for a model without text."""
    if cond.pooled is not None:
        return cond.pooled.float()
    if cond.tokens is None:
        return None
    states = cond.tokens.float()
    if cond.mask is None:
        return states.mean(1)
    weights = cond.mask.to(states)[..., None]
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
