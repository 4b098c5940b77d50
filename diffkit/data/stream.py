"""Training data of unknown length, read once in order: shards too large for this machine's disk.

The order. An epoch visits the shards in an order drawn at (seed, epoch, "shards"). If their number
is divisible by the number of processes, every process reads its own ones (rank, rank + world, ...
of that order); otherwise every process reads all of them and keeps each world-th row. The rows pass
a buffer of `buffer` rows: the k-th row that a process hands out is taken from the place drawn at
(seed, rank, world, k, "buffer"), and the next row of the stream takes its place, across epoch
borders. A row keeps its own (epoch, shard, row) address for all further draws. A row whose picture
turns out to be broken is named, and gives way to the row that took its place in the buffer, or to
the first readable one of those behind it there.

What holds: for equal seed, shards, buffer and number of processes the sequence is equal, whatever
the accumulation, threads or interruptions. What does not hold, unlike `TrainingData`: the sequence
changes with the number of processes; samples mix only as far as the buffer reaches; a process whose
shards hold fewer rows begins its next epoch earlier, so its rows are seen more often. Resuming at
step s reads s * batch_size / world rows again, headers only, without decoding them. One image size
(no aspect buckets), and no caches, which need to know all samples beforehand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from diffkit.console import warn
from diffkit.data.batch import Batch
from diffkit.data.buckets import plan_buckets
from diffkit.data.columns import captions_of, encoded_of, find_columns, label_of
from diffkit.data.images import BadImage, read_header
from diffkit.data.prefetch import prefetch
from diffkit.data.records import Encoded, Sample, Size
from diffkit.data.sampler import share
from diffkit.data.transforms import Crop, Transform
from diffkit.data.visits import BrokenPictures, Loaded, assemble, draw_caption, read_pixels
from diffkit.errors import RunFailed, UserError
from diffkit.randomness import integers, permutation

__all__ = ["StreamedData"]

_ROWS = 1 << 32  # more rows than a shard can hold: the index of a row is shard * _ROWS + row


@dataclass(frozen=True)
class _Row:
    """A sample in the buffer, its epoch, and its encoded picture."""

    sample: Sample
    epoch: int
    encoded: Encoded
    size: Size


class StreamedData:
    """The endless batches of a `datasets.IterableDataset`; see the module for their order.

    Arguments:
        table: a `datasets.IterableDataset`, from `hub.load_table(..., streaming=True)`.
        place: what messages call it.
        resolution: side of the square images in pixels, a multiple of `multiple`.
        batch_size: samples an optimizer step over all processes.
        seed: that of the run.
        crop, flip: see `TrainingData`.
        buffer: rows, encoded, among which the next one is drawn.
        captions: every sample needs one: a stream without captions is refused, a row without one
            is named and left out.

    Rows whose picture has no readable header are named and left out. Raises `UserError`.
    """

    def __init__(
        self,
        table: Any,
        place: str,
        *,
        resolution: int,
        batch_size: int,
        seed: int,
        multiple: int,
        crop: Crop = "center",
        flip: bool = False,
        buffer: int = 1000,
        image_column: str | None = None,
        caption_column: str | None = None,
        label_column: str | None = None,
        captions: bool = False,
    ) -> None:
        import datasets

        if buffer < 1:
            raise UserError(f"The shuffle buffer is {buffer} rows; it must be at least 1.")
        if table.features is None:  # a remote table whose columns only its first rows tell
            table = table._resolve_features()
        self.columns = find_columns(
            table.features, place, image_column, caption_column, label_column
        )
        if captions and self.columns.caption is None:
            raise UserError(
                f"{place}: has no column of captions, and training on text needs one for each "
                "picture; name it with --caption-column."
            )
        self.captions = captions
        self.broken = BrokenPictures()
        self.table = table.cast_column(self.columns.image, datasets.Image(decode=False))
        self.place = place
        self.target = plan_buckets(resolution, multiple, 1.0)[0]
        self.batch_size = batch_size
        self.seed = seed
        self.transform = Transform(crop, flip)
        self.buffer = buffer

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, where the stream tells them."""
        return self.columns.class_names

    def fingerprint(self) -> str:
        """Hash of what is known of the stream: its name, its shards' number, its columns."""
        text = (
            f"{self.place}\t{self.table.num_shards}\t{sorted(self.table.features)}\t{self.buffer}"
        )
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

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
        """The micro-batches of every step in [first_step, last_step), as `TrainingData.batches`."""
        rows = share(self.batch_size, rank, world, 0, accumulation)
        size = rows.stop - rows.start
        stream = islice(self.rows(rank, world), first_step * accumulation * size, None)

        def start(_: int, pool: Executor) -> list[Future[Loaded]]:
            return [pool.submit(self._load, row) for row in islice(stream, size)]

        plans = range((last_step - first_step) * accumulation)
        return prefetch(
            plans, start, lambda parts: assemble(self.seed, parts), workers=workers, ahead=ahead
        )

    def rows(self, rank: int, world: int) -> Iterator[list[_Row]]:
        """The endless, shuffled rows of one process, each with those that may stand in for it."""
        held: list[_Row] = []
        given = 0
        for row in self._unshuffled(rank, world):
            if row.epoch == 0 and len(held) < self.buffer:  # a small set fills a part of it
                held.append(row)
                continue
            place = int(integers(0, len(held), (), self.seed, rank, world, given, "buffer"))
            held[place], chosen = row, held[place]
            given += 1
            yield [chosen, *held[place:], *held[:place]]

    def _unshuffled(self, rank: int, world: int) -> Iterator[_Row]:
        shards = int(self.table.num_shards)
        own = shards % world == 0
        for epoch in count():
            order = permutation(shards, self.seed, epoch, "shards").tolist()
            mine = order[rank::world] if own else order
            rows = (row for shard in mine for row in self._shard(shard, epoch))
            found = False
            for row in rows if own else islice(rows, rank, None, world):
                if row is not None:
                    found = True
                    yield row
            if not found:
                raise UserError(f"{self.place}: holds no readable picture for process {rank}.")

    def _shard(self, shard: int, epoch: int) -> Iterator[_Row | None]:
        """The rows of a shard; None for one without a readable picture."""
        columns = self.columns
        used = {columns.image, columns.caption, columns.label}
        for number, values in enumerate(self.table.shard(self.table.num_shards, shard)):
            name = f"{self.place}, shard {shard}, row {number}"
            captions = captions_of(values[columns.caption], name) if columns.caption else ()
            label = label_of(values[columns.label], name) if columns.label else None
            extras = {key: value for key, value in values.items() if key not in used}
            if columns.label and label is None:
                raise UserError(f'{name}: has no label in column "{columns.label}".')
            sample = Sample(shard * _ROWS + number, name, captions, label, extras)
            encoded = encoded_of(values[columns.image])
            try:
                if self.captions and not captions:
                    raise BadImage("no caption")
                yield _Row(sample, epoch, encoded, read_header(encoded))
            except BadImage as error:
                if epoch == 0:
                    warn(f"{name}: left out ({error})")
                yield None

    def _load(self, rows: list[_Row]) -> Loaded:
        for row in rows:
            sample = row.sample
            view = self.transform.view(row.size, self.target, self.seed, row.epoch, sample.index)
            try:
                pixels = read_pixels(row.encoded, sample, view)
            except BadImage as error:
                self.broken.add(sample, error)
                continue
            caption = draw_caption(sample, self.seed, row.epoch)
            return Loaded(sample, row.epoch, view, caption, pixels, None, None)
        raise RunFailed(f"{self.place}: none of {len(rows)} pictures in the buffer can be decoded.")
