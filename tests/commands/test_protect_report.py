"""What --report puts on record and what --preview shows, on a tiny model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffkit.commands.protect_report import SEEDS, effect_of, preview_of
from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.image_file import encode_picture, open_picture
from diffkit.protection.job import Item, Request, plan_job
from diffkit.protection.pgd import random_noise
from diffkit.protection.record import Finished
from diffkit.protection.settings import Settings
from tests.audit.pictures import build_inpainting, pixels, protected, save


@pytest.fixture(scope="module")
def model(tiny_sd: Path) -> LatentDiffusion:
    return LatentDiffusion.load(tiny_sd)


def finished(root: Path, name: str = "x.png", same: bool = False) -> tuple[Request, Finished]:
    """A picture of a folder whose result is about to be written."""
    save(root / "in" / name, pixels())
    settings = Settings("advdm", levels=8, steps=1, prompt="a b")
    request = Request((root / "in",), root / "out", settings, lpips="alex:/nowhere.pth")
    item: Item = plan_job(request, {}).items[0]
    picture = open_picture(item.source.path)
    changed = picture.pixels if same else protected(picture.pixels)
    encoded = encode_picture(picture, changed)
    control = random_noise(picture.pixels[None], 8, [5])[0]
    return request, Finished(item, picture, encoded, {}, control)


def test_the_effect_of_a_picture_on_itself_is_exactly_nothing(
    tmp_path: Path, model: LatentDiffusion
) -> None:
    request, done = finished(tmp_path, same=True)
    found: Any = effect_of(model, request, None)(done)
    assert found.keys() == {"effect"}
    entry = found["effect"]["sdedit"]
    assert entry["prompt"] == "a b" and entry["seeds"] == SEEDS == 8
    assert "lpips" in entry["not_measured"]
    for name, row in entry["numbers"].items():
        if name != "psnr":
            assert row["effect"]["protected"] == {"value": 0.0, "low": 0.0, "high": 0.0}
            assert row["clear"] is False
    assert entry["numbers"]["latent_l2"]["effect"]["random"]["value"] > 0


@pytest.mark.slow
def test_retention_is_on_record_beside_the_control(tmp_path: Path, model: LatentDiffusion) -> None:
    request, done = finished(tmp_path)
    found: Any = effect_of(model, request, "identity,noise0.1")(done)
    left = found["purification"]
    assert list(left) == ["identity", "noise0.1"]
    assert left["identity"]["latent_l2"]["random"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    # noise against noise: the effect is not clear of the control, so no share of it is told
    assert left["noise0.1"]["latent_l2"]["protected"] is None
    assert "psnr" not in left["identity"]


def test_an_unknown_purifier_is_refused_before_the_first_picture(
    tmp_path: Path, model: LatentDiffusion
) -> None:
    request, _ = finished(tmp_path)
    with pytest.raises(UserError, match="unknown. Known: identity"):
        effect_of(model, request, "wash")


@pytest.mark.parametrize(("name", "shown"), [("x.png", "x.png"), ("y.bmp", "y.bmp.png")])
def test_a_preview_shows_before_after_the_difference_and_two_edits(
    name: str, shown: str, tmp_path: Path, model: LatentDiffusion
) -> None:
    request, done = finished(tmp_path, f"deep/{name}")
    assert preview_of(model, request)(done) == {}
    place = tmp_path / "out" / "previews" / "deep"
    assert [path.name for path in place.iterdir()] == [shown]
    strip = np.array(Image.open(place / shown))
    assert strip.shape == (32, 5 * 36 - 4, 3)
    panels = [torch.from_numpy(strip[:, 36 * i : 36 * i + 32]).permute(2, 0, 1) for i in range(5)]
    assert torch.equal(panels[0], done.picture.pixels)
    assert torch.equal(panels[1], done.encoded.pixels)
    delta = done.encoded.pixels.int() - done.picture.pixels.int()
    assert torch.equal(panels[2].int(), (128 + 8 * delta).clamp(0, 255))
    assert not torch.equal(panels[3], panels[4])
    first = hashlib.sha256(strip.tobytes()).hexdigest()
    preview_of(model, request)(done)
    assert hashlib.sha256(np.array(Image.open(place / shown)).tobytes()).hexdigest() == first


def test_edits_of_equal_pictures_are_equal_in_a_preview(
    tmp_path: Path, model: LatentDiffusion
) -> None:
    request, done = finished(tmp_path, same=True)
    preview_of(model, request)(done)
    strip = np.array(Image.open(tmp_path / "out" / "previews" / "x.png"))
    assert np.array_equal(strip[:, 108:140], strip[:, 144:176])
    assert (strip[:, 72:104] == 128).all()


def test_a_model_that_only_inpaints_is_refused_before_the_attack(tmp_path: Path) -> None:
    """protect --method diffusionguard --report crashed behind the attack of the first picture."""
    request, _ = finished(tmp_path)
    model = LatentDiffusion.load(build_inpainting(tmp_path / "model"))
    with pytest.raises(UserError, match="--report: edits by SDEdit, which this model cannot") as e:
        effect_of(model, request, None)
    assert "diffkit audit --threats inpaint --mask" in str(e.value)
    with pytest.raises(UserError, match="--preview: edits by SDEdit"):
        preview_of(model, request)


@pytest.mark.slow
def test_reports_of_other_seeds_share_no_noise(tmp_path: Path, model: LatentDiffusion) -> None:
    """Every report used the noises 0 to 7, whatever --seed said."""
    request, done = finished(tmp_path)
    other = dataclasses.replace(request, settings=dataclasses.replace(request.settings, seed=1))
    rows: Any = [effect_of(model, asked, None)(done) for asked in (request, request, other)]
    found = [row["effect"]["sdedit"]["numbers"]["latent_l2"]["effect"]["random"] for row in rows]
    assert found[0] == found[1] != found[2]


def test_lists_of_purifiers_are_those_of_audits(tmp_path: Path, model: LatentDiffusion) -> None:
    """The help says "as in diffkit audit", and the words none and default were unknown here."""
    request, done = finished(tmp_path)
    assert "purification" not in effect_of(model, request, "none")(done)


def test_models_of_classes_edit_with_their_null_class(
    tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    """They were asked for "a picture", which names none of their classes, and the run ended."""
    request, done = finished(tmp_path)
    unprompted = dataclasses.replace(request, settings=Settings("texture", levels=8, steps=1))
    preview_of(LatentDiffusion.load(tiny_folder("dit")), unprompted)(done)
    assert list((tmp_path / "out" / "previews").iterdir())
