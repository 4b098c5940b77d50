"""Planning: which pictures in which units, what is done already, and what makes a job another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffkit.errors import UserError
from diffkit.protection.image_file import encode_picture, open_picture
from diffkit.protection.job import Item, Request, plan_job
from diffkit.protection.settings import Settings
from diffkit.protection.sidecar import Sidecar, publish
from tests.protection.gallery import encoded, noise

MODEL: dict[str, Any] = {"names": ["tiny"], "weights": ["0"], "dtype": "fp32"}


@pytest.fixture
def request_of(tmp_path: Path) -> Request:
    """Folders x and y of two pictures each."""
    for index, name in enumerate(("x/a.png", "x/b.png", "y/c.png", "y/deep/d.png")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(Image.fromarray(noise(index, 8)), "PNG"))
    return Request((tmp_path / "x", tmp_path / "y"), tmp_path / "out", Settings("texture"))


def finish(item: Item) -> None:
    """The picture's result and record, as a run leaves them."""
    picture = open_picture(item.source.path)
    result = encode_picture(picture, picture.pixels)
    known = {"input_sha256": item.digest, "parameter_sha256": item.parameters}
    blank = dict.fromkeys(("model", "model_revision", "target", "prompt"))
    zero = dict.fromkeys(("levels", "steps", "seed", "views", "max_delta", "mean_delta"), 0)
    record = Sidecar(
        "texture", output_sha256=result.digest, working_sizes=(), **known, **blank, **zero
    )
    item.output.parent.mkdir(parents=True, exist_ok=True)
    publish(item.output, result.data, record)


def keys(request: Request, model: dict[str, Any] = MODEL) -> list[str]:
    return [item.parameters for item in plan_job(request, model).items]


def test_a_file_is_a_unit_and_a_folder_is_one_where_a_surrogate_is_trained(
    request_of: Request,
) -> None:
    job = plan_job(request_of, MODEL)
    assert [len(unit.items) for unit in job.units] == [1, 1, 1, 1]
    joint = plan_job(replace(request_of, settings=Settings("ace")), MODEL)
    assert [len(unit.items) for unit in joint.units] == [2, 2]
    for unit in joint.units:
        digests = [item.digest for item in unit.items]
        assert digests == sorted(digests)
        assert len({item.source.root for item in unit.items}) == 1


def test_what_is_done_is_not_pending(request_of: Request) -> None:
    job = plan_job(request_of, MODEL)
    finish(job.items[1])
    again = plan_job(request_of, MODEL)
    assert [item.done for item in again.items] == [False, True, False, False]
    assert len(again.pending) == 3
    # A set with one picture missing is not done.
    joint = replace(request_of, settings=Settings("ace"), output=request_of.output / "joint")
    finish(plan_job(joint, MODEL).items[0])
    assert len(plan_job(joint, MODEL).pending) == 2


def test_a_strangers_picture_is_never_replaced(request_of: Request) -> None:
    """--overwrite replaced whatever was there: protecting IMG.jpg into its own folder destroyed the
    artist's IMG.png beside it."""
    item = plan_job(request_of, MODEL).items[0]
    item.output.parent.mkdir(parents=True, exist_ok=True)
    item.output.write_bytes(b"not ours")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=item.output.name):
            plan_job(replace(request_of, overwrite=overwrite), MODEL)
    item.output.unlink()
    finish(item)
    other = replace(request_of, overwrite=True, settings=replace(request_of.settings, seed=5))
    assert len(plan_job(other, MODEL).pending) == 4


def test_a_name_without_room_for_a_record_is_skipped(request_of: Request) -> None:
    """The picture was written and its record could not be; every later run ended in a traceback."""
    long = request_of.paths[0] / ("\N{CJK UNIFIED IDEOGRAPH-753B}" * 83 + ".png")  # 253 bytes
    long.write_bytes(encoded(Image.fromarray(noise(9, 8)), "PNG"))
    job = plan_job(request_of, MODEL)
    assert long not in [item.source.path for item in job.items]
    (skipped,) = [one for one in job.skipped if one.path == long]
    assert "shorten it by 3 bytes" in skipped.reason


