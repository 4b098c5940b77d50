"""Image folders: the three layouts, and what is refused."""

from __future__ import annotations

import csv

import pyarrow
import pyarrow.parquet
import pytest

from diffkit.data.folder import ImageFolder
from diffkit.data.scan import require_captions, scan
from diffkit.errors import UserError
from tests.data.pictures import noise, picture_folder, write_jsonl

ROWS = [
    {"file_name": "b.png", "text": "second", "score": 2},
    {"file_name": "deep/er/a.png", "text": "first", "score": 1},
]


def save(folder, *names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(40, 40, seed).save(folder / name)


def write_table(folder, kind, rows):
    if kind == "jsonl":
        write_jsonl(folder / "metadata.jsonl", rows)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "metadata.parquet")
    else:
        with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_table(tmp_path, kind):
    save(tmp_path, "b.png", "deep/er/a.png")
    write_table(tmp_path, kind, ROWS)
    folder = ImageFolder(tmp_path)
    assert [record.name for record in folder.records] == ["b.png", "deep/er/a.png"]
    assert [record.captions for record in folder.records] == [("second",), ("first",)]
    assert folder[1].path == tmp_path / "deep/er/a.png" == folder.encoded(1)
    assert [str(record.extras["score"]) for record in folder.records] == ["2", "1"]
    assert folder.class_names == () and folder[0].label is None
    require_captions(folder)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_several_captions(tmp_path, kind):
    save(tmp_path, "a.png", "b.png")
    rows = [{"file_name": f"{n}.png", "text": [f"{n} one", f"{n} two"]} for n in "ab"]
    write_table(tmp_path, kind, rows)
    assert ImageFolder(tmp_path)[1].captions == ("b one", "b two")


def test_csv_with_quoted_commas_quotes_and_line_breaks(tmp_path):
    save(tmp_path, "a.png")
    write_table(tmp_path, "csv", [{"file_name": "a.png", "text": 'red, "ripe"\napple'}])
    assert ImageFolder(tmp_path)[0].captions == ('red, "ripe"\napple',)


def test_other_columns(tmp_path):
    save(tmp_path, "a.png")
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "blurb": "x", "kind": "cat"}])
    folder = ImageFolder(tmp_path, caption_column="blurb", label_column="kind")
    assert folder[0].captions == ("x",) and folder.class_names == ("cat",)
    with pytest.raises(UserError, match='no column "title". Its columns are: blurb, file_name, '):
        ImageFolder(tmp_path, caption_column="title")


def test_caption_files(tmp_path):
    save(tmp_path, "one.png", "sub/two.JPG", "three.webp")
    (tmp_path / "one.txt").write_text("a caption\n")
    (tmp_path / "sub/two.txt").write_text("first\n\n  second  \n")
    (tmp_path / "three.txt").write_text("ünïcode", encoding="utf-8-sig")
    (tmp_path / "README.txt").write_text("not a caption")
    folder = ImageFolder(tmp_path)
    assert {record.name: record.captions for record in folder.records} == {
        "one.png": ("a caption",),
        "sub/two.JPG": ("first", "second"),
        "three.webp": ("ünïcode",),
    }
    assert folder.class_names == ()


def test_class_folders(tmp_path):
    save(tmp_path, "dog/1.png", "dog/2.png", "cat/x/3.png")
    (tmp_path / ".cache").mkdir()
    save(tmp_path, ".cache/hidden.png")
    folder = ImageFolder(tmp_path)
    assert folder.class_names == ("cat", "dog")
    assert [(r.name, r.label) for r in folder.records] == [
        ("cat/x/3.png", 0),
        ("dog/1.png", 1),
        ("dog/2.png", 1),
    ]
    with pytest.raises(UserError, match=r"3 of 3 pictures have no caption: cat/x/3.png"):
        require_captions(folder)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_number_labels_keep_their_numbers(tmp_path, kind):
    save(tmp_path, "a.png", "b.png", "c.png")
    rows = [{"file_name": f"{n}.png", "label": v} for n, v in zip("abc", (10, 2, 0), strict=True)]
    write_table(tmp_path, kind, rows)
    folder = ImageFolder(tmp_path)
    assert [record.label for record in folder.records] == [10, 2, 0]
    assert len(folder.class_names) == 11


def test_a_single_subfolder_is_no_class(tmp_path):
    save(tmp_path, "images/1.png", "images/2.png")
    assert ImageFolder(tmp_path).class_names == ()


