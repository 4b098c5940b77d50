"""Streams of shards: the stated order, its exact resume, and its stated limits."""

from __future__ import annotations

from collections import Counter

import datasets
import pytest
import torch

from diffkit.data.hub import load_table
from diffkit.data.stream import StreamedData
from diffkit.errors import RunFailed, UserError
from tests.data.pictures import encoded, noise

SHARDS, ROWS = 4, 6


def write_shards(folder, cells=None):
    folder.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        numbers = range(shard * ROWS, (shard + 1) * ROWS)
        rows = {
            "image": [(cells or {}).get(n, encoded(noise(40, 48, n))) for n in numbers],
            "text": [[f"{n} a", f"{n} b"] for n in numbers],
            "label": [n % 3 for n in numbers],
            "score": [n / 2 for n in numbers],
        }
        made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
        made.to_parquet(folder / f"{shard}.parquet")
    return folder


@pytest.fixture(autouse=True, scope="module")
def no_bars():
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def stream(folder, **options):
    defaults = {"resolution": 32, "batch_size": 4, "seed": 0, "multiple": 8, "buffer": 5}
    table = load_table(folder, "train", streaming=True)
    return StreamedData(
        table, str(folder), **{**defaults, "crop": "random", "flip": True, **options}
    )


def same(a, b):
    assert torch.equal(a.images, b.images) and a.keys == b.keys and a.captions == b.captions


def pairs(batches):
    return [pair for b in batches for pair in zip(b.keys.indices, b.keys.epochs, strict=True)]


def test_batches_hold_what_the_rows_say(folder):
    for batch in stream(folder).batches(0, 10):
        assert batch.images.shape == (4, 3, 32, 32)
        for row, extras in enumerate(batch.extras):
            number = int(extras["score"] * 2)
            assert batch.captions[row].startswith(f"{number} ")
            assert batch.labels[row] == number % 3
            assert batch.sizes[row].original == (40, 48)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_row_of_every_epoch_comes_once(folder, world):
    """Over all processes; with 3 processes and 4 shards the rows are dealt out instead."""
    steps = 40
    found = Counter(
        pair
        for rank in range(world)
        for pair in pairs(stream(folder, batch_size=world).batches(0, steps, rank, world))
    )
    assert max(found.values()) == 1
    complete = (steps - 5 - 1) * world // (SHARDS * ROWS) - 1
    for epoch in range(complete):
        assert len({index for index, e in found if e == epoch}) == SHARDS * ROWS


def test_resume_by_skipping_equals_the_uninterrupted_stream(folder):
    whole = list(stream(folder).batches(0, 20))
    for first in (1, 6, 7, 13):
        for a, b in zip(stream(folder).batches(first, 20), whole[first:], strict=True):
            same(a, b)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_does_not_change_the_sequence(folder, accumulation):
    whole = pairs(stream(folder).batches(0, 12))
    assert pairs(stream(folder).batches(0, 12, accumulation=accumulation)) == whole


def test_order_is_shuffled_within_and_between_shards(folder):
    orders = {seed: pairs(stream(folder, seed=seed).batches(0, 6)) for seed in (0, 1)}
    assert orders[0] != orders[1]
    shards = [index >> 32 for index, _ in orders[0]]
    assert shards != sorted(shards)
    rows = [index & 0xFFFFFFFF for index, _ in orders[0]]
    assert rows != sorted(rows)


def test_draws_of_a_row_do_not_depend_on_the_processes(folder):
    def crops(world):
        found = {}
        for rank in range(world):
            for batch in stream(folder, batch_size=world).batches(0, 30, rank, world):
                keys = zip(batch.keys.indices, batch.keys.epochs, strict=True)
                found |= dict(zip(keys, zip(batch.sizes, batch.captions, strict=True), strict=True))
        return found

    one, four = crops(1), crops(4)
    common = one.keys() & four.keys()
    assert len(common) > 20 and all(one[key] == four[key] for key in common)


def test_a_set_smaller_than_the_buffer_is_shuffled_as_a_whole(folder):
    batches = list(stream(folder, buffer=1000).batches(0, 12))
    assert {epoch for _, epoch in pairs(batches)} <= {0, 1, 2}
    assert len({index for index, _ in pairs(batches[:6])}) > 12


def test_bad_rows_are_left_out(tmp_path, capsys):
    write_shards(tmp_path, {2: b"garbage", 9: None})
    seen = {extras["score"] for b in stream(tmp_path).batches(0, 20) for extras in b.extras}
    assert seen == {n / 2 for n in range(SHARDS * ROWS) if n not in (2, 9)}
    text = capsys.readouterr().err
    assert "shard 0, row 2: left out" in text and text.count("left out") == 2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_broken_picture_gives_way_to_the_row_that_took_its_place(accumulation, tmp_path, capsys):
    """A stream could not get past one truncated picture, since nobody can remove it from the hub.

    Nothing else moves, the choice does not depend on where a run began, and the row is named once.
    """
    write_shards(tmp_path)
    good = pairs(stream(tmp_path).batches(0, 20))
    whole = encoded(noise(40, 48))
    write_shards(tmp_path, {13: whole[:-500], 4: whole[:-500]})
    broken = {2 << 32 | 1, 0 << 32 | 4}
    capsys.readouterr()
    found = pairs(stream(tmp_path).batches(0, 20, accumulation=accumulation))
    assert capsys.readouterr().err.count("shard 2, row 1: cannot be decoded") == 1
    assert sum(index in broken for index, _ in good) > 4
    for ours, theirs in zip(found, good, strict=True):
        assert (ours == theirs) != (theirs[0] in broken)
    assert pairs(stream(tmp_path).batches(7, 20)) == found[28:]
    write_shards(tmp_path, dict.fromkeys(range(SHARDS * ROWS), whole[:-500]))
    with pytest.raises(RunFailed, match="none of 6 pictures in the buffer can be decoded"):
        list(stream(tmp_path).batches(0, 1))


def test_a_stream_without_pictures_ends(tmp_path):
    write_shards(tmp_path, dict.fromkeys(range(SHARDS * ROWS), b"garbage"))
    with pytest.raises(UserError, match="holds no readable picture"):
        next(stream(tmp_path).batches(0, 1))


def test_what_is_refused(folder):
    with pytest.raises(UserError, match="shuffle buffer is 0"):
        stream(folder, buffer=0)
    with pytest.raises(UserError, match="must be a multiple of 3"):
        next(stream(folder).batches(0, 1, world=3))
    with pytest.raises(UserError, match='no column "title"'):
        stream(folder, caption_column="title")
    with pytest.raises(UserError, match="not a multiple of 8"):
        stream(folder, resolution=33)


def test_fingerprint_tells_other_streams(folder):
    assert stream(folder).fingerprint() == stream(folder, seed=4).fingerprint()
    assert stream(folder).fingerprint() != stream(folder, buffer=6).fingerprint()
