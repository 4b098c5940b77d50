"""Noise-image pairs of a teacher's sampler on disk: one header, the prompts, and shards of pairs.

FOLDER/trajectories.json      what made the pairs, see `Header`
FOLDER/prompts.jsonl          one prompt a line; pair i has the prompt i modulo their number
FOLDER/pairs-00000.safetensors, pairs-00001.safetensors, ...

A shard k holds the end points of the pairs k n ... (k + 1) n - 1, n being `Header.shard`: `latents`
(m, C, h, w) float16 as the denoiser sees them, and `indices` (m,) int64, increasing; m is smaller
than n where pairs came out with numbers that are not finite. The noise of pair i is a function of
(seed, i), see `trajectory_noise`, and is not stored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffkit.data.cache import checksum
from diffkit.errors import UserError
from diffkit.files import atomic_write, read_json, write_json
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.randomness import normal

__all__ = [
    "HEADER",
    "PROMPTS",
    "Header",
    "Prompt",
    "Shard",
    "Stamp",
    "is_trajectory_folder",
    "latent_space",
    "prompts_digest",
    "read_header",
    "read_prompt_rows",
    "read_shard",
    "read_stamp",
    "shard_path",
    "trajectory_noise",
    "write_header",
    "write_prompt_rows",
    "write_shard",
]

HEADER, PROMPTS = "trajectories.json", "prompts.jsonl"
_FORMAT = 1


@dataclass(frozen=True)
class Prompt:
    """What a pair was made for: a text, or the name and number of a class."""

    text: str
    label: int | None = None


@dataclass(frozen=True)
class Header:
    """Everything that decides the pairs, and how many there are to be.

    Attributes:
        model: where the teacher was, for people; not compared.
        weights: digest of its networks and of its scheduler's config.
        scheduler: class of the scheduler and its config, spacing and prediction type included.
        times: the steps + 1 times that were visited, in the model's units; the first is the time
            at which the noise is the sampler's start.
        steps, guidance: of the sampler, which is deterministic: DDIM with eta 0, or Euler.
        seed: with the index of a pair the address of its noise.
        dtype: arithmetic of the teacher: fp32, bf16 or fp16.
        size: (height, width) of the pictures in pixels.
        shape: (C, h, w) of the latents.
        space: what the numbers of the latents mean, see `latent_space`.
        shard: pairs a shard.
        prompts: digest of the prompts.
        count: pairs in all; not compared, since a folder may grow.
    """

    model: str
    weights: str
    scheduler: dict[str, Any]
    times: tuple[float, ...]
    steps: int
    guidance: float
    seed: int
    dtype: str
    size: tuple[int, int]
    shape: tuple[int, int, int]
    space: dict[str, Any]
    shard: int
    prompts: str
    count: int

    def digest(self) -> str:
        """Changes with everything that decides a pair."""
        values = dataclasses.asdict(self)
        del values["model"], values["count"]
        return hashlib.blake2b(_canonical(values).encode(), digest_size=16).hexdigest()

    def differing(self, other: Header) -> list[str]:
        """`name (value there, value now)` of everything but `model` and `count` that differs.

        Of the scheduler's config only what differs, and of the times only the first one, where
        nothing else tells why.
        """
        told: list[tuple[str, Any, Any]] = []
        for name in (field.name for field in dataclasses.fields(self)):
            mine, its = getattr(self, name), getattr(other, name)
            if name in ("model", "count", "times") or mine == its:
                continue
            if name == "scheduler":
                keys = [key for key in {**mine, **its} if mine.get(key) != its.get(key)]
                told += [(f"scheduler {key}", mine.get(key), its.get(key)) for key in keys]
            else:
                told.append((name, mine, its))
        if not told and self.times != other.times:
            pairs = zip(self.times, other.times, strict=True)
            told = [(f"time {k}", a, b) for k, (a, b) in enumerate(pairs) if a != b][:1]
        return [f"{name} ({a!r} there, {b!r} now)" for name, a, b in told]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard)

    def rows(self, number: int) -> range:
        """Indices of the pairs that belong into shard `number`."""
        return range(number * self.shard, min((number + 1) * self.shard, self.count))


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def trajectory_noise(header: Header, indices: Sequence[int]) -> Tensor:
    """z (B, C, h, w) of these pairs: standard normal, float32, drawn on the CPU by address."""
    return torch.stack([normal(header.shape, header.seed, i, "trajectory") for i in indices])


def latent_space(model: LatentDiffusion) -> dict[str, Any]:
    """Class of the codec and the numbers that turn what it encodes into latents, as JSON data."""
    config = getattr(model.codec.vae, "config", {})
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    found = {name: config.get(name) for name in names}
    space = {"codec": type(model.codec).__name__}
    space |= {name: value for name, value in found.items() if value is not None}
    plain: dict[str, Any] = json.loads(json.dumps(space))
    return plain


def is_trajectory_folder(folder: str | os.PathLike[str]) -> bool:
    """Whether pairs lie there, or are being made."""
    return (Path(folder) / HEADER).is_file()


def write_header(folder: Path, header: Header) -> None:
    """Write the header atomically."""
    write_json(folder / HEADER, {"format": _FORMAT, **dataclasses.asdict(header)})


def read_header(folder: str | os.PathLike[str]) -> Header:
    """The header of a folder of pairs.

    Raises `UserError` when there is none, or one of another kind or version.
    """
    root = Path(folder)
    if not is_trajectory_folder(root):
        what = "no such folder" if not root.exists() else f"has no {HEADER}"
        raise UserError(f"{root}: {what}; give a folder made by `diffkit trajectories`.")
    values = read_json(root / HEADER)
    names = {field.name for field in dataclasses.fields(Header)}
    if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
        raise UserError(f"{root / HEADER}: is no header of this version of diffkit.")
    if set(values) != names:
        odd = ", ".join(sorted(set(values) ^ names))
        raise UserError(f"{root / HEADER}: has not the keys of a header ({odd}).")
    for name in ("times", "size", "shape"):
        values[name] = tuple(values[name])
    return Header(**values)


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Hash of all prompts and labels in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(_canonical(dataclasses.astuple(prompt)).encode() + b"\n")
    return digest.hexdigest()


def write_prompt_rows(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Write the prompts atomically."""
    with atomic_write(folder / PROMPTS, "w") as file:
        file.writelines(_canonical(dataclasses.asdict(prompt)) + "\n" for prompt in prompts)


