r"""Which samples make up the batch of a step: a pure function, with no state to save.

The samples of bucket k (n_k of them, all of one image size) form one endless stream: epoch after
epoch, each a permutation drawn at the address (seed, epoch, k, "shuffle"). With B samples a batch,
epoch e owns the batches floor(e n_k / B) ... floor((e + 1) n_k / B) - 1 of that stream, so batches
run across epoch borders and no sample is dropped or repeated. The batches that the buckets give to
one epoch are taken in an order drawn at (seed, epoch, "batches"); a single bucket keeps its stream
as it is. Within a bucket the visits of two samples therefore never differ by more than one, and
after e epochs every bucket stands within one batch of e visits a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.randomness import permutation

__all__ = ["BatchSampler", "share"]


class BatchSampler:
    """The endless sequence of global batches of an image set, addressed by step.

    Arguments: `bucket_of[i]` is the bucket of sample i; `batch_size` is the number of samples an
    optimizer step takes over all processes; `seed` is that of the run.

    `batch(step)` costs O(buckets * log(step) + batch_size) and, once an epoch, a permutation of the
    samples. Threads may share one sampler. Raises `UserError` without samples or with a batch size
    below one.
    """

    def __init__(self, bucket_of: Sequence[int], batch_size: int, seed: int) -> None:
        if not bucket_of:
            raise UserError("There is nothing to sample from: the data set is empty.")
        if batch_size < 1:
            raise UserError(f"The batch size is {batch_size}; it must be at least 1.")
        self.batch_size = batch_size
        self.seed = seed
        self.samples = len(bucket_of)
        members: dict[int, list[int]] = {}
        for index, bucket in enumerate(bucket_of):
            members.setdefault(bucket, []).append(index)
        self._buckets = sorted(members)
        self._members = [torch.tensor(members[bucket]) for bucket in self._buckets]
        # Neighbouring epochs are in use at once around a border, by the prefetching threads too.
        self._permutation = lru_cache(maxsize=3 * (len(self._buckets) + 1))(self._draw)

    @property
    def steps_per_epoch(self) -> float:
        """Steps after which every sample was seen once, on average."""
        return self.samples / self.batch_size

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (index, epoch) pairs of a step, 0-based; all of one bucket."""
        slot, number = self._locate(step)
        members = self._members[slot]
        count = len(members)
        position, stop = number * self.batch_size, (number + 1) * self.batch_size
        pairs: list[tuple[int, int]] = []
        while position < stop:
            epoch, first = divmod(position, count)
            last = min(count, first + stop - position)
            order = self._permutation(count, epoch, self._buckets[slot])[first:last]
            pairs += [(index, epoch) for index in members[order].tolist()]
            position += last - first
        return pairs

    def epoch(self, step: int) -> int:
        """The epoch that owns the batch of this step."""
        # S(e) = sum_k floor(e n_k / B) <= e N / B, and lags behind it by less than one a bucket.
        low = step * self.batch_size // self.samples
        high = (step + len(self._members) + 1) * self.batch_size // self.samples + 1
        while low < high:
            middle = (low + high + 1) // 2
            if self._batches_before(middle) <= step:
                low = middle
            else:
                high = middle - 1
        return low

    def _batches_before(self, epoch: int) -> int:
        return sum(epoch * len(members) // self.batch_size for members in self._members)

    def _locate(self, step: int) -> tuple[int, int]:
        """The (slot of the bucket, number of the batch in its stream) of a step."""
        if len(self._members) == 1:
            return 0, step
        epoch = self.epoch(step)
        first = [epoch * len(members) // self.batch_size for members in self._members]
        after = [(epoch + 1) * len(members) // self.batch_size for members in self._members]
        offset = step - sum(first)
        place = int(self._permutation(sum(after) - sum(first), epoch, None)[offset])
        for slot, (start, stop) in enumerate(zip(first, after, strict=True)):
            if place < stop - start:
                return slot, start + place
            place -= stop - start
        raise AssertionError(f"step {step} lies outside epoch {epoch}")

    def _draw(self, count: int, epoch: int, bucket: int | None) -> Tensor:
        if bucket is None:
            return permutation(count, self.seed, epoch, "batches")
        return permutation(count, self.seed, epoch, bucket, "shuffle")


def share(batch_size: int, rank: int, world: int, micro: int, accumulation: int) -> slice:
    """The rows of a global batch that process `rank` of `world` takes in its micro-batch `micro`.

    The concatenation over ranks, then micro-batches, is the global batch. Raises `UserError` when
    the batch cannot be divided evenly.
    """
    parts = world * accumulation
    if batch_size % parts:
        raise UserError(
            f"A batch of {batch_size} samples cannot be shared evenly by {world} process(es) with "
            f"{accumulation} accumulation step(s) each: --batch-size must be a multiple of {parts}."
        )
    rows = batch_size // parts
    start = (rank * accumulation + micro) * rows
    return slice(start, start + rows)
