"""`diffkit protect` from end to end on tiny models: what it writes, says, resumes and refuses."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from signal import SIGINT

import numpy as np
import pytest
import torch
from PIL import Image

from diffkit.cli import main
from diffkit.commands.protect import ProtectConfig
from diffkit.commands.protect import _settings as settings_of
from diffkit.commands.protect import _t_range as range_of
from diffkit.errors import UserError
from diffkit.protection.image_file import open_picture
from diffkit.protection.sidecar import read_sidecar, sidecar_path
from tests.protection.gallery import encoded, exif_block, make_gallery, noise

Protect = Callable[..., int]


@pytest.fixture
def protect(tiny_sd: Path, tmp_path: Path) -> Protect:
    """The exit code of one command into `out`, on a CPU, in two steps."""

    def run(*words: object, steps: int = 2) -> int:
        flags = [] if "random" in words else ["--model", tiny_sd, "--steps", steps]
        # The last of two equal flags wins.
        flags = ["--device", "cpu", "--output", tmp_path / "out", *flags]
        return main(["protect", *map(str, (*flags, *words))])

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two pictures of 32 pixels, a.png and b.png."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, name in enumerate(("a.png", "b.png")):
        (folder / name).write_bytes(encoded(Image.fromarray(noise(index, 32)), "PNG"))
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: when it was written, and its bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (_, data) in snapshot(folder).items()}


def test_every_kind_of_picture_keeps_what_it_is(
    tmp_path: Path, protect: Protect, capsys: pytest.CaptureFixture[str]
) -> None:
    """All kinds of the gallery once: size, alpha and budget hold, and each bad file is named."""
    gallery = make_gallery(tmp_path / "in", 27)
    before = contents(gallery.root)
    assert protect(gallery.root, "--strength", "5", "--method", "texture", steps=1) == 1
    assert contents(gallery.root) == before
    said = capsys.readouterr().err
    records = sorted(path for path in (tmp_path / "out").rglob("*.json"))
    assert len(records) == len(gallery.good)
    by_digest = {open_picture(path).digest: open_picture(path) for path in gallery.good}
    assert len(by_digest) == len(gallery.good)
    for path in records:
        output = path.with_suffix("")
        record, after = read_sidecar(output), open_picture(output)
        clean = by_digest.pop(record.input_sha256)
        change = (after.pixels.int() - clean.pixels.int()).abs()
        assert after.digest == record.output_sha256
        assert int(change.max()) == record.max_delta <= 5
        assert after.metadata.icc == clean.metadata.icc
        if clean.alpha is not None:
            assert after.alpha is not None and torch.equal(after.alpha, clean.alpha)
            hidden = (clean.alpha == 0).expand_as(change)
            assert not change[hidden].any()
    for path, reason in gallery.bad.items():
        lines = [line for line in said.splitlines() if f" {path}: " in line]
        assert lines and all(reason in line for line in lines)
    assert f"{len(gallery.good)} pictures protected" in said


def test_two_runs_are_one(
    protect: Protect, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second does nothing, an added picture is all that a third does, others are refused."""
    assert protect(photos) == 0
    first = snapshot(tmp_path / "out")
    assert protect(photos) == 0
    assert snapshot(tmp_path / "out") == first
    assert "0 pictures protected" in capsys.readouterr().err
    (photos / "c.png").write_bytes(encoded(Image.fromarray(noise(7, 32)), "PNG"))
    assert protect(photos) == 0
    third = snapshot(tmp_path / "out")
    assert {name: third[name] for name in first} == first
    assert set(third) - set(first) == {"c.png", "c.png.json"}
    assert protect(photos, "--strength", "low") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert snapshot(tmp_path / "out") == third
    assert protect(photos, "--strength", "low", "--overwrite") == 0
    assert read_sidecar(tmp_path / "out" / "a.png").levels == 4


