"""The arithmetic, splits and captions of the picture recipe; nothing is downloaded."""

from __future__ import annotations

import captions
import common
import numpy as np
import pytest


def test_composite_of_opaque_clear_and_half() -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [100, 200, 0, 51]]], dtype=np.uint8)
    result = common.composite(rgba, (200, 100, 50))
    # 51 / 255 = 0.2, so 0.2 * (100, 200, 0) + 0.8 * (200, 100, 50)
    assert result.tolist() == [[[10, 20, 30], [200, 100, 50], [180, 120, 40]]]


def test_composite_keeps_leading_axes() -> None:
    assert common.composite(np.zeros((2, 3, 4, 5, 4), np.uint8), (1, 2, 3)).shape == (2, 3, 4, 5, 3)


def test_backgrounds_are_far_apart() -> None:
    colours = np.array(list(common.BACKGROUNDS.values()), dtype=float)
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert distances[~np.eye(len(colours), dtype=bool)].min() > 80


def test_stable_fraction_is_pinned() -> None:
    assert common.stable_fraction("red_apple") == pytest.approx(0.8909297172, abs=1e-9)


def test_concept_list_is_nested_and_unambiguous() -> None:
    words = captions.read_concepts()
    assert len(words) == captions.SIZES[-1] == 128
    names = [concept.replace("_", " ") for concept in words]
    others = [word for each in words.values() for word in each]
    assert len(set(names + others)) == len(names) + len(others)


@pytest.mark.parametrize("count", captions.SIZES)
def test_one_pair_in_sixteen_is_held_out_evenly_over_styles(count: int) -> None:
    chosen = list(captions.read_concepts())[:count]
    pairs = captions.heldout_pairs(chosen)
    assert len(pairs) == len({concept for concept, _ in pairs}) == count // 4
    styles = [style for _, style in pairs]
    assert {style: styles.count(style) for style in common.STYLES} == dict.fromkeys(
        common.STYLES, count // 16
    )


def test_large_set_holds_out_the_pairs_of_the_small_one() -> None:
    concepts = list(captions.read_concepts())
    small = captions.heldout_pairs(concepts[:64])
    large = captions.heldout_pairs(concepts)
    assert small < large
    assert {pair for pair in large if pair[0] in concepts[:64]} == small


def test_captions_begin_with_the_canonical_one() -> None:
    assert captions.captions("red apple", ["apple"], "noto", "blue") == [
        "red apple, noto style, blue background",
        "apple, noto style, blue background",
        "red apple, blue background, noto style",
    ]
