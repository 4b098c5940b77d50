"""Filling the caches of a data set before training, each process its share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from diffkit.console import progress
from diffkit.data.addressed import AddressedData
from diffkit.data.cache import EmbeddingCache, LatentCache
from diffkit.data.images import BadImage
from diffkit.data.scan import threaded
from diffkit.data.transforms import View, to_float
from diffkit.data.visits import read_pixels
from diffkit.errors import UserError

if TYPE_CHECKING:
    from diffkit.models.codec import Codec
    from diffkit.models.conditioner import Conditioner

__all__ = ["Captioned", "cache_embeddings", "cache_latents"]

_THREADS = 8
_PIXELS = 8 * 512 * 512
"""Of one batch of pictures: its activations in a float32 VAE take about 5 GB."""


def cache_latents(
    data: AddressedData[Any, Any, Any],
    folder: str | os.PathLike[str],
    codec: Codec,
    *,
    rank: int = 0,
    world: int = 1,
    batch_size: int = 8,
) -> int:
    """Encode the missing entries of process `rank` of `world`; from then on `data` gives moments.

    All views of every picture are stored, so mirrored ones too. The processes must wait for one
    another before the first batch. Returns the number of pictures encoded here; what is there
    already is not encoded again. A picture that cannot be decoded gets no entry; `data` names it
    and takes another one for it. Raises `UserError` for random crops, of which there is no end.
    """
    if data.transform.crop == "random":
        raise UserError(
            'Latents cannot be cached with crop "random": every visit shows another crop. '
            'Use crop "center", or train without the latent cache.'
        )
    cache = LatentCache(os.path.join(folder, "latents"), codec.fingerprint())
    # A picture may belong to several samples, and lie in several places of the set.
    cuts = dict.fromkeys(cut for position in range(len(data)) for cut in data.cuts(position))
    mine = list(cuts)[rank::world]

    def missing(place: int) -> list[tuple[str, tuple[int, View]]]:
        index, size, target = mine[place]
        identity = data.pictures.identity(index)
        keyed = [(cache.key(identity, v), (index, v)) for v in data.transform.views(size, target)]
        return [item for item in keyed if not cache.has(item[0])]

    found = threaded(missing, len(mine), "Checking latents")
    wanted = {key: look for items in found for key, look in items}
    todo = [(*look, key) for key, look in wanted.items()]
    done = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for part in progress(_parts(todo, batch_size), "Encoding pictures"):
            pixels = list(pool.map(lambda item: _pixels(data, *item[:2]), part))
            keys = [item[2] for item, value in zip(part, pixels) if value is not None]
            if keys:
                images = to_float([value for value in pixels if value is not None])
                with torch.no_grad():
                    moments = codec.encode_moments(images.to(codec.device)).float().cpu()
                list(pool.map(lambda key, row: cache.write(key, {"moments": row}), keys, moments))
                done += len(keys)
    data.latents = cache
    return done


def _pixels(data: AddressedData[Any, Any, Any], index: int, view: View) -> NDArray[np.uint8] | None:
    sample = data.pictures[index]
    try:
        return read_pixels(data.pictures.encoded(index), sample, view)
    except BadImage as error:
        data.broken.add(sample, error)
        return None


def _parts(
    todo: Sequence[tuple[int, View, str]], size: int
) -> Iterator[Sequence[tuple[int, View, str]]]:
    """Runs of at most `size` items of one target size, fewer where the pictures are large."""
    ordered = sorted(todo, key=lambda item: item[1].target)
    start = 0
    while start < len(ordered):
        target = ordered[start][1].target
        end = start + min(size, _PIXELS // (target[0] * target[1]))
        stop = start + 1
        while stop < min(len(ordered), end) and ordered[stop][1].target == target:
            stop += 1
        yield ordered[start:stop]
        start = stop


class Captioned(Protocol):
    """Data whose captions can be cached."""

    embeddings: EmbeddingCache | None

    def __len__(self) -> int: ...

    def captions(self, position: int, /) -> tuple[str, ...]:
        """Those of one sample."""


def cache_embeddings(
    data: Captioned,
    folder: str | os.PathLike[str],
    conditioner: Conditioner,
    *,
    rank: int = 0,
    world: int = 1,
    batch_size: int = 16,
) -> int:
    """Encode the missing captions of process `rank` of `world`; from then on batches carry them.

    The processes must wait for one another before the first batch; the conditioner may then be
    freed. Returns the number of captions encoded here.
    """
    cache = EmbeddingCache(os.path.join(folder, "embeddings"), conditioner.fingerprint())
    captions = sorted({text for position in range(len(data)) for text in data.captions(position)})
    mine = captions[rank::world]
    present = threaded(lambda place: cache.has(cache.key(mine[place])), len(mine), "Checking texts")
    todo = [caption for caption, there in zip(mine, present, strict=True) if not there]
    starts = range(0, len(todo), batch_size)
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in progress(starts, "Encoding captions"):
            part = todo[start : start + batch_size]
            # The sizes belong to a visit, not to a caption: any will do here, none is kept.
            encoded = replace(conditioner.encode(part, sizes=(64, 64)), time_ids=None)
            columns = {name: value.cpu() for name, value in encoded.to_dict().items()}
            rows = [{name: value[i] for name, value in columns.items()} for i in range(len(part))]
            list(pool.map(lambda text, row: cache.write(cache.key(text), row), part, rows))
    data.embeddings = cache
    return len(todo)
