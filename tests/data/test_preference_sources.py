"""Pairs of folders, of shards with embedded pictures and of sets with Pick-a-Pic's columns."""

from __future__ import annotations

import csv

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from diffkit.data.columns import find_columns
from diffkit.data.folder import ImageFolder
from diffkit.data.preference_columns import left_out
from diffkit.data.preference_sources import PairFolder, PairTable, open_pairs
from diffkit.data.scan import require_captions
from diffkit.errors import UserError
from tests.data.pairs import pair_folder
from tests.data.pictures import encoded, noise, write_jsonl


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    datasets.disable_progress_bars()


def names(source):
    """(winner, loser, row, captions) of every pair."""
    pairs = [source[i] for i in range(len(source))]
    assert [(pair.winner, pair.loser) for pair in pairs] == list(source.members)
    return [
        (source.pictures[p.winner].name, source.pictures[p.loser].name, p.index, p.captions)
        for p in pairs
    ]


def test_labels_say_which_picture_won(tmp_path):
    source = open_pairs(pair_folder(tmp_path, 3))
    assert isinstance(source, PairFolder)
    assert names(source) == [
        ("000.png", "001.png", 0, ("prompt 0",)),
        ("003.png", "002.png", 1, ("prompt 1",)),
        ("004.png", "005.png", 2, ("prompt 2",)),
    ]
    assert source[1].extras == {"rater": 1} and source[1].name == "003.png over 002.png"


def test_a_picture_of_several_pairs_is_one_picture(tmp_path):
    """Ties and rows without a label are counted, and their pictures are not looked at."""
    for name in "abcd":
        noise(40, 40, ord(name)).save(tmp_path / f"{name}.png")
    rows = [
        *(["a.png", "b.png", "1", "a cat"], ["b.png", "c.png", "0.5", "a cat"]),
        *(["c.png", "a.png", "", "a cat"], ["b.png", "a.png", "0", "a dog"]),
    ]
    with open(tmp_path / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image_0", "image_1", "label_0", "text"], *rows])
    source = open_pairs(tmp_path)
    assert names(source) == [
        ("a.png", "b.png", 0, ("a cat",)),
        ("a.png", "b.png", 3, ("a dog",)),
    ]
    assert len(source.pictures) == 2
    assert (source.rows, source.ties, source.unlabelled) == (4, 1, 1)


def test_winner_and_loser(tmp_path):
    for name in "ab":
        noise(40, 40, ord(name)).save(tmp_path / f"{name}.png")
    rows = [{"winner": "b.png", "loser": "a.png", "text": ["x", "y"], "score": 3}]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    source = open_pairs(tmp_path)
    assert names(source) == [("b.png", "a.png", 0, ("x", "y"))]
    assert source[0].extras == {"score": 3}


def pick_a_pic(labels):
    """Rows of Pick-a-Pic, the pictures as JPEG bytes; labels are (label_0, has_label)."""
    values = [encoded(noise(40, 48, n), "JPEG") for n in range(2 * len(labels))]
    return {
        "caption": [f"prompt {n}" for n in range(len(labels))],
        "jpg_0": values[::2],
        "jpg_1": values[1::2],
        "label_0": [float(label) for label, _ in labels],
        "label_1": [1 - float(label) for label, _ in labels],
        "has_label": [known for _, known in labels],
        "user_id": [n % 2 for n in range(len(labels))],
    }


LABELS = [(1, True), (0.5, True), (0, True), (1, False), (0, True)]


@pytest.mark.parametrize("shards", [1, 2])
def test_pick_a_pic_in_parquet(tmp_path, shards):
    rows = pick_a_pic(LABELS)
    cut = len(LABELS) // shards + (shards > 1)
    for shard in range(shards):
        part = {key: values[shard * cut : (shard + 1) * cut] for key, values in rows.items()}
        pyarrow.parquet.write_table(pyarrow.table(part), tmp_path / f"train-{shard}.parquet")
    source = open_pairs(tmp_path)
    assert isinstance(source, PairTable)
    assert (source.rows, source.ties, source.unlabelled) == (5, 1, 1)
    assert [source[i].index for i in range(3)] == [0, 2, 4]
    assert [source[i].captions for i in range(3)] == [("prompt 0",), ("prompt 2",), ("prompt 4",)]
    assert source[2].extras == {"user_id": 0}
    first, second = source[0], source[1]
    assert source.pictures.encoded(first.winner) == rows["jpg_0"][0]
    assert source.pictures.encoded(first.loser) == rows["jpg_1"][0]
    assert source.pictures.encoded(second.winner) == rows["jpg_1"][2]
    assert source.pictures[second.winner].name.endswith("row 2, jpg_1")


def test_columns_of_type_image():
    rows = pick_a_pic([(1, True), (0, True)])
    rows = {"winner": rows["jpg_0"], "loser": rows["jpg_1"]}
    table = datasets.Dataset.from_dict(rows).cast_column("winner", datasets.Image())
    source = PairTable(table, "set")
    assert [(pair.winner, pair.loser) for pair in (source[0], source[1])] == [(0, 1), (2, 3)]
    assert source[1].captions == () and source[1].extras == {}
    assert source.pictures.encoded(2) == rows["winner"][1]
    assert source.pictures.identity(0) != source.pictures.identity(1)


def test_addresses_stay_when_other_rows_get_a_label():
    before = PairTable(datasets.Dataset.from_dict(pick_a_pic(LABELS)), "set")
    after = PairTable(
        datasets.Dataset.from_dict(pick_a_pic([*LABELS[:3], *[(0, True)] * 2])), "set"
    )
    assert [before[i].index for i in range(3)] == [0, 2, 4]
    assert [after[i].index for i in range(4)] == [0, 2, 3, 4]


def test_refused_tables(tmp_path):
    rows = pick_a_pic(LABELS)
    table = datasets.Dataset.from_dict(rows)
    with pytest.raises(UserError, match='no column "said". Its columns: caption, jpg_0'):
        PairTable(table, "set", caption_column="said")
    with pytest.raises(UserError, match=r'set: "jpg_0" holds .*float64.*embedded'):
        PairTable(datasets.Dataset.from_dict(rows | {"jpg_0": rows["label_0"]}), "set")
    with pytest.raises(UserError, match='set, row 1: "label_0" must be 0, 0.5 or 1, not 0.75'):
        PairTable(datasets.Dataset.from_dict(rows | {"label_0": [1, 0.75, 0, 1, 0]}), "set")
    with pytest.raises(UserError, match="none of its 2 rows prefers a picture .1 ties, 1 without"):
        PairTable(datasets.Dataset.from_dict(pick_a_pic([LABELS[1], LABELS[3]])), "set")


def test_refused_folders(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="no metadata table; pairs of pictures are named in one of"):
        open_pairs(tmp_path)
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "a"}])
    with pytest.raises(UserError, match="names no pairs.*Its columns: file_name, text"):
        open_pairs(tmp_path)
    rows = [{"winner": "a.png", "loser": "b.png"}, {"winner": 3, "loser": "a.png"}]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    with pytest.raises(UserError, match="row 1: names b.png, but there is no") as caught:
        open_pairs(tmp_path)
    assert 'row 2: "winner" must be a path below the folder, not 3' in str(caught.value)
    assert f"diffkit data check {tmp_path}" in str(caught.value)