def read_prompt_rows(folder: Path, header: Header) -> list[Prompt]:
    """The prompts; `UserError` when they are missing or are not those of the header."""
    path = folder / PROMPTS
    again = "Run the command again that made the pairs: it brings them back."
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        prompts = [Prompt(**json.loads(line)) for line in lines if line]
    except FileNotFoundError as error:
        raise UserError(f"{path}: the prompts of the pairs are not there. {again}") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). {again}") from error
    if prompts_digest(prompts) != header.prompts:
        raise UserError(f"{path}: these are not the prompts that the pairs were made for. {again}")
    return prompts


@dataclass(frozen=True)
class Stamp:
    """What a shard says of itself beside its pairs.

    Attributes:
        header: digest of the header that it was made with.
        stop: the pair after its last one.
        pairs: number of pairs, without those that were not finite.
        batch_size: pairs that were sampled at once, counted from the shard's first one.
        device: on which they were made: cpu, or the name of a GPU.
        checksum: of its tensors.
    """

    header: str
    stop: int
    pairs: int
    batch_size: int
    device: str
    checksum: str


@dataclass(frozen=True)
class Shard:
    """The pairs of a shard: `latents` (m, C, h, w) float16, `indices` (m,) int64."""

    latents: Tensor
    indices: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """By name, as they are stored."""
        return {"latents": self.latents.contiguous(), "indices": self.indices.contiguous()}


def shard_path(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"pairs-{number:05d}.safetensors"


def write_shard(path: Path, shard: Shard, stamp: Stamp) -> None:
    """Write a shard atomically; the stamp's checksum is filled in here."""
    tensors = shard.tensors()
    stamp = dataclasses.replace(stamp, checksum=checksum(tensors))
    with atomic_write(path) as file:
        file.write(save(tensors, metadata={"diffkit": _canonical(dataclasses.asdict(stamp))}))


def read_stamp(path: Path) -> Stamp | None:
    """The stamp of a shard, of which only the head is read; None for a torn or foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            return Stamp(**json.loads((file.metadata() or {})["diffkit"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def read_shard(path: Path) -> Shard | None:
    """All pairs of a shard; None for a file that is torn, or whose bits were changed."""
    stamp = read_stamp(path)
    if stamp is None:
        return None
    try:
        with safe_open(path, framework="pt") as file:
            shard = Shard(file.get_tensor("latents"), file.get_tensor("indices"))
    except (OSError, SafetensorError):
        return None
    return shard if checksum(shard.tensors()) == stamp.checksum else None
