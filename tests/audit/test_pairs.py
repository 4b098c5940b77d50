"""Pairs by record, by path and by the names that diffkit protect gives; the rest is listed."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffkit.audit.pairs import pair_up
from diffkit.errors import UserError
from tests.audit.pictures import pixels, protected, record, save, two_folders


def names(pairing: object) -> dict[str, str]:
    return {pair.name: pair.clean.name for pair in pairing.pairs}


def test_two_files(tmp_path: Path) -> None:
    clean, result = two_folders(tmp_path, 1)
    found = pair_up(clean / "0.png", result / "0.png", tmp_path / "out")
    assert names(found) == {"0.png": "0.png"}
    assert found.pairs[0].record is not None and not found.pairs[0].changed


def test_renamed_pictures_are_found_by_their_records(tmp_path: Path) -> None:
    clean, result = two_folders(tmp_path)
    for number, name in ((0, "b"), (1, "0")):  # 0.png of PROTECTED is now that of clean 1
        for ending in (".png", ".png.json"):
            (result / f"{number}{ending}").rename(result / f"{name}{ending}")
    assert names(pair_up(clean, result, tmp_path / "out")) == {"0.png": "1.png", "b.png": "0.png"}


def test_without_records_paths_and_the_names_of_results_decide(tmp_path: Path) -> None:
    clean, result = tmp_path / "clean", tmp_path / "protected"
    for place in ("a.png", "deep/a.bmp", "b.jpg", "c.jpg", "c.png"):
        save(clean / place, pixels(len(place)))
    for place in ("a.png", "deep/a.bmp", "b.png", "c.png", "c_jpg.png"):
        save(result / place, pixels(len(place)))
    found = pair_up(clean, result, tmp_path / "out")
    assert {pair.name: pair.clean.relative_to(clean).as_posix() for pair in found.pairs} == {
        "a.png": "a.png",
        "deep/a.bmp": "deep/a.bmp",
        "b.png": "b.jpg",
        "c.png": "c.png",
        "c_jpg.png": "c.jpg",
    }
    assert not (found.clean or found.protected or found.unreadable)


def test_what_has_no_partner_is_listed_and_never_guessed(tmp_path: Path) -> None:
    clean, result = two_folders(tmp_path)
    save(clean / "lonely.png", pixels(7))
    save(result / "stranger.png", pixels(8))
    # The name fits, but it was made of another file: the original was changed since.
    save(clean / "1.png", pixels(9))
    (result / "notes.txt").write_text("no picture")
    (result / "torn.png").write_bytes(b"no picture either")
    found = pair_up(clean, result, tmp_path / "out")
    assert names(found) == {"0.png": "0.png"}
    assert sorted(item.path.name for item in found.clean) == ["1.png", "lonely.png"]
    reasons = {item.path.name: item.reason for item in found.protected}
    assert "no record" in reasons["stranger.png"] and "another" not in reasons["stranger.png"]
    assert "not among" in reasons["1.png"]
    assert [item.path.name for item in found.unreadable] == ["torn.png"]


def test_previews_of_protect_are_no_results(tmp_path: Path) -> None:
    clean, result = two_folders(tmp_path)
    save(result / "previews" / "0.png", pixels(3, 32, 160))
    save(result / "previews" / "own.png", pixels(4))
    found = pair_up(clean, result, tmp_path / "out")
    assert [item.path.name for item in found.protected] == ["own.png"]


def test_a_result_that_was_compressed_since_still_belongs_to_its_original(tmp_path: Path) -> None:
    clean = save(tmp_path / "clean" / "x.png", pixels())
    result = save(tmp_path / "protected" / "x.png", protected(pixels()))
    record(result, clean)
    save(result, protected(pixels(), 4))
    pair = pair_up(clean.parent, result.parent, tmp_path / "out").pairs[0]
    assert pair.changed and pair.clean == clean


def test_a_foreign_json_is_no_record(tmp_path: Path) -> None:
    clean, result = two_folders(tmp_path, 1)
    (result / "0.png.json").write_text('{"kind": "something else"}')
    assert pair_up(clean, result, tmp_path / "out").pairs[0].record is None


def test_impossible_arguments_are_refused(tmp_path: Path) -> None:
    clean, result = two_folders(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        pair_up(tmp_path / "nowhere", result, tmp_path / "out")
    with pytest.raises(UserError, match="two pictures or two folders"):
        pair_up(clean / "0.png", result, tmp_path / "out")
    with pytest.raises(UserError, match="lies in the input folder"):
        pair_up(clean, result, result / "out")
    for path in result.iterdir():
        path.rename(path.with_name("z" + path.name.replace(".json", ".txt")))
    with pytest.raises(UserError, match="no picture of one belongs"):
        pair_up(clean, result, tmp_path / "out")
