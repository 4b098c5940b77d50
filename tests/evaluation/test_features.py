"""Features on disk: resumed after a kill, and never kept for pictures that are gone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffkit.assets import path

from diffkit.errors import UserError
from diffkit.evaluation.extractors import Extractor, load_extractor
from diffkit.evaluation.features import stream_features
from diffkit.evaluation.pictures import PictureSet

BATCH = 8

SLOW = """
import dataclasses, sys, time
from diffkit.evaluation.extractors import load_extractor
from diffkit.evaluation.features import stream_features
from diffkit.evaluation.pictures import PictureSet

fast = load_extractor()
def encode(images):
    time.sleep(0.1)
    return fast.encode(images)
slow = dataclasses.replace(fast, encode=encode)
stream_features(PictureSet.open(sys.argv[1]), slow, sys.argv[2], 8)
"""


class Counted:
    """An extractor that counts the pictures that it was given."""

    def __init__(self, extractor: Extractor) -> None:
        self.seen = 0

        def encode(images: torch.Tensor) -> torch.Tensor:
            self.seen += len(images)
            return extractor.encode(images)

        self.extractor = dataclasses.replace(extractor, encode=encode)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load_extractor()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 pictures without metadata, so that files may come and go."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for source in sorted(path("sample").glob("*.png"))[:40]:
        shutil.copy2(source, folder)
    return folder


def counted(folder: Path, extractor: Extractor, file: Path) -> tuple[np.ndarray, int]:
    """The features, and how many pictures had to be looked at for them."""
    count = Counted(extractor)
    found = stream_features(PictureSet.open(folder), count.extractor, file, BATCH)
    return np.array(found), count.seen


def test_rows_are_those_of_the_network(folder, extractor, tmp_path):
    pictures = PictureSet.open(folder)
    found = stream_features(pictures, extractor, tmp_path / "a.f32", BATCH)
    assert found.shape == (40, extractor.dim) and found.dtype == np.float32
    whole = torch.cat([extractor(batch.images) for batch in pictures.batches(40)])
    np.testing.assert_allclose(found, whole, atol=1e-5)
    again, seen = counted(folder, extractor, tmp_path / "a.f32")
    assert seen == 0 and np.array_equal(again, found)


def test_a_killed_run_resumes(folder, extractor, tmp_path):
    """kill -9 in the middle: what follows is bit for bit the uninterrupted file."""
    whole, _ = counted(folder, extractor, tmp_path / "whole.f32")
    file, log = tmp_path / "killed.f32", tmp_path / "killed.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", SLOW, folder, file], env=environment)
    end = time.monotonic() + 60
    while not log.is_file() or log.read_text().count("\n") < 3:
        assert child.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    lost = 40 - BATCH * (log.read_text().count("\n") - 1)
    assert lost > 0
    resumed, seen = counted(folder, extractor, file)
    assert seen == lost and np.array_equal(resumed, whole)
    assert file.read_bytes() == (tmp_path / "whole.f32").read_bytes()


def cut_rows(file: Path) -> None:
    os.truncate(file, 17 * 192 * 4 + 3)


def cut_log(file: Path) -> None:
    log = file.with_suffix(".jsonl")
    text = log.read_text()
    log.write_text(text[: text.index("\n", len(text) // 2) + 10])


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[20 * 192 * 4] ^= 1
    file.write_bytes(data)


def too_long(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def no_log(file: Path) -> None:
    file.with_suffix(".jsonl").unlink()


def garbage_log(file: Path) -> None:
    log = file.with_suffix(".jsonl")
    log.write_text("garbage\n" + log.read_text())


@pytest.mark.parametrize(
    ("damage", "redone"),
    [
        (cut_rows, 24),
        (cut_log, 16),
        (flip_a_byte, 24),
        (too_long, 0),
        (no_log, 40),
        (garbage_log, 40),
    ],
)
def test_a_half_written_file_is_noticed(damage, redone, folder, extractor, tmp_path):
    whole, _ = counted(folder, extractor, tmp_path / "a.f32")
    damage(tmp_path / "a.f32")
    mended, seen = counted(folder, extractor, tmp_path / "a.f32")
    assert seen == redone and np.array_equal(mended, whole)
    assert counted(folder, extractor, tmp_path / "a.f32")[1] == 0


def test_changed_pictures_are_done_again(folder, extractor, tmp_path):
    whole, _ = counted(folder, extractor, tmp_path / "a.f32")
    names = PictureSet.open(folder).names
    shutil.copy(folder / names[0], folder / names[20])
    found, seen = counted(folder, extractor, tmp_path / "a.f32")
    assert seen == 24 and np.array_equal(found[:16], whole[:16])
    np.testing.assert_allclose(found[20], whole[0], atol=1e-5)


def test_pictures_come_and_go(folder, extractor, tmp_path):
    whole, _ = counted(folder, extractor, tmp_path / "a.f32")
    names = PictureSet.open(folder).names
    (folder / names[10]).unlink()
    found, seen = counted(folder, extractor, tmp_path / "a.f32")
    assert found.shape[0] == 39 and seen == 31
    np.testing.assert_allclose(found[10:], whole[11:], atol=1e-5)
    shutil.copy(folder / names[0], folder / "zzz.png")
    found, seen = counted(folder, extractor, tmp_path / "a.f32")
    assert found.shape[0] == 40 and seen == 1


def test_another_network_starts_anew(folder, extractor, tmp_path):
    counted(folder, extractor, tmp_path / "a.f32")
    other = dataclasses.replace(extractor, key="other weights")
    assert counted(folder, other, tmp_path / "a.f32")[1] == 40
    assert json.loads((tmp_path / "a.jsonl").read_text().split("\n")[0])["extractor"] == other.key


def test_sizes_may_differ(folder, extractor, tmp_path):
    from PIL import Image

    names = PictureSet.open(folder).names
    for name in names[::3]:
        with Image.open(folder / name) as image:
            image.convert("RGB").resize((96, 80)).save(folder / name)
    pictures = PictureSet.open(folder)
    found = stream_features(pictures, extractor, tmp_path / "a.f32", BATCH)
    for index in (0, 1, 39):
        alone = extractor(pictures.read(index)[None].float() / 127.5 - 1)[0]
        np.testing.assert_allclose(found[index], alone, atol=1e-5)


def test_the_ending_is_part_of_the_name(folder, extractor, tmp_path):
    with pytest.raises(UserError, match=r"must end in \.f32"):
        stream_features(PictureSet.open(folder), extractor, tmp_path / "a.npy")
