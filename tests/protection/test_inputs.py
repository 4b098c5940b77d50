"""Which files are taken, and what their results are called."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path, PurePosixPath

import pytest
import torch

from diffkit.errors import UserError
from diffkit.protection.image_file import Header, Unreadable, open_picture
from diffkit.protection.inputs import (
    Input,
    check_originals,
    find_pictures,
    image_seed,
    output_names,
)
from diffkit.randomness import normal
from tests.protection.gallery import make_gallery

HEADERS = {
    "png": Header("PNG", True, (8, 8)),
    "jpg": Header("JPEG", False, (8, 8)),
    "webp": Header("WEBP", False, (8, 8)),
    "webp-lossless": Header("WEBP", True, (8, 8)),
    "tif": Header("TIFF", True, (8, 8)),
}


def named(name: str, kind: str) -> Input:
    return Input(Path(name), PurePosixPath(name), Path("."), HEADERS[kind])


def names(*pairs: tuple[str, str], keep_jpeg: bool = False) -> list[str]:
    """The results' names, in the order of the pairs; the same in every order of the inputs."""
    items = [named(*pair) for pair in pairs]
    found = output_names(items, keep_jpeg)
    for seed in range(5):
        random.Random(seed).shuffle(items)
        assert output_names(items, keep_jpeg) == found
    assert len(set(found.values())) == len(pairs)
    return [str(found[PurePosixPath(name)]) for name, _ in pairs]


def test_a_tree_is_searched_and_every_file_is_accounted_for(tmp_path: Path) -> None:
    gallery = make_gallery(tmp_path / "in", 54, size=16)
    (tmp_path / "in" / ".hidden").mkdir()
    for hidden in (".x.png", ".hidden/x.png", ".partial-abc"):
        (tmp_path / "in" / hidden).write_bytes(gallery.good[0].read_bytes())
    link = tmp_path / "in" / "link.png"
    link.symlink_to(gallery.good[0])
    folder_link = tmp_path / "in" / "linked"
    folder_link.symlink_to(tmp_path)
    os.mkfifo(tmp_path / "in" / "pipe.png")
    inputs, skipped = find_pictures([tmp_path / "in"], tmp_path / "out")
    late = {path for path, reason in gallery.bad.items() if reason == "cut off"}
    reasons = {item.path: item.reason for item in skipped}
    assert {item.path for item in inputs} - late == set(gallery.good)
    assert reasons.pop(link) == reasons.pop(folder_link) == "a symbolic link"
    assert reasons.pop(tmp_path / "in" / "pipe.png") == "not a regular file"
    assert set(reasons) | late == set(gallery.bad)
    for path, reason in reasons.items():
        assert gallery.bad[path] in reason
    for item in inputs:
        assert item.path == tmp_path / "in" / item.relative
        if item.path in late:
            with pytest.raises(Unreadable, match="cut off"):
                open_picture(item.path)
        else:
            open_picture(item.path)
    assert [item.relative for item in inputs] == sorted((i.relative for i in inputs), key=str)
    results = output_names(inputs)
    assert len(set(results.values())) == len(inputs)
    check_originals(inputs, results, tmp_path / "out")


def test_paths_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    gallery = make_gallery(tmp_path / "a", 3)
    make_gallery(tmp_path / "b", 3)
    with pytest.raises(UserError, match="no picture given"):
        find_pictures([], tmp_path / "out")
    with pytest.raises(UserError, match=r"none\.png: no such"):
        find_pictures([tmp_path / "none.png"], tmp_path / "out")
    with pytest.raises(UserError, match=r"a/plain 0\.png and .*b/plain 0\.png"):
        find_pictures([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    (tmp_path / "way").symlink_to(tmp_path / "a")
    for output in (tmp_path / "a", tmp_path / "a" / "x" / "y", tmp_path / "way" / "x"):
        with pytest.raises(UserError, match="input folder"):
            find_pictures([tmp_path / "a"], output)
    # the same file twice is one picture; a file beside the output folder is fine
    both, _ = find_pictures([tmp_path / "a", gallery.good[0]], tmp_path / "out")
    assert len(both) == 3
    linked, _ = find_pictures([tmp_path / "way"], tmp_path / "out")
    assert len(linked) == 3


def test_originals_are_never_the_result(tmp_path: Path) -> None:
    gallery = make_gallery(tmp_path, 3)
    inputs, _ = find_pictures([gallery.good[0]], tmp_path)
    with pytest.raises(UserError, match="would replace the original"):
        check_originals(inputs, output_names(inputs), tmp_path)
    (tmp_path / "deep" / "deep").mkdir(parents=True)
    (tmp_path / "deep" / "deep" / "x.png").write_bytes(gallery.good[0].read_bytes())
    inputs, _ = find_pictures([tmp_path / "deep"], tmp_path)
    with pytest.raises(UserError, match="input folder"):
        check_originals(inputs, output_names(inputs), tmp_path)


def test_names_stay_or_become_png() -> None:
    pairs = (("a.b c.PNG", "png"), ("猫.v1.jpg", "jpg"), ("x.webp", "webp-lossless"))
    assert names(*pairs) == ["a.b c.PNG", "猫.v1.png", "x.webp"]
    assert names(("IMG_1", "jpg"), ("v1.2 last", "tif")) == ["IMG_1.png", "v1.2 last.tif"]
    # the content decides, not the ending
    assert names(("a.png", "jpg"), ("b.jpg", "png")) == ["a.png", "b.png"]
    assert names(("a.jpg", "jpg"), ("b.png", "jpg"), keep_jpeg=True) == ["a.jpg", "b.jpg"]


def test_collisions_take_the_old_ending() -> None:
    assert names(("a.png", "png"), ("a.jpg", "jpg")) == ["a.png", "a_jpg.png"]
    assert names(("a.jpg", "jpg"), ("b/a.png", "png")) == ["a.png", "b/a.png"]
    assert names(("a.jpg", "jpg"), ("a.webp", "webp")) == ["a_jpg.png", "a_webp.png"]
    taken = (("a.png", "png"), ("a.jpg", "jpg"), ("a_jpg.png", "png"))
    assert names(*taken) == ["a.png", "a_jpg_2.png", "a_jpg.png"]
    # one name on disks that ignore case, or the spelling of accents
    assert names(("A.png", "png"), ("a.jpg", "jpg")) == ["A.png", "a_jpg.png"]
    assert names(("\u00e9.png", "png"), ("e\u0301.jpg", "jpg"))[1] == "e\u0301_jpg.png"
    assert names(("a", "jpg"), ("a.jpg", "jpg")) == ["a_2.png", "a_jpg.png"]


def test_seed_is_that_of_the_contents() -> None:
    expected = int.from_bytes(hashlib.sha256(b"7:bytes").digest()[:8], "big")
    assert image_seed(7, b"bytes") == expected < 2**64
    assert image_seed(8, b"bytes") != expected != image_seed(7, b"byteS")
    assert torch.equal(normal((3,), expected, "eta"), normal((3,), expected, "eta"))
