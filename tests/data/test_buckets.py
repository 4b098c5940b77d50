"""Aspect buckets: one area, model-sized sides, the smallest cut."""

from __future__ import annotations

import pytest

from diffkit.data.buckets import assign_buckets, plan_buckets
from diffkit.errors import UserError


@pytest.mark.parametrize(("resolution", "multiple"), [(64, 8), (512, 64), (1024, 64), (512, 8)])
@pytest.mark.parametrize("max_aspect", [1.0, 1.5, 2.0, 4.0])
def test_buckets_keep_area_multiple_and_aspect(resolution, multiple, max_aspect):
    buckets = plan_buckets(resolution, multiple, max_aspect)
    assert (resolution, resolution) in buckets
    assert len(set(buckets)) == len(buckets)
    for height, width in buckets:
        assert height % multiple == width % multiple == 0
        assert max(height, width) <= max_aspect * min(height, width)
        # no multiple for the long side comes nearer to the area
        assert abs(height * width - resolution**2) <= multiple * min(height, width) / 2
        assert (width, height) in buckets
    assert [w / h for h, w in buckets] == sorted((w / h for h, w in buckets), reverse=True)


def test_known_buckets():
    assert plan_buckets(512, 64) == [
        (384, 704), (448, 576), (512, 512), (576, 448), (704, 384)
    ]  # fmt: skip
    assert plan_buckets(64, 8, 1.0) == [(64, 64)]


def test_pictures_go_to_the_bucket_that_keeps_most_of_them():
    buckets = plan_buckets(512, 64, 3.0)
    sizes = [(100, 100), (1000, 1500), (3000, 2000), (50, 500), (701, 384), (1, 1)]

    def kept(size, bucket):
        a, b = size[1] / size[0], bucket[1] / bucket[0]
        return min(a, b) / max(a, b)

    for size, number in zip(sizes, assign_buckets(sizes, buckets), strict=True):
        assert kept(size, buckets[number]) == max(kept(size, bucket) for bucket in buckets)


@pytest.mark.parametrize("arguments", [(500, 64), (0, 8), (512, 64, 0.5)])
def test_impossible_numbers_are_refused(arguments):
    with pytest.raises(UserError):
        plan_buckets(*arguments)


def test_refusal_names_the_near_sizes():
    with pytest.raises(UserError, match="near ones are 448 and 512"):
        plan_buckets(500, 64)
