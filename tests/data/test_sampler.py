"""The order of samples: a pure function of the step, fair, and independent of the processes."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from diffkit.data.sampler import BatchSampler, share
from diffkit.errors import UserError

MIXED = [0] * 14 + [1] * 5 + [2] * 1 + [3] * 37
LAYOUTS = {
    "one": [7] * 14,
    "divisible": [0] * 8 + [1] * 12,
    "mixed": MIXED,
    "interleaved": [index % 3 for index in range(50)],
    "tiny": [0],
}


@pytest.mark.parametrize("bucket_of", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("batch_size", [1, 2, 4, 6, 64])
def test_samples_of_a_bucket_are_seen_equally_often(bucket_of, batch_size):
    """At every moment the visits within a bucket differ by at most one."""
    sampler = BatchSampler(bucket_of, batch_size, seed=3)
    visits = Counter(dict.fromkeys(range(len(bucket_of)), 0))
    for step in range(int(5 * len(bucket_of) / batch_size) + 40):
        batch = sampler.batch(step)
        assert len(batch) == batch_size
        assert len({bucket_of[index] for index, _ in batch}) == 1
        visits.update(index for index, _ in batch)
        for bucket in set(bucket_of):
            counts = [visits[i] for i, b in enumerate(bucket_of) if b == bucket]
            # the batches of an epoch come in a drawn order; a batch of epoch e may run into e + 1
            assert max(counts) - min(counts) <= 1 + (len(set(bucket_of)) > 1)


@pytest.mark.parametrize("bucket_of", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("batch_size", [1, 2, 4, 6, 64])
def test_every_epoch_of_every_sample_comes_exactly_once(bucket_of, batch_size):
    """Over an endless run the pairs (index, epoch) are a bijection: nothing dropped or doubled."""
    sampler = BatchSampler(bucket_of, batch_size, seed=0)
    steps = int(4 * len(bucket_of) / batch_size) + 60
    pairs = [pair for step in range(steps) for pair in sampler.batch(step)]
    assert len(set(pairs)) == len(pairs)
    complete = sampler.epoch(steps) - -(-batch_size // min(Counter(bucket_of).values()))
    for epoch in range(max(0, complete)):
        assert {(index, epoch) for index in range(len(bucket_of))} <= set(pairs)


def test_buckets_stay_within_one_batch_of_one_another():
    """After e epochs bucket k has given floor(e n_k / B) batches."""
    sampler = BatchSampler(MIXED, 4, seed=1)
    sizes = Counter(MIXED)
    steps = [sum(epoch * n // 4 for n in sizes.values()) for epoch in range(8)]
    for epoch, last in enumerate(steps):
        given = Counter(MIXED[sampler.batch(step)[0][0]] for step in range(last))
        assert given == Counter({bucket: epoch * n // 4 for bucket, n in sizes.items()})


def test_a_single_bucket_is_a_plain_stream_across_epoch_borders():
    """14 samples in batches of 4: epochs are whole permutations laid end to end."""
    sampler = BatchSampler([0] * 14, 4, seed=5)
    stream = [pair for step in range(21) for pair in sampler.batch(step)]
    for epoch in range(6):
        part = stream[epoch * 14 : (epoch + 1) * 14]
        assert {e for _, e in part} == {epoch}
        assert sorted(index for index, _ in part) == list(range(14))
    orders = [tuple(i for i, _ in stream[e * 14 : (e + 1) * 14]) for e in range(6)]
    assert len(set(orders)) == 6


@pytest.mark.parametrize("bucket_of", LAYOUTS.values(), ids=LAYOUTS)
def test_random_access_equals_the_sequence(bucket_of):
    """A fresh sampler that is asked for one late step only gives what the sequence gives."""
    whole = BatchSampler(bucket_of, 3, seed=11)
    sequence = [whole.batch(step) for step in range(60)]
    for step in reversed(range(60)):
        assert BatchSampler(bucket_of, 3, seed=11).batch(step) == sequence[step]


def test_order_depends_on_the_seed():
    assert BatchSampler(MIXED, 4, 0).batch(0) != BatchSampler(MIXED, 4, 1).batch(0)


def test_known_order():
    """The order is part of the format of a resumable run: it must not change between versions."""
    assert BatchSampler([0] * 5, 3, seed=0).batch(0) == [(2, 0), (1, 0), (3, 0)]
    assert BatchSampler([0, 0, 1, 1, 1], 2, seed=0).batch(4) == [(3, 1), (4, 1)]


@pytest.mark.parametrize("bucket_of", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("world", "accumulation"), [(1, 1), (1, 4), (2, 2), (3, 1), (2, 6), (12, 1)]
)
def test_global_batch_does_not_depend_on_processes_and_accumulation(bucket_of, world, accumulation):
    sampler = BatchSampler(bucket_of, 12, seed=2)
    for step in (0, 5, 17):
        batch = sampler.batch(step)
        shared = [
            batch[share(12, rank, world, micro, accumulation)]
            for rank in range(world)
            for micro in range(accumulation)
        ]
        assert [pair for part in shared for pair in part] == batch


def test_uneven_share_is_refused():
    with pytest.raises(UserError, match="must be a multiple of 8"):
        share(12, 0, 2, 0, 4)


@pytest.mark.parametrize(("bucket_of", "size"), [([], 4), ([0], 0)])
def test_impossible_numbers_are_refused(bucket_of, size):
    with pytest.raises(UserError):
        BatchSampler(bucket_of, size, 0)


def test_late_steps_cost_what_early_ones_cost():
    """Step 10^9 of a million samples in 20 buckets: only its epoch is permuted."""
    sampler = BatchSampler([index % 20 for index in range(1_000_000)], 256, seed=0)
    sampler.batch(0)
    start = time.perf_counter()
    assert len(sampler.batch(10**9)) == 256
    assert time.perf_counter() - start < 1.0
    start = time.perf_counter()
    for step in range(10**9, 10**9 + 200):
        sampler.batch(step)
    assert (time.perf_counter() - start) / 200 < 0.05
