"""Joint jobs on disk: one unit a folder, all or none, bad files named, memory running out."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffkit.errors import RunFailed, UserError
from diffkit.generation.run import Processes
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection import gradients
from diffkit.protection.companions import class_pictures, folder_digest, read_folder
from diffkit.protection.job import Job, Request, plan_job
from diffkit.protection.run import Outcome, run_job
from diffkit.protection.settings import Settings
from diffkit.protection.sidecar import read_sidecar
from diffkit.protection.worker import Worker
from tests.protection.attacks import random_pixels

Loader = Callable[[str], LatentDiffusion]

SETTINGS = Settings("ace", steps=2, rounds=2, train_steps=1, prompt="a")


def save(path: Path, pixels: torch.Tensor, alpha: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if alpha is not None:
        image.putalpha(alpha)
    image.save(path)


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, which take most of the time here, of two draws."""
    monkeypatch.setattr(gradients, "HELD_OUT", 2)


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """Two folders: one artist's with pictures of two sizes and a broken one, and another's."""
    a, b = random_pixels(2)
    save(tmp_path / "a" / "one.png", a)
    save(tmp_path / "a" / "deep" / "two.png", random_pixels(1, 16, 24)[0])
    save(tmp_path / "b" / "three.png", b)
    whole = (tmp_path / "a" / "one.png").read_bytes()
    (tmp_path / "a" / "broken.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path


def request_of(root: Path, *folders: str, **options: Any) -> Request:
    paths = tuple(root / name for name in folders)
    return Request(**({"paths": paths, "output": root / "out", "settings": SETTINGS} | options))


def done(request: Request, model: LatentDiffusion) -> tuple[Job, Outcome]:
    request.check()
    job = plan_job(request, {"name": "tiny"})
    return job, run_job(job, request, model)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def test_a_folder_is_a_unit_and_a_broken_file_is_named(tiny_model: Loader, gallery: Path) -> None:
    model, request = tiny_model("sd"), request_of(gallery, "a", "b")
    job, outcome = done(request, model)
    assert sorted(len(unit.items) for unit in job.units) == [1, 3]
    made = {path.name for path in outcome.made}
    assert made == {"one.png", "two.png", "three.png"}
    assert [Path(path).name for path in outcome.failed] == ["broken.png"]
    record = read_sidecar(gallery / "out" / "one.png")
    assert record.method == "ace" and record.surrogate_change is not None
    assert record.surrogate_change[0] > 0 and record.surrogate_change[1] == 0
    first = bytes_of(gallery / "out")
    _, again = done(request, model)
    assert again.made == () and again.kept == 3 and len(again.failed) == 1
    assert bytes_of(gallery / "out") == first


def test_a_lost_result_makes_the_folder_anew_with_the_same_bytes(
    tiny_model: Loader, gallery: Path
) -> None:
    model, request = tiny_model("sd"), request_of(gallery, "a")
    done(request, model)
    first = bytes_of(gallery / "out")
    (gallery / "out" / "one.png").unlink()
    _, outcome = done(request, model)
    assert len(outcome.made) == 2 and bytes_of(gallery / "out") == first


def test_names_do_not_matter_and_company_is_a_part_of_the_job(
    tiny_model: Loader, gallery: Path
) -> None:
    model = tiny_model("sd")
    done(request_of(gallery, "a"), model)
    (gallery / "c").mkdir()
    shutil.copy(gallery / "a" / "one.png", gallery / "c" / "z.png")
    shutil.copy(gallery / "a" / "deep" / "two.png", gallery / "c" / "a.png")
    done(request_of(gallery, "c", output=gallery / "renamed"), model)
    first = (gallery / "out" / "one.png").read_bytes()
    assert (gallery / "renamed" / "z.png").read_bytes() == first
    # a picture more is another job for all
    save(gallery / "a" / "more.png", random_pixels(3)[2])
    with pytest.raises(UserError, match="there already, but not made from these pictures"):
        plan_job(request_of(gallery, "a"), {"name": "tiny"})


def test_what_a_surrogate_learns_from_is_a_part_of_the_job(gallery: Path) -> None:
    def digest(**options: Any) -> str:
        settings = dataclasses.replace(SETTINGS, **options.pop("settings", {}))
        request = request_of(gallery, "b", settings=settings, **options)
        return plan_job(request, {"name": "tiny"}).items[0].parameters

    plain = digest()
    assert digest(settings={"train_steps": 2}) != plain
    assert digest(settings={"rounds": 1}) != plain
    aspl = {"method": "aspl", "rounds": None}
    assert digest(settings=aspl, clean=gallery / "a") != digest(settings=aspl)
    named = {"class_prompt": "b"}
    given = digest(settings=named, class_images=gallery / "b")
    assert len({plain, given, digest(settings=named)}) == 3
    assert given != digest(settings=named, class_images=gallery / "a")
    # what is said and what is left to the method are one
    usual = Settings("ace", prompt="a")
    spelt = Settings("ace", prompt="a", rounds=5, train_steps=5, steps=250)
    one, two = (
        plan_job(request_of(gallery, "b", settings=s), {"name": "tiny"}).items[0].parameters
        for s in (usual, spelt)
    )
    assert one == two


def test_running_out_of_memory_begins_the_set_again_with_less(
    tiny_model: Loader, gallery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pictures of a set end the same way: nothing of the failed attempt is kept."""
    model, request = tiny_model("sd"), request_of(gallery, "a", batch_size=2)
    tries: list[tuple[bool, int]] = []
    attack = Worker._attack_set

    def scarce(worker: Worker, rows: Any) -> Any:
        tries.append((worker.effort.lean, worker.effort.batch_size))
        if len(tries) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return attack(worker, rows)

    monkeypatch.setattr(Worker, "_attack_set", scarce)
    _, outcome = done(request, model)
    assert tries == [(False, 2), (True, 2), (True, 1)]
    assert len(outcome.made) == 2

    def never(worker: Worker, rows: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Worker, "_attack_set", never)
    _, outcome = done(request_of(gallery, "b", output=gallery / "none"), model)
    assert outcome.made == () and "out of memory" in next(iter(outcome.failed.values()))


def test_a_failure_of_the_set_leaves_no_part_of_it(
    tiny_model: Loader, gallery: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(worker: Worker, rows: Any) -> Any:
        raise RunFailed("the surrogate's loss was not finite")

    monkeypatch.setattr(Worker, "_attack_set", fails)
    _, outcome = done(request_of(gallery, "a"), tiny_model("sd"))
    assert len(outcome.failed) == 3 and not bytes_of(gallery / "out")


def test_folders_of_further_pictures(gallery: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken ones are named; transparent ones are on white; names do not enter the digest."""
    save(gallery / "more" / "clear.png", torch.zeros(3, 4, 5, dtype=torch.uint8), alpha=0)
    save(gallery / "more" / "solid.png", torch.zeros(3, 4, 5, dtype=torch.uint8), alpha=255)
    shutil.copy(gallery / "a" / "broken.png", gallery / "more" / "broken.png")
    clear, solid = read_folder(gallery / "more", gallery / "out", "--clean")
    assert clear.shape == (3, 4, 5) and int(clear.min()) == 255 and int(solid.max()) == 0
    assert "--clean: " in (said := capsys.readouterr().err) and "broken.png" in said
    before = folder_digest(gallery / "more", gallery / "out")
    (gallery / "more" / "clear.png").rename(gallery / "more" / "renamed.png")
    assert folder_digest(gallery / "more", gallery / "out") == before
    (gallery / "more" / "solid.png").unlink()
    assert folder_digest(gallery / "more", gallery / "out") != before
    (gallery / "empty").mkdir()
    with pytest.raises(UserError, match="--clean .*empty: has no picture"):
        read_folder(gallery / "empty", gallery / "out", "--clean")


def test_class_pictures_are_made_once(
    tiny_model: Loader, gallery: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny_model("sd"), gallery / "out"
    settings = dataclasses.replace(SETTINGS, class_prompt="b", class_count=3, prior_weight=1.0)
    made = class_pictures(settings, model, None, out, Processes())
    assert made is not None and len(made) == 3 and made[0].shape == (3, 32, 32)
    assert not torch.equal(made[0], made[1])
    (folder,) = out.iterdir()
    assert folder.name.startswith(".class-pictures-")
    stamps = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    again = class_pictures(settings, model, None, out, Processes())
    assert again is not None and all(map(torch.equal, made, again))
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())] == stamps
    with Image.open(sorted(folder.iterdir())[0]) as image:
        assert np.asarray(image).shape == (32, 32, 3)
    # on a CPU they are used only when their weight is given, and that is said
    unweighted = dataclasses.replace(settings, prior_weight=None)
    capsys.readouterr()
    assert class_pictures(unweighted, model, None, out, Processes()) is None
    assert "--prior-weight 1 uses them all the same" in capsys.readouterr().err


def test_requests_that_make_no_sense(gallery: Path) -> None:
    def refused(match: str, settings: Settings = SETTINGS, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            request_of(gallery, "a", settings=settings, **options).check()

    named = dataclasses.replace(SETTINGS, class_prompt="b")
    refused("--clean: does nothing for the method ace", clean=gallery / "b")
    refused("--class-images: say what they show", class_images=gallery / "b")
    refused("--class-images .*nowhere: no such folder", named, class_images=gallery / "nowhere")
    counted = dataclasses.replace(named, class_count=3)
    refused("no class pictures are made where", counted, class_images=gallery / "b")
    refused("lower --strength instead", max_lpips=0.1)
