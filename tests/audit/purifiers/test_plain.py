"""Purifiers without a model: Pillow's own bytes, constants, noise of the right size."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffkit import randomness
from diffkit.audit.purifiers.registry import DEFAULT_PURIFIERS, PURIFIERS, parse_purifiers
from diffkit.errors import UserError

PIXELS = randomness.integers(0, 256, (3, 40, 56), "purifiers").to(torch.uint8)
PLAIN = ("identity", "jpeg75", "resize", "crop", "blur", "noise0.05")


def one(text: str):
    (purifier,) = parse_purifiers(text)
    return purifier


def constant(value: int, side: int = 32) -> torch.Tensor:
    return torch.full((3, side, side), value, dtype=torch.uint8)


@pytest.mark.parametrize("text", PLAIN)
def test_gives_another_picture_of_the_same_size_and_repeats(text):
    before = PIXELS.clone()
    found = one(text)(PIXELS, 3)
    assert found.dtype == torch.uint8 and found.shape == PIXELS.shape
    assert torch.equal(found, one(text)(PIXELS, 3))
    assert torch.equal(PIXELS, before) and found.data_ptr() != PIXELS.data_ptr()
    assert one(text).deterministic == torch.equal(found, one(text)(PIXELS, 4))
    assert torch.equal(one(text).many([PIXELS], [3])[0], found)


def test_identity_is_exact():
    assert torch.equal(one("identity")(PIXELS, 0), PIXELS)


@pytest.mark.parametrize("quality", [95, 50])
def test_jpeg_is_pillows(quality):
    file = io.BytesIO()
    Image.fromarray(PIXELS.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
    theirs = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    assert torch.equal(one(f"jpeg{quality}")(PIXELS, 0), theirs)


@pytest.mark.parametrize("text", ["resize", "resize0.3", "crop", "blur2", "identity"])
@pytest.mark.parametrize("value", [0, 77, 255])
def test_one_colour_stays(text, value):
    assert torch.equal(one(text)(constant(value), 0), constant(value))


def test_resize_takes_out_the_finest_pattern_and_keeps_a_ramp():
    board = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8).repeat(16, 16).expand(3, 32, 32)
    assert (one("resize")(board, 0).float() - 127.5).abs().max() < 3
    ramp = (8 * torch.arange(32)).to(torch.uint8).expand(3, 32, 32)
    assert (one("resize")(ramp, 0).int() - ramp.int())[..., 4:-4].abs().max() <= 1


def test_crop_enlarges_the_middle():
    """An eighth is cut per border: the middle line stays, and border pixels come from an eighth."""
    ramp = (4 * torch.arange(64)).to(torch.uint8).expand(3, 64, 64)
    found = one("crop")(ramp, 0).float()
    assert abs(found[0, 0, 0] - 32) <= 3 and abs(found[0, 0, 63] - 4 * 55) <= 3
    assert abs(found[0, 0, 31:33].mean() - 126) <= 1
    assert one("crop0.45")(constant(9, 2), 0).shape == (3, 2, 2)


def test_blur_of_white_noise_divides_its_variance():
    """A Gaussian of sigma s leaves 1 / (4 pi s^2) of white noise's variance, s = 2."""
    noise = randomness.normal((3, 128, 128), "blur") * 40 + 128
    pixels = noise.round().clamp(0, 255).to(torch.uint8)
    ratio = one("blur2")(pixels, 0).double().var() / pixels.double().var()
    assert ratio == pytest.approx(1 / (16 * torch.pi), rel=0.15)


def test_noise_is_of_its_size_and_alike_for_all_pictures():
    grey, other = constant(128, 128), constant(120, 128)
    added = one("noise0.05")(grey, 7).double() - 128
    assert added.std() == pytest.approx(255 * 0.05, rel=0.02) and abs(added.mean()) < 0.2
    assert torch.equal(added, one("noise0.05")(other, 7).double() - 120)


def test_the_list_is_read_deterministic_first():
    found = parse_purifiers("noise0.05, jpeg,resize , noise,crop")
    names = ["jpeg75", "resize0.5", "crop0.125", "noise0.05", "noise0.1"]
    assert [purifier.name for purifier in found] == names


def test_repeats_are_refused():
    with pytest.raises(UserError, match="jpeg75 is there twice"):
        parse_purifiers("jpeg75,jpeg")


def test_names_words_and_parameters_are_for_the_report():
    jpeg, noise = parse_purifiers("noise0.05,jpeg")
    assert jpeg.name == "jpeg75" and jpeg.parameters == {"quality": 75, "subsampling": "4:2:0"}
    assert noise.name == "noise0.05" and noise.parameters == {"sigma": 0.05}
    assert "0.05" in noise.words and "75" in jpeg.words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jpg75", r"--purify jpg75: unknown. Known: identity, jpeg75, resize0.5"),
        ("jpeg0", "quality must be a whole number from 1 to 100"),
        ("jpeg75.5", "whole number"),
        ("noise2", "sigma must be a number from 0.001 to 1"),
        ("noise0..1", "must be a number"),
        ("identity3", "identity takes no number"),
        ("jpeg75:model", "jpeg uses no model"),
        (" , ", "names no purifier"),
    ],
)
def test_what_is_wrong_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_purifiers(text)


def test_the_default_list_is_valid():
    assert parse_purifiers(DEFAULT_PURIFIERS)
    assert all(kind.name == name for name, kind in PURIFIERS.items())


def test_other_shapes_are_refused():
    for wrong in (PIXELS.float(), PIXELS[:1], PIXELS[None]):
        with pytest.raises(ValueError, match=r"uint8 \(3, H, W\)"):
            one("identity")(wrong, 0)
