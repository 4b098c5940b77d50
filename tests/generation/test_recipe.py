"""A recipe goes into a PNG and comes out of it; what differs is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from diffkit.errors import UserError
from diffkit.generation.recipe import Recipe, differing_keys, read_recipe, write_png

RECIPE = Recipe(
    version="1",
    model="embedded",
    weights="abc",
    loras=(("/a/lora.safetensors", 0.5),),
    prompt="ein Apfel, 红苹果 🍎",
    negative="",
    steps=5,
    guidance=7.5,
    scheduler=None,
    width=8,
    height=8,
    index=3,
    seed=45,
    image=None,
    image_sha256=None,
    strength=None,
    mask=None,
    mask_sha256=None,
    dtype="fp32",
    attention="sdpa",
)


def test_any_script_survives_the_png(tmp_path: Path) -> None:
    image = Image.effect_noise((8, 8), 50).convert("RGB")
    write_png(tmp_path / "a.png", image, RECIPE)
    assert read_recipe(tmp_path / "a.png") == RECIPE
    assert list(Image.open(tmp_path / "a.png").getdata()) == list(image.getdata())


def test_a_moved_model_is_the_same_and_another_value_is_named() -> None:
    moved = dataclasses.replace(RECIPE, model="/elsewhere", loras=(("/b/x.safetensors", 0.5),))
    assert differing_keys(RECIPE, moved) == []
    other = dataclasses.replace(RECIPE, steps=6, weights="def")
    assert [line.split()[0] for line in differing_keys(RECIPE, other)] == ["weights", "steps"]
    assert "5 there, 6 now" in differing_keys(RECIPE, other)[1]


def test_foreign_torn_and_outdated_pictures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(UserError, match="no such file"):
        read_recipe(path)
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(UserError, match="carries no diffkit recipe"):
        read_recipe(path)
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt("diffkit", '{"version": "0.0.1", "prompt": "a"}')
    Image.new("RGB", (8, 8)).save(path, pnginfo=chunk)
    with pytest.raises(UserError, match=r"written by diffkit 0\.0\.1"):
        read_recipe(path)
    write_png(path, Image.effect_noise((64, 64), 50).convert("RGB"), RECIPE)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match="not a whole picture"):
        read_recipe(path)
