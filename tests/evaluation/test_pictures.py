"""A folder of pictures is read in order, by named rules, and watched while it is."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from diffkit.assets import path
from PIL import Image

from diffkit.errors import RunFailed, UserError
from diffkit.evaluation.pictures import Batch, PictureSet, to_float, to_uint8
from diffkit.files import append_jsonl
from diffkit.generation.recipe import Recipe, write_png

GREY = Image.new("RGB", (8, 8), (128, 128, 128))


def noise(seed: int, width: int = 8, height: int = 8) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def recipe(prompt: str) -> Recipe:
    values = {field.name: None for field in dataclasses.fields(Recipe)}
    numbers = {"steps": 1, "guidance": 1.0, "width": 8, "height": 8, "index": 0, "seed": 0}
    return Recipe(**(values | numbers | {"prompt": prompt, "loras": ()}))


def everything(pictures: PictureSet, batch_size: int, start: int = 0) -> torch.Tensor:
    found = {}
    for batch in pictures.batches(batch_size, start):
        found.update(zip(batch.indices, batch.pixels))
    return torch.stack([found[index] for index in range(start, len(pictures))])


def test_eight_bit_pixels_survive_the_floats():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert to_float(pixels).aminmax() == (-1, 1)
    assert torch.equal(to_uint8(to_float(pixels)), pixels)


def test_pictures_come_in_order_whatever_the_batch(tmp_path):
    for index in range(7):
        noise(index).save(tmp_path / f"{index}.png")
    pictures = PictureSet.open(tmp_path)
    expected = torch.stack(
        [torch.from_numpy(np.array(noise(i))).permute(2, 0, 1) for i in range(7)]
    )
    for batch_size in (1, 3, 7, 20):
        assert torch.equal(everything(pictures, batch_size), expected)
    assert torch.equal(everything(pictures, 3, start=4), expected[4:])
    assert pictures.size == (8, 8) and len(PictureSet.open(tmp_path, num=4)) == 4


def test_modes_follow_the_rule_of_training(tmp_path):
    """Transparency over white, 16-bit grey scaled (not clipped) to 8 bits, grey to RGB."""
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a-clear.png")
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(tmp_path / "b-solid.png")
    Image.new("L", (8, 8), 77).save(tmp_path / "c-grey.png")
    Image.fromarray(np.full((8, 8), 257 * 33, np.uint16)).save(tmp_path / "d-16bit.png")
    Image.new("P", (8, 8)).save(tmp_path / "e-palette.png")
    colours = everything(PictureSet.open(tmp_path), 8)[:, :, 0, 0].tolist()
    assert colours[:4] == [[255] * 3, [255, 0, 0], [77] * 3, [33] * 3]


def test_sizes_are_kept_or_brought_to_one_by_a_named_rule(tmp_path):
    for index, (width, height) in enumerate([(8, 8), (16, 8), (8, 8), (16, 8)]):
        noise(index, width, height).save(tmp_path / f"{index}.png")
    own = PictureSet.open(tmp_path)
    assert own.size is None and own.resize == "pictures at their own size"
    batches = [(batch.indices, tuple(batch.pixels.shape)) for batch in own.batches(4)]
    assert batches == [((0, 2), (2, 3, 8, 8)), ((1, 3), (2, 3, 8, 16))]
    fitted = PictureSet.open(tmp_path, size=(8, 8))
    assert fitted.size == (8, 8) and "cover 8x8" in fitted.resize
    pixels = everything(fitted, 4)
    assert torch.equal(pixels[0], own.read(0))
    # A picture twice as wide at the right height: nothing is scaled, its middle is kept.
    assert torch.equal(pixels[1], own.read(1)[:, :, 4:12])


def test_broken_pictures_are_named_left_out_and_counted(tmp_path, capsys):
    for index in range(4):
        noise(index, 32, 32).save(tmp_path / f"{index}.png")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.png").write_bytes(b"")
    pictures = PictureSet.open(tmp_path)
    assert pictures.names == ("0.png", "3.png")
    assert [name for name, _ in pictures.skipped] == ["1.png", "2.png"]
    assert "1.png: left out" in capsys.readouterr().err
    for name in pictures.names:
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of its 4 pictures"):
        PictureSet.open(tmp_path)


def test_a_picture_that_changes_or_disappears_ends_the_run(tmp_path):
    for index in range(3):
        noise(index).save(tmp_path / f"{index}.png")
    pictures = PictureSet.open(tmp_path)
    before = pictures.identity(0, 3), pictures.identity(0, 1)
    noise(9).save(tmp_path / "1.png")
    os.utime(tmp_path / "1.png", ns=(1, 1))
    with pytest.raises(RunFailed, match=r"1\.png: changed while it was measured"):
        list(pictures.batches(2))
    again = PictureSet.open(tmp_path)
    assert again.identity(0, 3) != before[0] and again.identity(0, 1) == before[1]
    (tmp_path / "2.png").unlink()
    with pytest.raises(RunFailed, match=r"2\.png: could be read before"):
        list(again.batches(2))


def test_prompts_come_from_recipes_before_metadata(tmp_path):
    write_png(tmp_path / "0.png", GREY, recipe("a dog"))
    GREY.save(tmp_path / "1.png")
    GREY.save(tmp_path / "2.png")
    rows = [{"file_name": f"{i}.png", "text": ["a cat", "a kitten"]} for i in range(2)]
    append_jsonl(tmp_path / "metadata.jsonl", *rows, {"file_name": "2.png", "text": "a dog"})
    pictures = PictureSet.open(tmp_path)
    assert pictures.prompts == ("a dog", "a cat", "a dog") and pictures.has_prompts
    assert pictures.groups.tolist() == [0, 1, 0]


def test_without_prompts_every_picture_is_its_own_group(tmp_path):
    GREY.save(tmp_path / "0.png")
    GREY.save(tmp_path / "1.png")
    pictures = PictureSet.open(tmp_path)
    assert not pictures.has_prompts and pictures.groups.tolist() == [0, 1]


def test_contradictions_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        PictureSet.open(tmp_path / "none")
    GREY.save(tmp_path / "0.png")
    append_jsonl(tmp_path / "metadata.jsonl", {"file_name": "missing.png", "text": "a"})
    with pytest.raises(UserError, match="diffkit data check"):
        PictureSet.open(tmp_path)


def test_the_shipped_sample():
    pictures = PictureSet.open(path("sample"))
    assert len(pictures) >= 128 and pictures.size == (64, 64)
    assert pictures.prompts[0] == "watermelon, noto style, white background"


def test_the_contact_sheet_of_a_generated_folder_is_no_picture(tmp_path: Path) -> None:
    """It once made a folder of `diffkit generate` a set of mixed sizes without prompts."""
    for name in ("00000.png", "00001.png", "contact_sheet.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    assert PictureSet.open(tmp_path).names == ("00000.png", "00001.png")
    assert PictureSet.open(tmp_path, num=2).names == ("00000.png", "00001.png")


def test_large_pictures_are_measured_in_pieces() -> None:
    """64 pictures of 1024x1024 in one spectrum once took ten gigabytes."""
    pixels = torch.zeros(9, 1, 1, 1, dtype=torch.uint8).expand(9, 3, 1024, 1024)
    pieces = list(Batch(tuple(range(9)), pixels).pieces())
    assert [piece.indices for piece in pieces] == [(0, 1, 2, 3), (4, 5, 6, 7), (8,)]
    huge = Batch((0, 1), pixels[:2, :, :1, :1].expand(2, 3, 4096, 4096))
    assert [len(piece.indices) for piece in huge.pieces()] == [1, 1]