def test_a_csv_without_any_label(tmp_path):
    """It was said to have no column "label_0", though its header has."""
    for name in "ab":
        noise(40, 40, ord(name)).save(tmp_path / f"{name}.png")
    text = "image_0,image_1,label_0,text\na.png,b.png,,x\nb.png,a.png,,x\n"
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match="none of its 2 rows has a label"):
        open_pairs(tmp_path)


def test_a_picture_preferred_to_itself_is_no_pair(tmp_path):
    """Such pairs trained without a word, their loss at ln 2 for ever."""
    for name in "ab":
        noise(40, 40, ord(name)).save(tmp_path / f"{name}.png")
    rows = [{"winner": "a.png", "loser": name, "text": "x"} for name in ("a.png", "b.png")]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    source = open_pairs(tmp_path)
    assert names(source) == [("a.png", "b.png", 1, ("x",))] and source.equal == 1
    assert left_out(source) == "0 ties, 0 without a label, 1 of a picture with itself"
    write_jsonl(tmp_path / "metadata.jsonl", rows[:1])
    with pytest.raises(UserError, match="none of its 1 rows prefers .* 1 of a picture with itself"):
        open_pairs(tmp_path)


@pytest.mark.parametrize("kinds", [(), ("jpg_0",), ("jpg_0", "jpg_1")])
def test_equal_bytes_in_a_table_are_no_pair(kinds):
    rows = pick_a_pic(LABELS)
    rows["jpg_1"][2] = rows["jpg_0"][2]
    rows["jpg_1"][1] = rows["jpg_0"][1]  # a tie, and counted as one
    table = datasets.Dataset.from_dict(rows)
    for name in kinds:
        table = table.cast_column(name, datasets.Image())
    source = PairTable(table, "set")
    assert (source.ties, source.unlabelled, source.equal) == (1, 1, 1)
    assert [source[i].index for i in range(len(source))] == [0, 4]


def test_pairs_given_to_a_method_of_single_pictures(tmp_path):
    """They were told to name a column "file_name", or one of 0 columns of images."""
    message = "these are preference pairs: `diffkit train preference` trains on them"
    with pytest.raises(UserError, match=message):
        ImageFolder(pair_folder(tmp_path, 2))
    with pytest.raises(UserError, match=message):
        find_columns(datasets.Dataset.from_dict(pick_a_pic(LABELS)).features, "set")


def test_pairs_without_captions_are_told_where_captions_are_looked_for(tmp_path):
    for name in "ab":
        noise(40, 40, ord(name)).save(tmp_path / f"{name}.png")
    write_jsonl(tmp_path / "metadata.jsonl", [{"winner": "a.png", "loser": "b.png"}])
    with pytest.raises(UserError, match="1 of 1 pairs .* text, txt, caption or prompt of the"):
        require_captions(open_pairs(tmp_path), "pair")
