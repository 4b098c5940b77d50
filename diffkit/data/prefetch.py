"""Work ahead of the consumer, in order, by threads that cannot wait for one another in a circle."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

from diffkit.errors import UserError

__all__ = ["prefetch"]

Plan = TypeVar("Plan")
Part = TypeVar("Part")
Whole = TypeVar("Whole")


def prefetch(
    plans: Iterable[Plan],
    start: Callable[[Plan, Executor], Sequence[Future[Part]]],
    join: Callable[[Sequence[Part]], Whole],
    *,
    workers: int,
    ahead: int,
) -> Iterator[Whole]:
    """`join` of the parts that `start` asks for, for every plan, in the order of the plans.

    Up to `ahead` + 1 results are under way. One thread starts, `workers` threads make parts, one
    joins; each waits only for those before it, so an error cannot block them. It is raised in the
    place of the result that it belongs to. Closing the iterator drops what was not begun and ends
    the threads. Raises `UserError` for fewer than one worker or a negative `ahead`.
    """
    if workers < 1 or ahead < 0:
        raise UserError(f"{workers} loader threads, {ahead} batches ahead: needs at least 1 and 0.")

    def joined(parts: Future[Sequence[Future[Part]]]) -> Whole:
        return join([part.result() for part in parts.result()])

    starter, makers, joiner = (ThreadPoolExecutor(n) for n in (1, workers, 1))
    queue: deque[Future[Whole]] = deque()
    try:
        for plan in plans:
            queue.append(joiner.submit(joined, starter.submit(start, plan, makers)))
            if len(queue) > ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        for pool in (starter, makers, joiner):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (starter, makers, joiner):
            pool.shutdown(wait=True)