def test_links_are_followed_and_loops_survived(tmp_path):
    save(tmp_path / "elsewhere", "1.png")
    root = tmp_path / "root"
    save(root, "2.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    assert [record.name for record in ImageFolder(root).records] == ["2.png", "linked/1.png"]


def test_identity_changes_with_the_file(tmp_path):
    folder = ImageFolder(picture_folder(tmp_path, 2))
    before = folder.identity(0), folder.identity(1)
    noise(48, 48, 9).save(folder[0].path)
    assert folder.identity(0) != before[0] and folder.identity(1) == before[1]


REFUSED = {
    "missing": (None, "no such folder"),
    "empty": ({}, "is empty. Put pictures into it"),
    "no pictures": ({"a.pdf": "x", "b.doc": "x"}, "holds no pictures .* only .doc, .pdf"),
    "caption for no image": ({"a.png": 0, "a.txt": "x", "b.txt": "y"}, "b.txt: is a caption, but"),
    "two tables": ({"a.png": 0, "metadata.jsonl": "{}", "metadata.csv": ""}, "Only one metadata"),
    "table below": ({"x/a.png": 0, "x/metadata.jsonl": "{}"}, "in a subfolder, x/metadata.jsonl"),
    "empty table": ({"a.png": 0, "metadata.jsonl": ""}, "metadata.jsonl: has no rows"),
    "broken json": ({"a.png": 0, "metadata.jsonl": "\n{"}, "metadata.jsonl, line 2: is not JSON"),
    "json list": ({"a.png": 0, "metadata.jsonl": "[1]"}, "line 1: must be a JSON object"),
    "no file_name": ({"a.png": 0, "metadata.jsonl": '{"image": 1}'}, 'no column "file_name"'),
    "missing picture": (
        {"a.png": 0, "metadata.jsonl": '{"file_name": "z.png"}'},
        "row 1: names z.png, but there is no such picture",
    ),
    "wrong caption": (
        {"a.png": 0, "metadata.jsonl": '{"file_name": "a.png", "text": 3}'},
        "must be a text or a list of texts, not 3",
    ),
    "wrong name": (
        {"a.png": 0, "metadata.jsonl": '{"file_name": 7}'},
        '"file_name" must be',
    ),
    "wrong label": (
        {"a.png": 0, "metadata.jsonl": '{"file_name": "a.png", "label": 0.5}'},
        "must be a whole number or a name",
    ),
    "negative label": (
        {"a.png": 0, "metadata.jsonl": '{"file_name": "a.png", "label": -1}'},
        "labels must not be negative",
    ),
    "some labels": (
        {
            "a.png": 0,
            "b.png": 0,
            "metadata.jsonl": '{"file_name": "a.png", "label": 1}\n{"file_name": "b.png"}',
        },
        "b.png has no label",
    ),
    "csv cells": ({"a.png": 0, "metadata.csv": "file_name,text\na.png,x,y\n"}, "has 3 cells"),
    "csv short": ({"a.png": 0, "metadata.csv": "file_name,text\na.png\n"}, "has 1 cells"),
    "parquet": ({"a.png": 0, "metadata.parquet": "nonsense"}, "is not a parquet file"),
}


@pytest.mark.parametrize(("files", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_and_how(tmp_path, files, message):
    root = tmp_path / "data"
    if files is not None:
        root.mkdir()
        save(root, *(name for name, text in files.items() if text == 0))
        for name, text in files.items():
            if text != 0:
                (root / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        ImageFolder(root)
    assert str(root) in str(error.value)


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "x.zip").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        ImageFolder(tmp_path / "x.zip")


def test_many_faults_are_counted(tmp_path):
    save(tmp_path, "a.png")
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": f"{n}.png"} for n in range(20)])
    with pytest.raises(UserError, match=r"20 fault\(s\)(.|\n)*15 more(.|\n)*diffkit data check"):
        ImageFolder(tmp_path)


def test_unreadable_pictures_are_named_and_left_out(tmp_path, capsys):
    folder = ImageFolder(picture_folder(tmp_path, 6, ((48, 32),)))
    (tmp_path / "002.png").write_bytes(b"garbage")
    (tmp_path / "004.png").write_bytes(b"")
    found = scan(folder)
    assert found.kept == [0, 1, 3, 5] and found.sizes == [(48, 32)] * 4
    text = capsys.readouterr().err
    assert "2 of 6 pictures" in text and "002.png: not a picture" in text and "004.png" in text


def test_no_readable_picture_is_refused(tmp_path):
    folder = ImageFolder(picture_folder(tmp_path, 2))
    for record in folder.records:
        record.path.write_bytes(b"garbage")
    with pytest.raises(UserError, match="None of the 2 pictures can be read"):
        scan(folder)