def test_what_is_said_before_and_after(
    protect: Protect, photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert protect(photos, steps=12) == 0
    said = capsys.readouterr()
    assert said.out == ""
    before, _, after = said.err.partition("estimate: ")
    assert before.startswith("method: texture (pull the encoding to a pattern), chosen for a CPU")
    for sentence in ("does not make them impossible", "no copyright protection", "not measured"):
        assert sentence in before
    record = read_sidecar(tmp_path / "out" / "a.png")
    assert record.effect is not None and record.psnr is not None
    assert len(record.model_weights) == 1  # by which an audit knows the model under another name
    assert 29 < record.effect["random_control"]["psnr"] < 31  # 20 log10(255 / 8) = 30.07
    assert "2 pictures protected" in after and "random noise of equal budget: PSNR 30" in after
    assert "times as much as under random noise" in after
    assert "Left after purification: not measured" in after
    assert after.rstrip().endswith("take one that is not clearly above it for none.")


def test_the_embedded_model_protects_nothing_real(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["protect", str(photos), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert capsys.readouterr().err.startswith("This run protects nothing real")


def test_a_dry_run_only_looks(
    protect: Protect, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even the output folder is made; leftovers of a killed run stay."""
    assert protect(photos, "--dry-run", "--json", "--method", "sds-") == 0
    found = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    assert (found["pictures"], found["method"], found["levels"], found["steps"]) == (
        2,
        "sds-",
        8,
        2,
    )
    assert found["flops"] > 0 and found["memory_bytes"] > 0 and found["seconds"] > 0
    assert protect(photos) == 0
    leftover = tmp_path / "out" / ".partial-old"
    leftover.touch()
    os.utime(leftover, (0, 0))
    before = snapshot(tmp_path / "out")
    assert protect(photos, "--dry-run", "--strength", "high") == 0
    assert snapshot(tmp_path / "out") == before
    assert "2 results are there already" in capsys.readouterr().err


def test_json_is_all_of_stdout(
    protect: Protect, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (photos / "notes.txt").write_text("no picture")
    assert protect(photos, "--json") == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert said.err == ""
    assert (found["made"], found["kept"], found["failed"]) == (["a.png", "b.png"], 0, {})
    assert {Path(path).name for path in found["skipped"]} == {"broken.png", "notes.txt"}
    assert found["measured"]["pictures"] == 2 and found["measured"]["purification"] is None
    assert any("impossible" in line for line in found["notices"])


def test_previews_replace_no_result(
    protect: Protect, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder "previews" among the pictures: the preview of a.png would be previews/a.png."""
    (photos / "previews").mkdir()
    (photos / "a.png").rename(photos / "previews" / "a.png")
    assert protect(photos, "--preview") == 2
    assert "--preview: writes into" in capsys.readouterr().err


def test_what_is_no_picture_fails_nothing(
    protect: Protect, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Notes, links and hidden files lie in many folders; they are no failure."""
    (photos / "notes.txt").write_text("no picture")
    (photos / "link.png").symlink_to(photos / "a.png")
    (photos / ".hidden.png").write_bytes(b"")
    assert protect(photos, "--method", "random") == 0
    said = capsys.readouterr().err
    assert "notes.txt: no picture" in said and "link.png: a symbolic link" in said
    assert "hidden" not in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--method", "magic"], "method 'magic': unknown"),
        (["--strength", "0"], "--strength 0: give low, medium, high"),
        (["--strength", "33"], "from 1 to 32"),
        (["--strength", "²"], "from 1 to 32"),
        (["--strength", "7.65"], "whole number"),
        (["--purify", "jpeg75"], "--purify: needs --report"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--prompt", "a cat", "--method", "texture"], "--prompt: does nothing"),
        (["--method", "pid", "--random-start", "False"], "--random-start: pid needs it"),
        (["--method", "diffusionguard"], "needs an inpainting model"),
        (["--method", "sds-", "--tiles"], "--tiles: does nothing"),
        (["--mask", "nowhere.png"], "no such file or folder"),
        (["--max-lpips", "0"], "must be above 0"),
        (["--method", "ace", "--max-lpips", "0.1"], "--max-lpips: ace"),
        (["--target", "nowhere.png"], "is no file"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--preview", "--method", "random", "--steps", "2"], "does nothing for the method random"),
    ],
)
def test_bad_arguments_stop_before_anything_is_written(
    protect: Protect,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    complaint: str,
) -> None:
    assert protect(photos, *words) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_originals_are_out_of_reach(
    photos: Path, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(photos)
    for output in (photos, photos / "deeper"):
        words = ["protect", str(photos), "--output", str(output), "--model", str(tiny_sd)]
        assert main(words) == 2
        assert "the input folder" in capsys.readouterr().err
    assert main(["protect", str(photos / "absent.png"), "--model", str(tiny_sd)]) == 2
    assert contents(photos) == before


@pytest.mark.parametrize(("name", "levels"), [("low", 4), ("medium", 8), ("high", 16), ("3", 3)])
def test_strengths(protect: Protect, photos: Path, tmp_path: Path, name: str, levels: int) -> None:
    assert protect(photos / "a.png", "--strength", name, "--method", "random") == 0
    after, clean = open_picture(tmp_path / "out" / "a.png"), open_picture(photos / "a.png")
    assert read_sidecar(tmp_path / "out" / "a.png").levels == levels
    assert int((after.pixels.int() - clean.pixels.int()).abs().max()) == levels


def test_the_edit_attack_keeps_its_own_budget() -> None:
    """A default of "medium" for all methods halved the 16 levels of PhotoGuard's strong one."""
    config = ProtectConfig((Path("a.png"),), method="photoguard-diffusion")
    assert settings_of(config, "cpu").rule().levels == 16
    assert settings_of(replace(config, method="auto"), "cpu").rule().levels == 8
    assert settings_of(replace(config, method="auto"), "cuda").method == "sdst-"


def test_a_mask_leaves_the_rest_alone(
    protect: Protect, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = np.zeros((8, 8), dtype=np.uint8)
    half[:, 4:] = 255
    Image.fromarray(half).save(tmp_path / "mask.png")
    assert protect(photos, "--mask", tmp_path / "mask.png") == 0
    for name in ("a.png", "b.png"):
        clean, after = (
            np.asarray(Image.open(place / name)) for place in (photos, tmp_path / "out")
        )
        assert (clean[:, :16] == after[:, :16]).all()
        assert (clean[:, 16:] != after[:, 16:]).mean() > 0.9
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.fromarray(half).save(masks / "a.png")
    assert protect(photos, "--mask", masks, "--overwrite") == 2
    assert "has no mask named b" in capsys.readouterr().err
    (masks / "b.png").write_bytes(b"broken")
    assert protect(photos, "--mask", masks, "--overwrite") == 1
    assert "its mask" in capsys.readouterr().err
    assert open_picture(tmp_path / "out" / "a.png").digest  # the other one was done


def test_jpeg_becomes_png_or_stays(protect: Protect, tmp_path: Path) -> None:
    """A JPEG that stays one is measured as it decodes; its change may exceed the budget."""
    picture = Image.fromarray(noise(3, 32, wide=True))
    source = tmp_path / "turned.jpg"
    source.write_bytes(encoded(picture, "JPEG", quality=90, exif=exif_block(6)))
    assert protect(source) == 0
    with Image.open(tmp_path / "out" / "turned.png") as image:
        assert image.size == (32, 48) and image.getexif()[0x0112] == 1
    assert protect(source, "--keep-jpeg") == 0
    record = read_sidecar(tmp_path / "out" / "turned.jpg")
    clean, after = open_picture(source), open_picture(tmp_path / "out" / "turned.jpg")
    change = (after.pixels.int() - clean.pixels.int()).abs()
    assert record.max_delta == int(change.max())
    assert record.mean_delta == pytest.approx(float(change.float().mean()))
    assert any("JPEG again" in notice for notice in record.notices)


def interrupt_after(output: Path) -> threading.Thread:
    """Ctrl-C, as soon as one picture is finished."""

    def wait() -> None:
        while not any(output.glob("*.json")):
            time.sleep(0.002)
        os.kill(os.getpid(), SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_interrupted_leaves_whole_files(
    protect: Protect, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(8):
        (folder / f"{index}.png").write_bytes(encoded(Image.fromarray(noise(index, 32)), "PNG"))
    thread = interrupt_after(tmp_path / "out")
    assert protect(folder, steps=5) == 130
    thread.join()
    assert "interrupted; what was finished is kept" in capsys.readouterr().err
    done = snapshot(tmp_path / "out")
    assert 2 <= len(done) < 16
    for name in done:
        path = tmp_path / "out" / name
        if path.suffix == ".png" and sidecar_path(path).exists():
            assert read_sidecar(path).output_sha256 == open_picture(path).digest
        assert not name.startswith(".partial")
    assert protect(folder, steps=5) == 0
    after = snapshot(tmp_path / "out")
    whole = {name for name in done if f"{name}.json" in done}
    assert {name: after[name] for name in whole} == {name: done[name] for name in whole}
    os.rename(tmp_path / "out", tmp_path / "first")
    assert protect(folder, steps=5) == 0
    first = contents(tmp_path / "first")
    # The marker of a picture that was finished in that very moment may stay for ten minutes.
    markers = {name for name in first if name.endswith(".diffkit-part")}
    assert contents(tmp_path / "out") == {n: first[n] for n in first.keys() - markers}


def test_a_range_of_times_by_numbers_or_by_its_word() -> None:
    assert range_of(None) is None
    assert range_of("high") == (0.6, 1.0)
    assert range_of("0.2-0.5") == (0.2, 0.5)
    for text in ("low", "0.5", "a-b"):
        with pytest.raises(UserError, match="LO-HI"):
            range_of(text)
