"""The training of LatentLPIPS networks: words of captions, spoilt pictures, and one whole run."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import latent_metric.pictures
import numpy as np
import pytest
import torch
import train_latent_lpips
from diffkit.assets import path
from diffusers import AutoencoderKL
from latent_metric.corruptions import LATENT_KINDS, PICTURE_KINDS
from latent_metric.heads import correlation
from latent_metric.pictures import Pictures, made_of, moments
from latent_metric.trunk import TrunkSettings, train_trunk, trunk_folder
from PIL import Image

from diffkit.errors import RunFailed, UserError
from diffkit.files import read_json
from diffkit.models.codec import Codec
from diffkit.perceptual.latent_lpips import LatentLpipsConfig
from diffkit.perceptual.latent_lpips_io import load_latent_lpips


def write(file: Path, seed: int, size: int = 64) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


@pytest.mark.parametrize("kind", [*PICTURE_KINDS.values(), *LATENT_KINDS.values()])
def test_stronger_is_further(kind) -> None:
    """Strength 0 leaves all as it is but for JPEG's best quality; more moves further away."""
    smooth = torch.linspace(-0.6, 0.6, 64)[:, None] * torch.linspace(-1, 1, 64).cos()
    x = torch.stack([smooth, smooth.T, -smooth]).expand(4, 3, 64, 64).clone()
    x = x * torch.tensor([1.0, -1.0, 0.5, 0.2]).view(4, 1, 1, 1)
    errors = []
    for strength in (0.0, 0.3, 1.0):
        g = torch.Generator().manual_seed(0)
        errors.append((kind(x, torch.full((4,), strength), g) - x).square().mean().item())
    assert errors[0] < 1e-3 and errors[0] < errors[1] < errors[2]


def test_words_of_captions_are_classes(tmp_path: Path) -> None:
    rows = []
    for i in range(12):
        write(tmp_path / f"{i}.png", i)
        words = "a red cat" if i % 2 else "a blue, dog"
        rows.append({"file_name": f"{i}.png", "text": words + (" once" if i == 0 else "")})
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "metadata.jsonl").write_text(lines + "\n")
    pictures = Pictures(tmp_path, 64)
    assert pictures.classes == ("blue", "cat", "dog", "red")  # not "a", of all; not "once"
    assert pictures.present[1].tolist() == [0, 1, 0, 1]
    again = Pictures(tmp_path, 64, classes=("cat", "horse"))
    assert again.present[1].tolist() == [1, 0]