def test_an_added_picture_makes_another_set(request_of: Request) -> None:
    """Pictures of a set are protected together, so all that were done belong to another job."""
    joint = replace(request_of, settings=Settings("ace"))
    for item in plan_job(joint, MODEL).items:
        finish(item)
    assert plan_job(joint, MODEL).pending == []
    more = request_of.paths[0] / "more.png"
    more.write_bytes(encoded(Image.fromarray(noise(9, 8)), "PNG"))
    with pytest.raises(UserError, match=r"a\.png, .*b\.png: there already"):
        plan_job(joint, MODEL)
    allowed = plan_job(replace(joint, overwrite=True), MODEL)
    assert [len(unit.items) for unit in allowed.pending] == [3]  # the other folder stays done


def test_every_choice_makes_another_job_and_names_do_not(
    request_of: Request, tmp_path: Path
) -> None:
    base = keys(request_of)
    assert len(set(base)) == 1
    mask, other = tmp_path / "mask.png", tmp_path / "other.png"
    for path, shade in ((mask, 255), (other, 254)):
        path.write_bytes(encoded(Image.new("L", (8, 8), shade), "PNG"))
    settings = request_of.settings
    changed = [
        replace(request_of, settings=replace(settings, **{name: value}))
        for name, value in {
            "method": "photoguard", "levels": 9, "steps": 7, "step_levels": 0.5,
            "target": "checker", "seed": 1, "momentum": 1.0, "random_start": False,
            "contrast": True, "views": 2,
        }.items()
    ]  # fmt: skip
    changed += [replace(request_of, mask=mask), replace(request_of, mask=other)]
    changed += [replace(request_of, keep_jpeg=True), replace(request_of, max_lpips=0.1)]
    found = [keys(request)[0] for request in changed]
    found += [keys(request_of, MODEL | {"weights": ["1"]})[0], base[0]]
    assert len(set(found)) == len(found)
    # The default said aloud, memory and batches change no bytes.
    for same in (
        replace(request_of, settings=replace(settings, levels=8, steps=100)),
        replace(request_of, batch_size=4, lean=True),
    ):
        assert keys(same) == base


def test_defaults_of_another_device_make_another_job(request_of: Request) -> None:
    """Views and the weight of class pictures follow the device where nobody says; results of a CPU
    were taken for done on a GPU, which would have made others."""
    named = Settings("ace", class_prompt="a painting")
    for settings in (Settings("texture"), named):
        request = replace(request_of, settings=settings)
        assert digests(request, True) != digests(request, False)
    for same in (
        replace(request_of, settings=Settings("texture", views=2)),
        replace(request_of, settings=Settings("advdm")),
        replace(request_of, settings=replace(named, prior_weight=0.5)),
    ):
        assert digests(same, True) == digests(same, False)


def digests(request: Request, on_cpu: bool) -> list[str]:
    return [item.parameters for item in plan_job(request, MODEL, on_cpu).items]


def test_masks_of_a_folder_go_by_stem(request_of: Request, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for stem in "abc":
        (masks / f"{stem}.bmp").write_bytes(encoded(Image.new("L", (8, 8)), "BMP"))
    request = replace(request_of, mask=masks)
    with pytest.raises(UserError, match="has no mask named d"):
        plan_job(request, MODEL)
    (masks / "d.png").write_bytes(encoded(Image.new("L", (8, 8)), "PNG"))
    found = [item.mask for item in plan_job(request, MODEL).items]
    assert [None if mask is None else mask.name for mask in found] == [
        "a.bmp", "b.bmp", "c.bmp", "d.png",
    ]  # fmt: skip
    (masks / "a.png").write_bytes(encoded(Image.new("L", (8, 8)), "PNG"))
    with pytest.raises(UserError, match=r"a\.bmp and a\.png have one stem"):
        plan_job(request, MODEL)


def test_only_looking_writes_nothing(request_of: Request) -> None:
    job = plan_job(request_of, None)
    assert len(job.pending) == 4 and not request_of.output.exists()
    finish(job.items[0])
    assert len(plan_job(request_of, None).pending) == 4  # nobody knows without the weights
