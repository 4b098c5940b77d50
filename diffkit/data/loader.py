"""Training data with random access: the micro-batch of a step, and an iterator that works ahead."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffkit.console import warn
from diffkit.data.batch import Batch
from diffkit.data.buckets import assign_buckets, plan_buckets
from diffkit.data.cache import EmbeddingCache, LatentCache
from diffkit.data.images import BadImage
from diffkit.data.prefetch import prefetch
from diffkit.data.records import Encoded, ImageSource, Sample, Size
from diffkit.data.sampler import BatchSampler, share
from diffkit.data.scan import scan
from diffkit.data.transforms import Crop, Transform, View, render, to_float
from diffkit.errors import RunFailed
from diffkit.models.conditioner import Conditioning, Sizes
from diffkit.randomness import SampleKeys, integers

__all__ = ["BrokenPictures", "Loaded", "TrainingData", "assemble", "draw_caption", "read_pixels"]


@dataclass(frozen=True)
class Loaded:
    """One sample of a batch: what is known of it, its view, and its pixels or its moments."""

    sample: Sample
    epoch: int
    view: View
    caption: str
    pixels: NDArray[np.uint8] | None
    moments: Tensor | None
    embedding: dict[str, Tensor] | None


class BrokenPictures:
    """Names every picture that cannot be decoded, once, whichever thread meets it."""

    def __init__(self) -> None:
        self._named: set[int] = set()
        self._lock = threading.Lock()

    def add(self, sample: Sample, error: BadImage) -> None:
        """A picture was found broken; the caller takes another one for it."""
        with self._lock:
            if sample.index in self._named:
                return
            self._named.add(sample.index)
        warn(
            f"{sample.name}: cannot be decoded ({error}); another picture takes its place. "
            "`diffkit data check` names every such file.",
            anywhere=True,
        )


class TrainingData:
    """The endless, addressed sequence of batches of an image set.

    Every batch is a pure function of the step: it does not depend on earlier calls, on threads, or
    on how many processes share it. The order is that of `BatchSampler`; crops, flips and the
    choice among several captions are drawn at (seed, epoch, sample).

    A picture whose header is whole and whose pixels are not is named, and stays in the set, so that
    the order of the others and the fingerprint do not depend on when it is found: each of its
    visits goes to the next readable picture of its bucket, as that one looks in the same epoch.

    Arguments:
        source: the pictures; those without a readable header are named and left out.
        resolution: side of the square in pixels; with buckets, the root of their area.
        batch_size: samples an optimizer step over all processes.
        seed: that of the run.
        multiple: image sides are multiples of it (pixels); the model's need.
        max_aspect: the most elongated bucket, 1 for squares only.
        crop: where a picture is cut to its bucket, "center" or "random".
        flip: mirror half of the visits left to right.

    Raises `UserError` when no picture is readable or the numbers are impossible.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        resolution: int,
        batch_size: int,
        seed: int,
        multiple: int,
        max_aspect: float = 1.0,
        crop: Crop = "center",
        flip: bool = False,
    ) -> None:
        self.source = source
        self.seed = seed
        self.transform = Transform(crop, flip)
        self.buckets = plan_buckets(resolution, multiple, max_aspect)
        found = scan(source)
        self.kept = found.kept
        self.sizes = found.sizes
        self.bucket_of = assign_buckets(self.sizes, self.buckets)
        self.sampler = BatchSampler(self.bucket_of, batch_size, seed)
        self.latents: LatentCache | None = None
        self.embeddings: EmbeddingCache | None = None
        self.broken = BrokenPictures()

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which every picture is seen once, on average."""
        return self.sampler.steps_per_epoch

    def fingerprint(self) -> str:
        """Hash of the names and sizes of all pictures: equal sets give equal batch sequences."""
        digest = hashlib.blake2b(digest_size=16)
        for position, size in zip(self.kept, self.sizes, strict=True):
            digest.update(f"{self.source[position].name}\t{size}\n".encode())
        return digest.hexdigest()

    def target(self, position: int) -> Size:
        """(height, width) to which the picture at `position` of `kept` is cut."""
        return self.buckets[self.bucket_of[position]]

    def batch(
        self, step: int, rank: int = 0, world: int = 1, micro: int = 0, accumulation: int = 1
    ) -> Batch:
        """The micro-batch `micro` of `accumulation` that process `rank` of `world` takes in `step`.

        All numbers count from 0. Raises `UserError` when the batch size cannot be shared evenly,
        and `RunFailed` for a picture that is gone and for a bucket without a readable one.
        """
        pairs = self.sampler.batch(step)
        rows = share(self.sampler.batch_size, rank, world, micro, accumulation)
        return self._join([self.load(*pair) for pair in pairs[rows]])

    def batches(
        self,
        first_step: int,
        last_step: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        workers: int = 4,
        ahead: int = 2,
    ) -> Iterator[Batch]:
        """`batch` for every step in [first_step, last_step), the micro-batches of each in order.

        `workers` threads prepare samples, up to `ahead` micro-batches before they are asked for;
        see `prefetch` for errors and the end of the threads.
        """
        plans = (
            self.sampler.batch(step)[
                share(self.sampler.batch_size, rank, world, micro, accumulation)
            ]
            for step in range(first_step, last_step)
            for micro in range(accumulation)
        )

        def start(pairs: list[tuple[int, int]], pool: Executor) -> list[Future[Loaded]]:
            return [pool.submit(self.load, *pair) for pair in pairs]

        return prefetch(plans, start, self._join, workers=workers, ahead=ahead)

    def load(self, position: int, epoch: int) -> Loaded:
        """One sample: the picture at `position` of `kept` as it is seen in `epoch`.

        The next readable one of its bucket if it is broken.
        """
        count = len(self.kept)
        for offset in range(count):
            other = (position + offset) % count
            if self.bucket_of[other] == self.bucket_of[position]:
                try:
                    return self._load(other, epoch)
                except BadImage as error:
                    self.broken.add(self.source[self.kept[other]], error)
        raise RunFailed(
            f"No picture of the size {self.target(position)} (height, width) can be decoded; "
            "`diffkit data check` says what is wrong with each."
        )

    def _load(self, position: int, epoch: int) -> Loaded:
        sample = self.source[self.kept[position]]
        size = self.sizes[position]
        view = self.transform.view(size, self.target(position), self.seed, epoch, sample.index)
        caption = draw_caption(sample, self.seed, epoch)
        embedding = None if self.embeddings is None else self._embedding(self.embeddings, caption)
        if self.latents is None:
            pixels = read_pixels(self.source.encoded(sample.index), sample, view)
            return Loaded(sample, epoch, view, caption, pixels, None, embedding)
        moments = self._moments(self.latents, sample, view)
        return Loaded(sample, epoch, view, caption, None, moments, embedding)

    def _join(self, loaded: Sequence[Loaded]) -> Batch:
        return assemble(self.seed, loaded)

    def _moments(self, cache: LatentCache, sample: Sample, view: View) -> Tensor:
        entry = cache.read(cache.key(self.source.identity(sample.index), view))
        if entry is None:
            read_pixels(self.source.encoded(sample.index), sample, view)  # a broken one has none
            raise RunFailed(_lost(f"latents of {sample.name}", cache))
        return entry["moments"]

    def _embedding(self, cache: EmbeddingCache, caption: str) -> dict[str, Tensor]:
        entry = cache.read(cache.key(caption))
        if entry is None:
            raise RunFailed(_lost(f'embedding of "{caption}"', cache))
        return entry


def _lost(what: str, cache: LatentCache | EmbeddingCache) -> str:
    return (
        f"{cache.folder}: the cached {what} were damaged or removed, or the picture was changed, "
        "while the run went on. Run the same command again: it makes them anew and goes on from "
        "the last checkpoint."
    )


def draw_caption(sample: Sample, seed: int, epoch: int) -> str:
    """The caption of a sample in one epoch, drawn uniformly; "" for a sample without any."""
    if len(sample.captions) < 2:
        return sample.captions[0] if sample.captions else ""
    choice = integers(0, len(sample.captions), (), seed, epoch, sample.index, "caption")
    return sample.captions[int(choice)]


def read_pixels(encoded: Encoded, sample: Sample, view: View) -> NDArray[np.uint8]:
    """The pixels of a view, (H, W, 3).

    Raises `BadImage` for a picture that is broken, and `RunFailed` naming one that the disk does
    not give: it may come back, and must not be taken for broken until then.
    """
    try:
        return render(encoded, view)
    except BadImage as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise RunFailed(
            f"{sample.name}: cannot be read ({error}). Bring it back and run the same command "
            "again: it goes on from the last checkpoint."
        ) from error


def assemble(seed: int, loaded: Sequence[Loaded]) -> Batch:
    """Stack samples of one target size, all of them with labels or none, into a batch."""
    samples = [item.sample for item in loaded]
    pixels = [item.pixels for item in loaded if item.pixels is not None]
    moments = [item.moments for item in loaded if item.moments is not None]
    labels = [sample.label for sample in samples if sample.label is not None]
    rows = [item.embedding for item in loaded if item.embedding is not None]
    return Batch(
        keys=SampleKeys(
            seed, tuple(item.epoch for item in loaded), tuple(sample.index for sample in samples)
        ),
        images=to_float(pixels) if pixels else None,
        moments=torch.stack(moments) if moments else None,
        captions=[item.caption for item in loaded],
        conditioning=_stack_rows(rows) if rows else None,
        labels=torch.tensor(labels) if labels else None,
        sizes=[Sizes(item.view.original, item.view.corner, item.view.target) for item in loaded],
        names=[sample.name for sample in samples],
        extras=[sample.extras for sample in samples],
    )


def _stack_rows(rows: Sequence[dict[str, Tensor]]) -> Conditioning:
    return Conditioning.from_dict(
        {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    )
