"""Prefetching: order, errors in their place, no deadlock, no leaked threads."""

from __future__ import annotations

import threading
import time

import pytest

from diffkit.data.prefetch import prefetch
from diffkit.errors import UserError


def run(plans, part, *, workers=3, ahead=2, join=list):
    def start(plan, pool):
        return [pool.submit(part, plan, k) for k in range(5)]

    return prefetch(plans, start, join, workers=workers, ahead=ahead)


def slow(plan, k):
    time.sleep(0.002 * ((plan * 7 + k * 3) % 4))
    return plan, k


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("ahead", [0, 1, 5, 50])
def test_results_come_in_order(workers, ahead):
    results = list(run(range(12), slow, workers=workers, ahead=ahead))
    assert results == [[(plan, k) for k in range(5)] for plan in range(12)]


@pytest.mark.parametrize("where", ["part", "join", "plan"])
def test_an_error_is_raised_in_its_place(where):
    def part(plan, k):
        if where == "part" and (plan, k) == (4, 2):
            raise KeyError("broken")
        return slow(plan, k)

    def join(parts):
        if where == "join" and parts[0][0] == 4:
            raise KeyError("broken")
        return parts[0][0]

    def plans():
        for plan in range(12):
            if where == "plan" and plan == 4:
                raise KeyError("broken")
            yield plan

    before = threading.active_count()
    iterator = run(plans(), part, join=join, ahead=0)
    assert [next(iterator) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="broken"):
        next(iterator)
    assert threading.active_count() == before


def test_every_part_failing_cannot_block():
    def part(plan, k):
        raise OSError(f"{plan}")

    for _ in range(20):
        with pytest.raises(OSError, match="0"):
            next(run(range(100), part, ahead=20))


def test_closing_early_ends_the_threads_and_drops_what_was_not_begun():
    begun = []

    def part(plan, k):
        begun.append(plan)
        time.sleep(0.01)

    before = threading.active_count()
    iterator = run(range(1000), part, ahead=30)
    next(iterator)
    start = time.perf_counter()
    iterator.close()
    assert time.perf_counter() - start < 1.0
    assert threading.active_count() == before
    assert max(begun) < 31


def test_it_works_ahead_of_the_consumer():
    """Five parts of 10 ms on 5 threads, consumer 20 ms: the consumer hardly waits."""
    iterator = run(range(20), lambda plan, k: time.sleep(0.01), workers=5, ahead=2)
    next(iterator)
    waited = 0.0
    for _ in range(15):
        time.sleep(0.02)
        start = time.perf_counter()
        next(iterator)
        waited += time.perf_counter() - start
    assert waited < 0.15  # 0.15 = 15 * 10 ms without working ahead


@pytest.mark.parametrize(("workers", "ahead"), [(0, 2), (2, -1)])
def test_impossible_numbers_are_refused(workers, ahead):
    with pytest.raises(UserError):
        next(run(range(2), slow, workers=workers, ahead=ahead))
