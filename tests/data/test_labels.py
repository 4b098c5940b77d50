"""Labels of a data set are matched with the classes of a model by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from diffkit.data.folder import ImageFolder
from diffkit.data.labels import match_labels
from diffkit.errors import UserError
from diffkit.models.classes import Classes


def folder(tmp_path: Path, *names: str) -> ImageFolder:
    for name in names:
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    return ImageFolder(tmp_path)


def labels(source: ImageFolder) -> dict[str, int | None]:
    return {source[i].name.split("/")[0]: source[i].label for i in range(len(source))}


def test_names_are_looked_up(tmp_path: Path) -> None:
    classes = Classes(3, 3, {0: "dog, hound", 1: "owl", 2: "cat"})
    source, same = match_labels(folder(tmp_path, "cat", "hound"), classes)
    assert labels(source) == {"cat": 2, "hound": 0} and same == classes
    assert source.class_names == ("dog, hound", "owl", "cat")
    assert source.encoded(0) == tmp_path / "cat" / "a.png"
    assert "cat/a.png" in source.identity(0)


def test_numbers_are_numbers(tmp_path: Path) -> None:
    """Folders sort as text, "10" before "2": their place is not their number."""
    source, _ = match_labels(folder(tmp_path, "2", "10", "0"), Classes(11))
    assert labels(source) == {"0": 0, "10": 10, "2": 2}


def test_a_model_without_names_takes_those_of_the_data(tmp_path: Path) -> None:
    source, named = match_labels(folder(tmp_path, "cat", "ape"), Classes(5, 5))
    assert labels(source) == {"ape": 0, "cat": 1}
    assert named == Classes(5, 5, {0: "ape", 1: "cat"})


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    data = folder(tmp_path, "cat", "ape")
    with pytest.raises(UserError, match="the class 'ape': no such class"):
        match_labels(data, Classes(2, 2, {0: "cat", 1: "dog"}))
    with pytest.raises(UserError, match="2 classes and the model has 1"):
        match_labels(data, Classes(1))
    with pytest.raises(UserError, match="no classes, and this model is conditioned on 3"):
        match_labels(ImageFolder(tmp_path / "cat"), Classes(3))
