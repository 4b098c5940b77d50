"""Noise-image pairs of a teacher's sampler as training data: z, the prompt, and where it led."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffkit.data.cache import EmbeddingCache
from diffkit.data.prefetch import prefetch
from diffkit.data.sampler import BatchSampler, share
from diffkit.data.scan import threaded
from diffkit.data.trajectory_store import (
    Prompt,
    latent_space,
    read_header,
    read_prompt_rows,
    read_shard,
    read_stamp,
    shard_path,
    trajectory_noise,
)
from diffkit.data.visits import stack_rows
from diffkit.errors import RunFailed, UserError
from diffkit.models.conditioner import Conditioning, Sizes
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.randomness import SampleKeys, uniform

__all__ = ["TrajectoryBatch", "TrajectoryData"]

_OPEN = 64
"""Shards that are kept open."""


@dataclass(frozen=True)
class TrajectoryBatch:
    """B pairs of a micro-batch; tensors are on the CPU unless moved by `to`.

    Attributes:
        keys: addresses for draws of the training; the index of a sample is that of its pair.
        noise: z (B, C, h, w) float32, standard normal; the sampler started from
            `Schedule.init_noise_sigma` times it.
        latents: x (B, C, h, w) float32, the teacher's end point, as the denoiser sees latents.
        captions: what each pair was made for; names of classes for a class-conditional model.
        conditioning: from the embedding cache, without `time_ids`; None without one.
        labels: (B,) int64 class numbers; None for a model of text.
        sizes: of the picture, not cropped.
        places: of the samples in the global batch, 0 ... batch size - 1.
        unrelated: (B, C, h, w) float32, the end point of another pair each, drawn by address.
    """

    keys: SampleKeys
    noise: Tensor
    latents: Tensor
    captions: list[str]
    conditioning: Conditioning | None
    labels: Tensor | None
    sizes: list[Sizes]
    places: tuple[int, ...]
    unrelated: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> TrajectoryBatch:
        """The batch with its tensors on `device`."""
        return replace(
            self,
            noise=self.noise.to(device, non_blocking=True),
            latents=self.latents.to(device, non_blocking=True),
            unrelated=self.unrelated.to(device, non_blocking=True),
            conditioning=None if self.conditioning is None else self.conditioning.to(device),
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class _Pair:
    index: int
    epoch: int
    place: int
    latents: Tensor
    unrelated: Tensor
    prompt: Prompt
    embedding: dict[str, Tensor] | None


class TrajectoryData:
    """The endless, addressed sequence of batches of a folder of pairs.

    Every batch is a pure function of the step, in the order of `BatchSampler`. Noise is drawn anew
    at its address, end points are read one by one from the shards.

    Arguments:
        folder: made by `diffkit trajectories`.
        batch_size: pairs of an optimizer step over all processes.
        seed: that of the run; the noise of the pairs does not depend on it.

    Attributes:
        header: what made the pairs.
        prompts: see `Header`.
        kept: index of the pair at each position; pairs that came out not finite are missing.
        embeddings: cache of the captions' conditioning, once `cache_embeddings` has filled it.

    Every shard is read once to begin with, against its checksum. Raises `UserError` for a folder
    that is not whole, not of one set of settings, or whose bits were changed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, batch_size: int, seed: int) -> None:
        self.folder, self.seed = Path(folder), seed
        self.header = read_header(self.folder)
        self.prompts = read_prompt_rows(self.folder, self.header)
        self._digest = hashlib.blake2b(self.header.digest().encode(), digest_size=16)
        self.kept: list[int] = []
        self._places: list[tuple[int, int]] = []
        looks = threaded(self._look, self.header.shards, "Checking shards")
        for number, (checksum, indices) in enumerate(looks):
            self._digest.update(checksum.encode())
            self._places += [(number, row) for row in range(len(indices))]
            self.kept += indices
        if not self.kept:
            raise UserError(f"{self.folder}: not one of its pairs is finite.")
        self.sampler = BatchSampler([0] * len(self.kept), batch_size, seed)
        self.embeddings: EmbeddingCache | None = None
        self._open = lru_cache(maxsize=_OPEN)(self._opened)

    def _look(self, number: int) -> tuple[str, list[int]]:
        """The checksum and the indices of a shard that is as it was written."""
        path, rows = shard_path(self.folder, number), self.header.rows(number)
        stamp = read_stamp(path)
        if stamp is None or stamp.stop < rows.stop:
            raise self._unusable(path, "is not there, or not whole")
        if stamp.header != self.header.digest():
            raise self._unusable(path, "was made with other settings than the header says")
        shard = read_shard(path)
        if shard is None:
            raise self._unusable(path, "its bits were changed since it was written")
        return stamp.checksum, shard.indices.tolist()

    def _unusable(self, path: Path, what: str) -> UserError:
        again = "Run the command again that made the pairs: it makes what is missing or damaged."
        return UserError(f"{path}: {what}. {again}")

    def check(self, model: LatentDiffusion) -> None:
        """Raise `UserError` unless the latents are those of this model's codec and denoiser."""
        shape, space = self.header.shape, latent_space(model)
        if space != self.header.space or shape != model.latent_shape(*self.header.size):
            raise UserError(
                f"{self.folder}: its latents, {shape} of {self.header.space}, are not of this "
                f"model's kind, {model.latent_shape(*self.header.size)} of {space}. Make the pairs "
                "with this model as the teacher, or train one that shares the teacher's "
                "autoencoder."
            )
        teacher, student = (
            "texts" if of_text else "classes"
            for of_text in (self.prompts[0].label is None, model.conditioner.classes is None)
        )
        if teacher != student:
            raise UserError(
                f"{self.folder}: its teacher was told {teacher}, and this model is told {student}; "
                "take one of the teacher's kind."
            )

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which every pair is seen once, on average."""
        return self.sampler.steps_per_epoch

    def fingerprint(self) -> str:
        """Hash of the settings and of the bits of all pairs."""
        return self._digest.hexdigest()

    def captions(self, position: int) -> tuple[str, ...]:
        """The prompt of the pair at `position` of `kept`."""
        return (self._prompt(self.kept[position]).text,)

    def batches(
        self,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        workers: int = 4,
        ahead: int = 2,
    ) -> Iterator[TrajectoryBatch]:
        """The micro-batches of every step in [first_step, last_step), in order.

        Of these process `rank` of `world` gets its share; `workers` threads read pairs, up to
        `ahead` micro-batches before they are asked for. Raises `UserError` when the batch size
        cannot be shared evenly, and `RunFailed` for a shard that is gone.
        """
        plans = (
            list(enumerate(self.sampler.batch(step)))[
                share(self.sampler.batch_size, rank, world, micro, accumulation)
            ]
            for step in range(first_step, last_step)
            for micro in range(accumulation)
        )

        def start(pairs: list[tuple[int, tuple[int, int]]], pool: Executor) -> list[Future[_Pair]]:
            return [pool.submit(self._load, *pair, place) for place, pair in pairs]

        return prefetch(plans, start, self._join, workers=workers, ahead=ahead)

    def pairs(self, positions: Sequence[int], epoch: int = 0) -> TrajectoryBatch:
        """The pairs at these positions of `kept`."""
        places = enumerate(positions)
        return self._join([self._load(position, epoch, place) for place, position in places])

    def _prompt(self, index: int) -> Prompt:
        return self.prompts[index % len(self.prompts)]

    def _opened(self, number: int) -> Any:
        return safe_open(shard_path(self.folder, number), framework="pt")

    def _load(self, position: int, epoch: int, place: int) -> _Pair:
        index, embedding = self.kept[position], None
        prompt, count = self._prompt(index), len(self)
        draw = uniform((), self.seed, epoch, index, "unrelated").item()
        other = (position + 1 + int(draw * (count - 1))) % count
        if self.embeddings is not None:
            embedding = self.embeddings.require(prompt.text)
        latents, unrelated = self._latents(position), self._latents(other)
        return _Pair(index, epoch, place, latents, unrelated, prompt, embedding)

    def _latents(self, position: int) -> Tensor:
        number, row = self._places[position]
        try:
            found: Tensor = self._open(number).get_slice("latents")[row : row + 1][0]
        except (OSError, SafetensorError) as error:
            raise RunFailed(
                f"{shard_path(self.folder, number)}: cannot be read ({error}). Bring it back and "
                "run the same command again: it goes on from the last checkpoint."
            ) from error
        return found.float()

    def _join(self, pairs: Sequence[_Pair]) -> TrajectoryBatch:
        indices = tuple(pair.index for pair in pairs)
        labels = [pair.prompt.label for pair in pairs if pair.prompt.label is not None]
        rows = [pair.embedding for pair in pairs if pair.embedding is not None]
        size = self.header.size
        return TrajectoryBatch(
            keys=SampleKeys(self.seed, tuple(pair.epoch for pair in pairs), indices),
            noise=trajectory_noise(self.header, indices),
            latents=torch.stack([pair.latents for pair in pairs]),
            captions=[pair.prompt.text for pair in pairs],
            conditioning=stack_rows(rows) if rows else None,
            labels=torch.tensor(labels) if labels else None,
            sizes=[Sizes(size, (0, 0), size)] * len(pairs),
            places=tuple(pair.place for pair in pairs),
            unrelated=torch.stack([pair.unrelated for pair in pairs]),
        )
