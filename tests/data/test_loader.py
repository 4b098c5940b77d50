"""Training batches: pure functions of the step, whatever threads, processes or interruptions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffkit.data.folder import ImageFolder
from diffkit.data.loader import TrainingData
from diffkit.data.transforms import to_float
from diffkit.errors import RunFailed, UserError
from tests.data.pictures import noise, picture_folder

SIZES = ((48, 48), (40, 80), (90, 50))


def training_data(folder, **options):
    defaults = {"resolution": 32, "batch_size": 4, "seed": 0, "multiple": 8, "crop": "random"}
    return TrainingData(ImageFolder(folder), **{**defaults, "flip": True, **options})


def same(a, b):
    assert a.keys == b.keys and a.captions == b.captions and a.names == b.names
    assert a.sizes == b.sizes and a.extras == b.extras
    for name in ("images", "moments", "labels"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None and right is None) or torch.equal(left, right)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("pictures"), 14, SIZES, captions=3)


@pytest.mark.parametrize("max_aspect", [1.0, 2.0])
def test_iterator_equals_random_access_and_a_resumed_iterator(folder, max_aspect):
    options = {"max_aspect": max_aspect}
    expected = [training_data(folder, **options).batch(step) for step in range(15)]
    data = training_data(folder, **options)
    for workers, ahead in ((1, 0), (4, 3)):
        for a, b in zip(data.batches(0, 15, workers=workers, ahead=ahead), expected, strict=True):
            same(a, b)
    for first in (1, 6, 13):  # stopped inside epochs 0, 1 and 3
        for a, b in zip(
            training_data(folder, **options).batches(first, 15), expected[first:], strict=True
        ):
            same(a, b)


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_shares_make_up_the_global_batch(folder, world, accumulation):
    data = training_data(folder, max_aspect=2.0)
    for step in range(8):
        whole = data.batch(step)
        parts = [
            data.batch(step, rank, world, micro, accumulation)
            for rank in range(world)
            for micro in range(accumulation)
        ]
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert [text for part in parts for text in part.captions] == whole.captions
        assert [i for part in parts for i in part.keys.indices] == list(whole.keys.indices)
    streams = [list(data.batches(0, 3, rank, world, accumulation)) for rank in range(world)]
    for step in range(3):
        rows = [b for s in streams for b in s[step * accumulation : (step + 1) * accumulation]]
        assert torch.equal(torch.cat([b.images for b in rows]), data.batch(step).images)


def test_what_a_batch_holds(folder):
    data = training_data(folder, max_aspect=2.0)
    seen = set()
    for step in range(12):
        batch = data.batch(step)
        height, width = batch.images.shape[2:]
        seen.add((height, width))
        assert len(batch) == 4 and batch.images.shape[:2] == (4, 3)
        assert batch.images.dtype == torch.float32 and batch.images.abs().max() <= 1
        assert batch.moments is None and batch.conditioning is None and batch.labels is None
        for index, name, caption, size in zip(
            batch.keys.indices, batch.names, batch.captions, batch.sizes, strict=True
        ):
            assert name == f"{index:03}.png" and caption.startswith(f"picture {index} text ")
            assert size.original == SIZES[index % 3] and size.target == (height, width)
    assert seen == {(32, 32), (24, 40), (40, 24)}


def test_pixels_are_those_of_the_picture(tmp_path):
    """A picture of the target size passes unchanged, or mirrored."""
    folder = picture_folder(tmp_path, 4, ((32, 32),))
    data = training_data(folder)
    for step in range(3):
        batch = data.batch(step)
        for row, index in zip(batch.images, batch.keys.indices, strict=True):
            pixels = np.asarray(noise(32, 32, index)).astype(np.float32) / 127.5 - 1
            image = row.permute(1, 2, 0).numpy()
            assert min(np.abs(image - pixels).max(), np.abs(image - pixels[:, ::-1]).max()) < 1e-6


def test_captions_are_drawn_fairly_and_by_address(folder):
    data = training_data(folder)
    texts = [caption for step in range(150) for caption in data.batch(step).captions]
    shares = [np.mean([text.endswith(str(k)) for text in texts]) for k in range(3)]
    assert np.abs(np.array(shares) - 1 / 3).max() < 0.06


def test_class_labels(tmp_path):
    for name, count in (("cat", 3), ("dog", 5)):
        (tmp_path / name).mkdir()
        for number in range(count):
            noise(32, 32, number).save(tmp_path / name / f"{number}.png")
    data = training_data(tmp_path)
    for step in range(4):
        batch = data.batch(step)
        assert batch.labels.dtype == torch.int64 and batch.captions == [""] * 4
        assert [name.split("/")[0] for name in batch.names] == [
            data.source.class_names[label] for label in batch.labels
        ]


def test_bad_headers_are_left_out_and_the_rest_trains(folder, tmp_path, capsys):
    picture_folder(tmp_path, 6)
    (tmp_path / "003.png").write_bytes(b"garbage")
    data = training_data(tmp_path)
    assert "003.png" in capsys.readouterr().err
    seen = {name for step in range(10) for name in data.batch(step).names}
    assert seen == {f"{n:03}.png" for n in (0, 1, 2, 4, 5)}


def break_off(folder, *numbers):
    """Cut pictures so that their headers stay whole and their pixels do not."""
    for number in numbers:
        path = folder / f"{number:03}.png"
        path.write_bytes(path.read_bytes()[:-300])


def test_a_picture_that_breaks_later_gives_way_to_its_neighbour(tmp_path, capsys):
    """One truncated file among thousands ended a run, with the advice to remove it; but without it
    the fingerprint was another, and the run could not go on. Now the next picture of its bucket
    stands in, everything else stays what it was, and the file is named once.
    """
    picture_folder(tmp_path, 12, SIZES)
    good = training_data(tmp_path, max_aspect=2.0)
    expected = [good.batch(step) for step in range(12)]
    break_off(tmp_path, 4, 7)  # two of one bucket, the next of which is 10
    data = training_data(tmp_path, max_aspect=2.0)
    assert data.fingerprint() == good.fingerprint()
    for a, b in zip(data.batches(0, 12), expected, strict=True):
        for row, name in enumerate(b.names):
            if name in ("004.png", "007.png"):
                assert a.names[row] == "010.png" and a.keys.epochs[row] == b.keys.epochs[row]
                stand_in = good.load(10, b.keys.epochs[row])
                assert torch.equal(a.images[row], to_float([stand_in.pixels])[0])
            else:
                assert a.names[row] == name and torch.equal(a.images[row], b.images[row])
    for step, batch in enumerate(training_data(tmp_path, max_aspect=2.0).batches(5, 12), start=5):
        same(batch, data.batch(step))
    said = capsys.readouterr().err.splitlines()
    assert sum("004.png: cannot be decoded" in line for line in said) == 2  # by either data set
    break_off(tmp_path, 1, 10)
    with pytest.raises(RunFailed, match="No picture of the size"):
        list(training_data(tmp_path, max_aspect=2.0).batches(0, 12))


def test_a_picture_that_is_removed_while_training_is_named(tmp_path):
    """It is not broken but gone, and may come back: a disk that is away must not change a run."""
    data = training_data(picture_folder(tmp_path, 4))
    (tmp_path / "002.png").unlink()
    with pytest.raises(RunFailed, match=r"002.png: .*does not exist"):
        list(data.batches(0, 1))


def test_uneven_share_is_refused(folder):
    with pytest.raises(UserError, match="multiple of 3"):
        next(training_data(folder).batches(0, 1, world=3))


def test_fingerprint_tells_other_sets(folder, tmp_path):
    same_set = training_data(folder).fingerprint()
    assert training_data(folder, seed=3).fingerprint() == same_set
    picture_folder(tmp_path, 14, SIZES, captions=3)
    assert training_data(tmp_path).fingerprint() == same_set
    (tmp_path / "004.png").write_bytes(b"")
    assert training_data(tmp_path).fingerprint() != same_set


def test_moving_a_batch_keeps_what_it_says(folder):
    batch = training_data(folder).batch(0)
    same(batch.to("cpu"), batch)
    assert replace(batch, images=None).to("cpu").images is None
