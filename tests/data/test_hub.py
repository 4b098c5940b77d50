"""Tables through `datasets`: parquet, arrow and webdataset shards made on the spot, offline."""

from __future__ import annotations

import io
import json
import tarfile

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from diffkit.data.folder import ImageFolder
from diffkit.data.hub import HubDataset, load_table, open_source
from diffkit.data.loader import TrainingData
from diffkit.data.scan import require_captions
from diffkit.errors import UserError
from tests.data.pictures import encoded, noise, picture_folder

COUNT = 10


def table(count=COUNT, first=0):
    rows = {
        "image": [
            {"bytes": encoded(noise(40, 48, n)), "path": None} for n in range(first, first + count)
        ],
        "text": [f"caption {n}" for n in range(first, first + count)],
        "label": [n % 2 for n in range(first, first + count)],
        "score": [n / 2 for n in range(first, first + count)],
    }
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])}
    made = datasets.Dataset.from_dict(rows)
    for name, kind in kinds.items():
        made = made.cast_column(name, kind)
    return made


def write_parquet(folder):
    for shard in range(2):
        table(COUNT // 2, shard * COUNT // 2).to_parquet(
            folder / f"train-{shard:05}-of-00002.parquet"
        )


def write_tar(folder):
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for n in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                files = {
                    "png": encoded(noise(40, 48, n)),
                    "txt": f"caption {n}".encode(),
                    "cls": str(n % 2).encode(),
                    "json": json.dumps({"score": n / 2}).encode(),
                }
                for ending, data in files.items():
                    entry = tarfile.TarInfo(f"{n:04}.{ending}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def write_arrow(folder):
    table().save_to_disk(folder, num_shards=2)


def write_splits(folder):
    parts = datasets.DatasetDict({"train": table(), "test": table(4)})
    parts.save_to_disk(folder)


WRITERS = {"parquet": write_parquet, "tar": write_tar, "arrow": write_arrow, "splits": write_splits}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    datasets.disable_progress_bars()


@pytest.mark.parametrize("kind", WRITERS)
def test_local_shards_train_like_a_folder(tmp_path, kind):
    folder = tmp_path / "set"
    folder.mkdir()
    WRITERS[kind](folder)
    source = open_source(folder)
    assert isinstance(source, HubDataset) and len(source) == COUNT
    require_captions(source)
    assert [source[n].captions for n in (0, 9)] == [("caption 0",), ("caption 9",)]
    assert len(source.class_names) == 2 and source[3].label == 1
    pictures = picture_folder(tmp_path / "pictures", COUNT, ((40, 48),))
    options = {"resolution": 32, "batch_size": 4, "seed": 0, "multiple": 8, "flip": True}
    ours, theirs = (TrainingData(s, **options) for s in (source, ImageFolder(pictures)))
    for a, b in zip(ours.batches(0, 5), theirs.batches(0, 5), strict=True):
        assert torch.equal(a.images, b.images) and a.keys == b.keys
        assert a.captions == [f"caption {n}" for n in a.keys.indices]
        assert a.labels.tolist() == [n % 2 for n in a.keys.indices]


def test_other_columns_become_extras(tmp_path):
    write_parquet(tmp_path)
    assert open_source(tmp_path)[5].extras == {"score": 2.5}


def test_splits_of_a_saved_set(tmp_path):
    write_splits(tmp_path)
    assert len(open_source(tmp_path, split="test")) == 4


@pytest.mark.parametrize("value", ["bytes", "struct"])
def test_parquet_without_hub_metadata(tmp_path, value):
    data = [encoded(noise(40, 48, n)) for n in range(3)]
    cells = data if value == "bytes" else [{"bytes": cell, "path": "x.png"} for cell in data]
    made = pyarrow.table({"image": cells, "caption": ["a", "b", "c"]})
    pyarrow.parquet.write_table(made, tmp_path / "x.parquet")
    source = open_source(tmp_path)
    assert source.encoded(1) == data[1] and source[1].captions == ("b",)


def test_identity_is_the_content(tmp_path):
    write_parquet(tmp_path)
    source = open_source(tmp_path)
    assert len({source.identity(n) for n in range(COUNT)}) == COUNT
    assert source.identity(0) == HubDataset(table(), "again").identity(0)


def test_bad_rows_are_left_out(tmp_path, capsys):
    cells = [{"bytes": encoded(noise(40, 48, n)), "path": None} for n in range(4)]
    cells[1] = {"bytes": b"garbage", "path": None}
    cells[2] = None
    made = pyarrow.table({"image": cells, "text": ["a"] * 4})
    pyarrow.parquet.write_table(made, tmp_path / "x.parquet")
    data = TrainingData(open_source(tmp_path), resolution=32, batch_size=2, seed=0, multiple=8)
    assert data.kept == [0, 3]
    text = capsys.readouterr().err
    assert "row 1: not a picture" in text and "row 2: it is empty" in text


def test_a_folder_of_pictures_stays_one(tmp_path):
    picture_folder(tmp_path, 2)
    (tmp_path / "backup.tar").write_bytes(b"")
    assert isinstance(open_source(tmp_path), ImageFolder)
    with pytest.raises(UserError, match="no image column"):
        open_source(tmp_path, image_column="image")


def test_wrong_columns_are_refused(tmp_path):
    write_parquet(tmp_path)
    names = "image, text, label, score"
    for option in ("image_column", "caption_column", "label_column"):
        with pytest.raises(UserError, match=f'no column "nothing". Its columns: {names}'):
            open_source(tmp_path, **{option: "nothing"})
    with pytest.raises(UserError, match='labels are class numbers, and "text" holds'):
        open_source(tmp_path, label_column="text")
    with pytest.raises(UserError, match="must be a text or a list of texts, not 0.5"):
        open_source(tmp_path, caption_column="score")


def test_several_image_columns_must_be_named(tmp_path):
    made = table().add_column("second", [None] * COUNT).cast_column("second", datasets.Image())
    made = made.rename_column("image", "first")
    with pytest.raises(UserError, match="2 columns hold images; name the one to use"):
        HubDataset(made, "set")
    assert len(HubDataset(made, "set", image_column="first")) == COUNT


def test_missing_and_broken_sets_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder.*hub:OWNER/NAME"):
        open_source(tmp_path / "nothing")
    (tmp_path / "x.parquet").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be loaded as a data set .*[Pp]arquet"):
        open_source(tmp_path)
    write_tar(tmp_path)
    with pytest.raises(UserError, match="hub:nobody/nothing: cannot be loaded"):
        open_source("hub:nobody/nothing")  # the tests run offline


def test_unknown_split_is_refused(tmp_path):
    write_parquet(tmp_path)
    with pytest.raises(UserError, match='split "tset"'):
        open_source(tmp_path, split="tset")


def test_unreachable_splits_of_a_saved_set(tmp_path):
    write_splits(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_table(tmp_path, "validation", streaming=False)
