"""Batches as pure functions of the step: what every set with random access has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Generic, TypeVar

from torch import Tensor

from diffkit.data.buckets import assign_buckets, plan_buckets
from diffkit.data.cache import EmbeddingCache, LatentCache
from diffkit.data.images import BadImage
from diffkit.data.prefetch import prefetch
from diffkit.data.records import ImageSource, Sample, Size
from diffkit.data.sampler import BatchSampler, share
from diffkit.data.transforms import Crop, Transform, View
from diffkit.data.visits import BrokenPictures, Loaded, read_pixels
from diffkit.errors import RunFailed

__all__ = ["AddressedData"]

Source = TypeVar("Source")
Part = TypeVar("Part")
Whole = TypeVar("Whole")


class AddressedData(ABC, Generic[Source, Part, Whole]):
    """The endless, addressed sequence of batches of a set with random access.

    Every batch is a pure function of the step: it does not depend on earlier calls, on threads, or
    on how many processes share it. The order is that of `BatchSampler`; crops, flips and the
    choice among several captions are drawn at (seed, epoch, sample).

    A picture whose header is whole and whose pixels are not is named, and stays in the set, so that
    the order of the others and the fingerprint do not depend on when it is found: each visit of its
    sample goes to the next readable one of its bucket, as that one looks in the same epoch.

    Arguments:
        source: the samples; those without a readable header are named and left out.
        resolution: side of the square in pixels; with buckets, the root of their area.
        batch_size: samples an optimizer step over all processes.
        seed: that of the run.
        multiple: image sides are multiples of it (pixels); the model's need.
        max_aspect: the most elongated bucket, 1 for squares only.
        crop: where a picture is cut to its bucket, "center" or "random".
        flip: mirror half of the visits left to right.

    Raises `UserError` when no sample is readable or the numbers are impossible.
    """

    noun = "picture"
    """What messages call a sample."""

    def __init__(
        self,
        source: Source,
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
        self.bucket_of = assign_buckets(self._scan(), self.buckets)
        self.sampler = BatchSampler(self.bucket_of, batch_size, seed)
        self.latents: LatentCache | None = None
        self.embeddings: EmbeddingCache | None = None
        self.broken = BrokenPictures(self.noun)

    # What a set knows of its samples. A position is 0 ... len - 1, a sample's place among those
    # that are used; the index of a picture is its place in `pictures`.

    @property
    @abstractmethod
    def pictures(self) -> ImageSource:
        """All pictures of the samples."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of all that decides the sequence of batches."""

    @abstractmethod
    def cuts(self, position: int) -> list[tuple[int, Size, Size]]:
        """The index of each picture of a sample, its size, and that to which it is cut."""

    @abstractmethod
    def captions(self, position: int) -> tuple[str, ...]:
        """The captions among which a sample's is drawn; ("",) for one without any."""

    @abstractmethod
    def _scan(self) -> Sequence[Size]:
        """Find the samples that can be used; returns the size that decides the bucket of each."""

    @abstractmethod
    def _load(self, position: int, epoch: int) -> Part:
        """One visit of a sample; raises `BadImage` where `load` takes another one for it."""

    @abstractmethod
    def _join(self, parts: Sequence[Part]) -> Whole:
        """The batch of these samples."""

    def __len__(self) -> int:
        return self.sampler.samples

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in which every sample is seen once, on average."""
        return self.sampler.steps_per_epoch

    def target(self, position: int) -> Size:
        """(height, width) to which the pictures of a sample are cut."""
        return self.buckets[self.bucket_of[position]]

    def batch(
        self, step: int, rank: int = 0, world: int = 1, micro: int = 0, accumulation: int = 1
    ) -> Whole:
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
    ) -> Iterator[Whole]:
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

        def start(pairs: list[tuple[int, int]], pool: Executor) -> list[Future[Part]]:
            return [pool.submit(self.load, *pair) for pair in pairs]

        return prefetch(plans, start, self._join, workers=workers, ahead=ahead)

    def load(self, position: int, epoch: int) -> Part:
        """The sample at `position` as it is seen in `epoch`.

        The next readable one of its bucket if a picture of it is broken.
        """
        for offset in range(len(self)):
            other = (position + offset) % len(self)
            if self.bucket_of[other] == self.bucket_of[position]:
                try:
                    return self._load(other, epoch)
                except BadImage:  # named where it was met
                    continue
        raise RunFailed(
            f"No {self.noun} of the size {self.target(position)} (height, width) can be decoded; "
            "`diffkit data check` says what is wrong with each."
        )

    def _visit(
        self, sample: Sample, picture: int, size: Size, target: Size, epoch: int, caption: str
    ) -> Loaded:
        """One visit of one picture, cut from its `size` to `target` by the draws of `sample`.

        Raises `BadImage` for a broken one, which is named.
        """
        view = self.transform.view(size, target, self.seed, epoch, sample.index)
        embedding = None if self.embeddings is None else self.embeddings.require(caption)
        pixels, moments = None, None
        try:
            if self.latents is None:
                pixels = read_pixels(self.pictures.encoded(picture), sample, view)
            else:
                moments = self._moments(self.latents, sample, picture, view)
        except BadImage as error:
            self.broken.add(sample, error)
            raise
        return Loaded(sample, epoch, view, caption, pixels, moments, embedding)

    def _moments(self, cache: LatentCache, sample: Sample, picture: int, view: View) -> Tensor:
        entry = cache.read(cache.key(self.pictures.identity(picture), view))
        if entry is None:
            read_pixels(self.pictures.encoded(picture), sample, view)  # a broken one has none
            raise RunFailed(cache.lost(f"latents of {sample.name}"))
        return entry["moments"]
