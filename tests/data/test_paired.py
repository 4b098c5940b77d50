"""Two sets side by side, and captions in place of the pictures' own."""

from __future__ import annotations

import pytest

from diffkit.data.folder import ImageFolder
from diffkit.data.loader import TrainingData
from diffkit.data.paired import PairedData
from diffkit.data.recaption import Recaptioned
from tests.data.pictures import noise


@pytest.fixture
def folder(tmp_path):
    for number in range(5):
        noise(16, 16, number).save(tmp_path / f"{number}.png")
    return tmp_path


def loaded(folder, captions, seed, batch_size=4):
    source = Recaptioned(ImageFolder(folder), captions)
    return TrainingData(source, resolution=16, batch_size=batch_size, seed=seed, multiple=8)


def test_processes_share_both_sets_alike(folder):
    data = PairedData(loaded(folder, ("a",), 1), loaded(folder, ("b",), 2))
    (whole,) = data.batches(3, 4)
    parts = [next(iter(data.batches(3, 4, rank=rank, world=2))) for rank in range(2)]
    for name in ("own", "companions"):
        names = [part for batch in parts for part in getattr(batch, name).names]
        assert names == getattr(whole, name).names
    assert whole.own.captions == ["a"] * 4 and whole.companions.captions == ["b"] * 4
    assert whole.keys is whole.own.keys and len(whole) == 4 and len(data) == 5
    own, other = (batch.keys.normal((3,), "noise") for batch in (whole.own, whole.companions))
    assert not own.isclose(other).any()


def test_two_sets_need_two_seeds(folder):
    with pytest.raises(ValueError, match="share their noises"):
        PairedData(loaded(folder, ("a",), 1), loaded(folder, ("b",), 1))


def test_the_fingerprint_knows_both_sets(folder, tmp_path_factory):
    first = PairedData(loaded(folder, ("a",), 1), loaded(folder, ("b",), 2)).fingerprint()
    other = tmp_path_factory.mktemp("other")
    noise(16, 16, 9).save(other / "9.png")
    for own, companions in ((folder, other), (other, folder)):
        data = PairedData(loaded(own, ("a",), 1), loaded(companions, ("b",), 2))
        assert data.fingerprint() != first


def test_one_of_several_captions_is_drawn_at_each_visit(folder):
    data = loaded(folder, ("a", "b", "c"), 1, batch_size=5)
    drawn = [caption for batch in data.batches(0, 8) for caption in batch.captions]
    assert set(drawn) == {"a", "b", "c"}
    again = [caption for batch in data.batches(0, 8, workers=1) for caption in batch.captions]
    assert drawn == again
