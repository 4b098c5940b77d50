"""Running out of memory: what is tried next, in which order, and when it is said to be hopeless."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from diffkit.errors import RunFailed
from diffkit.protection.memory import Effort, free_memory, is_out_of_memory, with_fallback


def too_much() -> torch.Tensor:
    """More numbers than any machine holds; the allocator's own error."""
    return torch.empty(1 << 60, dtype=torch.uint8)


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as refused:
        too_much()
    assert is_out_of_memory(refused.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("sizes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_spares_memory_first_then_takes_fewer(capsys: pytest.CaptureFixture[str]) -> None:
    """Room for two at once in two passes: 4 plain, 4 lean, 2 lean, and all that follow like it."""
    calls: list[tuple[list[int], bool]] = []

    def call(batch: Sequence[int], lean: bool) -> list[int]:
        calls.append((list(batch), lean))
        if len(batch) > 2 or not lean:
            too_much()
        return [10 * item for item in batch]

    effort = Effort(batch_size=4)
    assert with_fallback(range(5), effort, call, "five") == [0, 10, 20, 30, 40]
    assert calls == [
        ([0, 1, 2, 3], False),
        ([0, 1, 2, 3], True),
        ([0, 1], True),
        ([2, 3], True),
        ([4], True),
    ]
    assert effort == Effort(batch_size=2, lean=True)
    said = capsys.readouterr().err
    assert "going on in two passes" in said and "going on 2 at once" in said


def test_gives_up_on_one_picture_that_does_not_fit() -> None:
    def call(batch: Sequence[int], lean: bool) -> list[int]:
        too_much()
        return []

    with pytest.raises(RunFailed, match=r"big\.png: out of memory, even one picture"):
        with_fallback([1, 2], Effort(2), call, "big.png")


def test_other_errors_are_not_retried() -> None:
    calls = []

    def call(batch: Sequence[int], lean: bool) -> list[int]:
        calls.append(lean)
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes"):
        with_fallback([1], Effort(), call, "x")
    assert calls == [False]


def test_the_free_memory_of_this_machine() -> None:
    """Between 1 MB and 100 TB where the system tells it at all."""
    free = free_memory("cpu")
    assert free is None or 1e6 < free < 1e14