def test_folders_are_classes_and_views_differ(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write(tmp_path / name / "0.png", 0, size=80)
    pictures = Pictures(tmp_path, 64)
    assert pictures.classes == ("cat", "dog")
    assert pictures.present.tolist() == [[1, 0], [0, 1]]
    views = [pictures.view(0, number, seed=0) for number in range(3)]
    assert all(view.shape == (64, 64, 3) for view in views)
    assert (views[1] != views[0]).any() and (views[1] != views[2]).any()
    assert (views[1] == pictures.view(0, 1, seed=0)).all()


def test_pictures_of_which_nothing_is_known_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.png", 0)
    with pytest.raises(UserError, match="class names or captions"):
        Pictures(tmp_path, 64)


def test_correlations() -> None:
    x = torch.tensor([1.0, 2, 3, 4])
    assert correlation(x, 2 * x + 1) == 1
    assert correlation(x, x.exp(), ranks=True) == 1
    assert correlation(x, -x) == -1


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec(AutoencoderKL.from_pretrained(path("model") / "vae").eval())


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    """Two of each of two classes."""
    for i in range(4):
        write(tmp_path / "data" / ("cat", "dog")[i % 2] / f"{i}.png", i)
    return Pictures(tmp_path / "data", 64)


def test_latents_of_other_data_or_draws_are_not_taken(pictures, codec, tmp_path: Path) -> None:
    """Same shapes throughout: only what the moments were made of differs."""
    file = tmp_path / "state" / "moments.npy"

    def made(seed: int = 0) -> tuple[np.ndarray, int]:
        kept = np.array(moments(pictures, codec, 2, seed, file))
        return kept, file.stat().st_mtime_ns

    first, time = made()
    assert first.shape == (8, 16, 16, 16) and made()[1] == time
    other, _ = made(seed=1)
    assert (other[:4] == first[:4]).all() and (other[4:] != first[4:]).any()  # view 0 has no draws
    again, _ = made()
    assert (again == first).all()
    edited = pictures.source.encoded(0)
    write(edited, 9)
    os.utime(edited, ns=(0, 0))
    changed, _ = made()
    assert (changed[0] != first[0]).any() and (changed[1] == first[1]).all()


def test_moments_go_on_where_they_were_stopped(pictures, codec, tmp_path: Path) -> None:
    """They are the longest part for many pictures, and a restart began at the first one."""
    whole = np.array(moments(pictures, codec, 2, 0, tmp_path / "whole.npy", batch=1))
    file = tmp_path / "state" / "moments.npy"

    class Stopped(Exception):
        pass

    class Failing(Codec):
        left = 5

        def encode_moments(self, images, checkpoint=None):
            if not self.left:
                raise Stopped
            self.left -= 1
            return super().encode_moments(images, checkpoint)

    failing, noted = Failing(codec.vae), latent_metric.pictures._NOTED
    latent_metric.pictures._NOTED = 2
    try:
        with pytest.raises(Stopped):
            moments(pictures, failing, 2, 0, file, batch=1)
        assert read_json(file.with_suffix(".json"))["rows"] == 4
        failing.left = 4  # and not 8
        assert (np.array(moments(pictures, failing, 2, 0, file, batch=1)) == whole).all()
    finally:
        latent_metric.pictures._NOTED = noted
    assert failing.left == 0


def test_a_full_disk_is_told_before_the_first_picture(
    pictures, codec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a memory map it would end the process without a word."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunFailed, match="moments.npy: the disk is full"):
        moments(pictures, codec, 1, 0, tmp_path / "moments.npy")
    monkeypatch.undo()
    assert len(moments(pictures, codec, 1, 0, tmp_path / "moments.npy")) == 4


def test_a_trunk_goes_on_bit_by_bit(pictures, codec, tmp_path: Path, capsys) -> None:
    """Dropout of the dense head included; of other settings there is nothing to go on from."""
    config = LatentLpipsConfig(codec.channels, 4)
    how = TrunkSettings(steps=4, batch_size=2, learning_rate=1e-2, dense=True, seed=3)
    told = made_of(pictures, codec, 1, 3)
    kept = moments(pictures, codec, 1, 3, tmp_path / "moments.npy")
    folder = trunk_folder(tmp_path, told, pictures, config, how)
    straight = train_trunk(pictures, kept, codec, config, how, folder, every=2).state_dict()
    shutil.rmtree(folder / "step-00000004")
    capsys.readouterr()
    resumed = train_trunk(pictures, kept, codec, config, how, folder, every=2).state_dict()
    assert "goes on from step 2" in capsys.readouterr().err
    assert all(resumed[name].equal(value) for name, value in straight.items())
    whole = train_trunk(pictures, kept, codec, config, how, folder, every=2).state_dict()
    assert all(whole[name].equal(value) for name, value in straight.items())
    other = TrunkSettings(steps=5, batch_size=2, learning_rate=1e-2, dense=True, seed=3)
    assert trunk_folder(tmp_path, told, pictures, config, other) != folder


def arguments(output: Path, *words: str) -> list[str]:
    small = ["--width", "4", "--views", "1", "--steps", "3", "--pairs", "160", "--batch-size", "8"]
    return ["--data", str(path("sample")), "--output", str(output), *small, *words]


def run(output: Path, *words: str) -> dict:
    return train_latent_lpips.run(train_latent_lpips.flags().parse_args(arguments(output, *words)))


def test_what_cannot_be_is_refused_in_a_line_before_any_work(tmp_path: Path, capsys) -> None:
    (tmp_path / "net").mkdir()
    for output, words, message in (
        ("net", [], "exists already; choose another folder or add --overwrite"),
        ("new", ["--heads", "people"], "--bapps FOLDER and --heads people go together"),
        ("new", ["--heads", "order", "--prior", "0.1"], "--prior: does nothing with --heads order"),
        ("new", ["--epochs", "2"], "--epochs: does nothing with --heads distance"),
        ("new", ["--steps", "0"], "--steps: must be at least 1"),
    ):
        assert train_latent_lpips.main(arguments(tmp_path / output, *words)) == 2
        said = capsys.readouterr()
        assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


@pytest.mark.slow
def test_a_network_is_trained_and_saved(tmp_path: Path, capsys) -> None:
    """Three steps on the embedded sample give a distance that knows the stronger corruption."""
    scores = run(tmp_path / "net")
    network = load_latent_lpips(tmp_path / "net")
    assert network.config.channels == 8 and network.config.provenance["autoencoder"] == "embedded"
    assert all((head >= 0).all() for head in network.heads)
    assert scores["order"] > 0.8 and read_json(tmp_path / "net" / "metrics.json") == scores
    kept = (tmp_path / "net-state" / "moments.npy").stat().st_mtime_ns
    words = ["--heads", "none", "--overwrite"]
    assert train_latent_lpips.main(arguments(tmp_path / "net", *words)) == 0
    said = capsys.readouterr()
    assert "goes on from step 3" in said.err and "rank correlation: " in said.out
    assert (tmp_path / "net-state" / "moments.npy").stat().st_mtime_ns == kept
    common = load_latent_lpips(tmp_path / "net")
    assert all(head.allclose(head[0]) for head in common.heads)


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["order", "people"])
def test_the_other_heads(tmp_path: Path, heads: str) -> None:
    words = ["--heads", heads, "--epochs", "2"]
    if heads == "people":
        for i in range(6):
            for j, side in enumerate(("ref", "p0", "p1")):
                write(tmp_path / "bapps" / side / f"{i:06d}.png", 10 * i + j)
            (tmp_path / "bapps" / "judge").mkdir(exist_ok=True)
            np.save(tmp_path / "bapps" / "judge" / f"{i:06d}.npy", np.array([0.2 * (i % 5)]))
        words += ["--bapps", str(tmp_path / "bapps")]
    assert run(tmp_path / "net", *words)["order"] > 0.5
