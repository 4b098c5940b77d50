"""One micro-batch of preference pairs."""

from dataclasses import replace

import pytest
import torch

from diffkit.data.batch import Batch
from diffkit.data.preferences import PreferenceBatch
from diffkit.models.conditioner import Sizes
from diffkit.randomness import SampleKeys


def half(value, captions=("a cat", "a dog")):
    sizes = [Sizes((8, 8), (0, 0), (8, 8))] * 2
    return Batch(
        keys=SampleKeys(7, (0, 1), (4, 2)),
        images=torch.full((2, 3, 8, 8), value),
        moments=None,
        captions=list(captions),
        conditioning=None,
        labels=None,
        sizes=sizes,
        names=[f"{value}-0", f"{value}-1"],
        extras=[{}, {}],
    )


def test_a_batch_of_pairs_has_one_address_a_pair():
    batch = PreferenceBatch(half(0.5), half(-0.5))
    assert len(batch) == 2
    assert batch.keys == SampleKeys(7, (0, 1), (4, 2))
    moved = batch.to("meta")
    assert moved.winners.images.device.type == moved.losers.images.device.type == "meta"
    assert moved.keys == batch.keys


def test_halves_of_other_pairs_are_refused():
    other = replace(half(0.0), keys=SampleKeys(7, (0, 1), (4, 3)))
    with pytest.raises(ValueError, match="other keys"):
        PreferenceBatch(half(0.5), other)
    with pytest.raises(ValueError, match="other captions"):
        PreferenceBatch(half(0.5), half(-0.5, captions=("a cat", "a cow")))
