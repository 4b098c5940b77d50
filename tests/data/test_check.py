"""`check` names every bad file of a folder and no good one."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from diffkit.data.check import check
from diffkit.data.folder import ImageFolder
from diffkit.data.preference_sources import open_pairs
from diffkit.data.scan import scan
from diffkit.errors import UserError
from tests.data.pairs import pair_folder
from tests.data.pictures import noise, picture_folder, write_jsonl


def found(report):
    return {(problem.path, problem.kind) for problem in report.problems}


def test_a_good_folder_has_no_problems(tmp_path):
    report = check(picture_folder(tmp_path, 9, ((48, 48), (40, 80)), captions=2))
    assert report.problems == () and report.kinds == {}
    assert report.counts == {"images": 9, "captions": 18, "classes": 0, "good": 9}
    assert "Nothing is wrong" in report.summary()


def test_every_kind_of_bad_file_is_named(tmp_path):
    for number in range(12):
        noise(40, 40, number).save(tmp_path / f"{number:02}.png")
        (tmp_path / f"{number:02}.txt").write_text(f"caption {number}")
    whole = (tmp_path / "00.png").read_bytes()
    (tmp_path / "01.png").write_bytes(whole[:-500])
    (tmp_path / "02.png").write_bytes(b"")
    (tmp_path / "03.png").write_bytes(b"<html>404</html>")
    (tmp_path / "04.png").write_bytes(whole)
    (tmp_path / "05.txt").unlink()
    (tmp_path / "06.txt").write_text("  \n")
    (tmp_path / "lost.txt").write_text("no picture")
    (tmp_path / "07.txt").write_bytes(b"\xff\xfe\xfa")
    noise(8, 40).save(tmp_path / "08.png")
    (tmp_path / "09.png").unlink()
    (tmp_path / "09.png").symlink_to(tmp_path / "gone.png")
    Image.fromarray(np.zeros((40, 40), np.float32)).save(tmp_path / "10.tif")
    (tmp_path / "10.png").unlink()
    report = check(tmp_path)
    assert found(report) == {
        ("01.png", "corrupt"),
        ("02.png", "corrupt"),
        ("03.png", "corrupt"),
        ("04.png", "duplicate"),
        ("05.png", "image without caption"),
        ("06.png", "image without caption"),
        ("07.txt", "bad caption"),
        ("07.png", "image without caption"),
        ("08.png", "too small"),
        ("09.png", "corrupt"),
        ("10.tif", "corrupt"),
        ("lost.txt", "caption without image"),
    }
    assert report.counts["images"] == 12 and report.counts["good"] == 2
    summary = report.summary()
    assert "corrupt (5)" in summary and "has the same bytes as 00.png" in summary
    assert "09.png: cannot be opened (No such file or directory)" in summary
    assert [p.kind for p in report.problems] == sorted(
        (p.kind for p in report.problems), key=list(report.kinds).index
    )


def test_problems_of_a_table(tmp_path):
    for name in "abcd":
        noise(40, 40, ord(name)).save(tmp_path / f"{name}.png")
    rows = [
        {"file_name": "a.png", "text": "x"},
        {"file_name": "a.png", "text": "y"},
        {"file_name": "z.png", "text": "z"},
        {"file_name": "b.png", "text": 5},
        {"file_name": "c.png"},
        {"text": "no name"},
    ]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    report = check(tmp_path)
    assert found(report) == {
        ("metadata.jsonl, row 3", "caption without image"),
        ("metadata.jsonl, row 4", "bad row"),
        ("metadata.jsonl, row 6", "bad row"),
        ("c.png", "image without caption"),
        ("b.png", "unlisted image"),
        ("d.png", "unlisted image"),
        ("a.png", "duplicate"),
    }


def test_what_check_calls_good_can_be_trained_on(tmp_path):
    """Removing every file that is named leaves a folder that loads without a warning."""
    for number in range(6):
        noise(40, 40, number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("x")
    (tmp_path / "1.png").write_bytes(b"zzz")
    (tmp_path / "2.png").unlink()
    for problem in check(tmp_path).problems:
        (tmp_path / problem.path).unlink()
    (tmp_path / "1.txt").unlink()
    assert check(tmp_path).problems == ()
    assert len(scan(ImageFolder(tmp_path)).kept) == 4


def test_bombs_are_named(tmp_path, monkeypatch):
    picture_folder(tmp_path, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (problem,) = check(tmp_path).problems
    assert problem.kind == "corrupt" and "decompression bomb" in problem.message


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("")])
def test_no_folder_of_pictures(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(UserError, match="x: "):
        check(tmp_path / "x")


def test_reads_from_a_read_only_copy(tmp_path):
    """Nothing is written below the folder."""
    picture_folder(tmp_path / "a", 3)
    before = sorted(path.name for path in (tmp_path / "a").rglob("*"))
    check(tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").rglob("*")) == before
    shutil.rmtree(tmp_path / "a")


def test_problems_of_preference_pairs(tmp_path):
    for name in "abcde":
        noise(40, 40, ord(name)).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:-300])
    (tmp_path / "d.png").write_bytes((tmp_path / "a.png").read_bytes())
    rows = [
        {"image_0": "a.png", "image_1": "b.png", "label_0": 1, "text": "x"},
        {"image_0": "b.png", "image_1": "c.png", "label_0": 0},
        {"image_0": "c.png", "image_1": "z.png", "label_0": 0, "text": "x"},
        {"image_0": "a.png", "image_1": "c.png", "label_0": 3, "text": "x"},
        {"image_0": "c.png", "image_1": "c.png", "label_0": 1, "text": "x"},
        {"image_0": "a.png", "image_1": "d.png", "label_0": 0.5, "text": "x"},
        {"image_0": "a.png", "image_1": "c.png", "label_0": None, "text": "x"},
        {"image_0": "d.png", "image_1": "c.png", "label_0": 1, "text": "x"},
    ]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    report = check(tmp_path)
    assert found(report) == {
        ("b.png", "corrupt"),
        ("metadata.jsonl, row 2", "pair without caption"),
        ("metadata.jsonl, row 3", "caption without image"),
        ("metadata.jsonl, row 4", "bad row"),
        ("metadata.jsonl, row 5", "equal pictures"),
        ("d.png", "duplicate"),
        ("e.png", "unlisted image"),
    }
    assert report.counts == {
        "images": 4,
        "captions": 2,
        "pairs": 3,
        "ties": 1,
        "unlabelled": 1,
        "good": 2,
    }
    assert "4 images, 2 captions, 3 pairs, 1 ties, 1 rows without a label" in report.summary()


def test_good_pairs_have_no_problems(tmp_path):
    report = check(pair_folder(tmp_path, 5))
    assert report.problems == () and report.counts["pairs"] == 5 and report.counts["good"] == 10


def test_a_table_of_two_kinds_of_pairs_is_refused(tmp_path):
    noise(40, 40).save(tmp_path / "a.png")
    rows = [{"winner": "a.png", "loser": "a.png", "label_0": 1}]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    with pytest.raises(UserError, match="has label_0 beside winner and loser"):
        check(tmp_path)


def test_pairs_that_training_refuses_are_not_called_good(tmp_path):
    """They were: rows that are all ties, and pairs without any caption."""
    for name in "ab":
        noise(40, 40, ord(name)).save(tmp_path / f"{name}.png")
    row = {"image_0": "a.png", "image_1": "b.png"}
    write_jsonl(tmp_path / "metadata.jsonl", [{**row, "label_0": 0.5, "text": "x"}] * 3)
    (problem,) = check(tmp_path).problems
    assert (problem.path, problem.kind) == ("metadata.jsonl", "no pair")
    assert "none of its 3 rows prefers a picture (3 ties, 0 without" in problem.message
    with pytest.raises(UserError, match="none of its 3 rows prefers a picture"):
        open_pairs(tmp_path)
    write_jsonl(tmp_path / "metadata.jsonl", [{**row, "label_0": 1}] * 3)
    (problem,) = check(tmp_path).problems
    assert (problem.path, problem.kind) == ("metadata.jsonl", "no captions")
    assert "text, txt, caption or prompt; `--denoising.condition-dropout 1`" in problem.message
    assert len(open_pairs(tmp_path)) == 3


def test_a_table_of_pairs_and_single_pictures_is_refused_in_the_same_words(tmp_path):
    """`check` took it for single pictures, and training for pairs."""
    for name in "ab":
        noise(40, 40, ord(name)).save(tmp_path / f"{name}.png")
    rows = [{"file_name": "a.png", "winner": "a.png", "loser": "b.png", "text": "x"}]
    write_jsonl(tmp_path / "metadata.jsonl", rows)
    said = []
    for read in (check, open_pairs):
        with pytest.raises(UserError, match="file_name, .* beside winner, loser, of") as caught:
            read(tmp_path)
        said.append(str(caught.value))
    assert said[0] == said[1]
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "winner": "x", "text": "x"}])
    assert "pairs" not in check(tmp_path).counts
