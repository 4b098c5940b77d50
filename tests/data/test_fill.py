"""Filling the caches with a tiny real model, and training batches from them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from diffkit.data.fill import _parts, cache_embeddings, cache_latents
from diffkit.data.folder import ImageFolder
from diffkit.data.loader import TrainingData
from diffkit.data.transforms import View
from diffkit.errors import RunFailed, UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from tests.data.pictures import noise, picture_folder

SIZES = ((48, 48), (40, 80), (90, 50))


@pytest.fixture(scope="module")
def model(tiny_sd):
    return LatentDiffusion.load(str(tiny_sd))


def training_data(folder, **options):
    defaults = {"resolution": 32, "batch_size": 4, "seed": 0, "multiple": 8, "max_aspect": 2.0}
    return TrainingData(ImageFolder(folder), **{**defaults, "flip": True, **options})


def close(a, b):
    return torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_batches_from_the_cache_equal_those_without(tmp_path, model):
    folder = picture_folder(tmp_path / "set", 9, SIZES, captions=2)
    plain, cached = training_data(folder), training_data(folder)
    assert cache_latents(cached, tmp_path / "cache", model.codec) == 18  # two views each
    assert cache_embeddings(cached, tmp_path / "cache", model.conditioner) == 18
    for a, b in zip(plain.batches(0, 8), cached.batches(0, 8), strict=True):
        assert b.images is None and b.moments.dtype == torch.float32
        assert close(model.codec.encode_moments(a.images), b.moments)
        assert close(model.conditioner.encode(a.captions).tokens, b.conditioning.tokens)
        assert a.keys == b.keys and a.captions == b.captions and a.sizes == b.sizes


def test_what_is_there_is_not_encoded_again(tmp_path, model):
    folder = picture_folder(tmp_path / "set", 6)
    assert cache_latents(training_data(folder), tmp_path, model.codec) == 12
    assert cache_latents(training_data(folder, seed=5), tmp_path, model.codec) == 0
    assert cache_latents(training_data(folder, flip=False), tmp_path, model.codec) == 0
    assert cache_latents(training_data(folder, resolution=16), tmp_path, model.codec) == 12
    noise(48, 48, 77).save(folder / "003.png")
    assert cache_latents(training_data(folder), tmp_path, model.codec) == 2


def test_damaged_entries_are_made_again(tmp_path, model):
    folder = picture_folder(tmp_path / "set", 5)
    data = training_data(folder, flip=False)
    cache_latents(data, tmp_path / "cache", model.codec)
    expected = data.batch(0).moments
    entries = sorted((tmp_path / "cache").rglob("*.safetensors"))
    entries[0].write_bytes(entries[0].read_bytes()[:100])
    entries[1].unlink()
    with pytest.raises(RunFailed, match="latents of .* were damaged or removed.*same command"):
        for step in range(3):
            data.batch(step)
    again = training_data(folder, flip=False)
    assert cache_latents(again, tmp_path / "cache", model.codec) == 2
    assert close(again.batch(0).moments, expected)


def test_processes_share_the_work(tmp_path, model):
    folder = picture_folder(tmp_path / "set", 7)
    shares = [
        cache_latents(training_data(folder), tmp_path, model.codec, rank=rank, world=2)
        for rank in range(2)
    ]
    assert shares == [8, 6]
    texts = [
        cache_embeddings(training_data(folder), tmp_path, model.conditioner, rank=rank, world=2)
        for rank in range(2)
    ]
    assert texts == [4, 3]
    data = training_data(folder)
    assert cache_latents(data, tmp_path, model.codec) == 0
    assert data.batch(3).moments.shape[0] == 4


FILL = """
import sys
from diffkit.data.fill import cache_latents
from diffkit.data.folder import ImageFolder
from diffkit.data.loader import TrainingData
from diffkit.models.latent_diffusion import LatentDiffusion
codec = LatentDiffusion.load(sys.argv[1]).codec
data = TrainingData(ImageFolder(sys.argv[2]), resolution=32, batch_size=4, seed=0, multiple=8)
print("ready", flush=True)
sys.stdin.readline()
cache_latents(data, sys.argv[3], codec, batch_size=2)
print(data.batch(0).moments.double().sum().item())
"""


@pytest.mark.slow
def test_two_processes_that_know_nothing_of_each_other(tmp_path, tiny_sd):
    """Two runs start at once on one cache folder; both train on the same numbers."""
    folder = picture_folder(tmp_path / "set", 12)
    command = [sys.executable, "-c", FILL, str(tiny_sd), str(folder), str(tmp_path / "cache")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    sums = [float(run.communicate()[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert abs(sums[0] - sums[1]) < 1e-3


def test_large_pictures_are_encoded_in_smaller_batches():
    """Eight pictures of 1024 pixels at once did not fit a GPU that trains on them; two take as much
    as eight of 512. Small ones stay at the batch size.
    """
    sides = (64, 512, 768, 1024, 2048)
    views = [View((9, 9), (side, side), (0, 0), (side, side), False) for side in sides]
    todo = [(number, view, "key") for view in views for number in range(8)]
    found = [(part[0][1].target[0], len(part)) for part in _parts(todo, 8)]
    assert found == [
        *[(64, 8), (512, 8), (768, 3), (768, 3), (768, 2)],
        *[(1024, 2)] * 4,
        *[(2048, 1)] * 8,
    ]


def test_broken_pictures_are_named_and_the_same_others_stand_in_as_without_a_cache(
    tmp_path, model, capsys
):
    """A broken picture has no entry in the cache; a batch must not take that for a lost one.

    Nor may only the process that met it know of it.
    """
    folder = picture_folder(tmp_path / "set", 8)
    for name in ("002.png", "005.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-300])
    plain, data, other = (training_data(folder, flip=False) for _ in range(3))
    assert cache_latents(data, tmp_path / "cache", model.codec) == 6
    said = capsys.readouterr().err
    assert "002.png: cannot be decoded" in said and "005.png: cannot be decoded" in said
    other.latents = data.latents
    for step in range(4):
        names = plain.batch(step).names
        assert names == data.batch(step).names == other.batch(step).names


def test_random_crops_cannot_be_cached(tmp_path, model):
    data = training_data(picture_folder(tmp_path / "set", 2), crop="random")
    with pytest.raises(UserError, match='Use crop "center"'):
        cache_latents(data, tmp_path, model.codec)


def test_micro_conditioning_is_added_at_each_visit(tmp_path, tiny_sdxl):
    """The cache holds the caption alone; sizes come from the batch, the same as without a cache."""
    conditioner = LatentDiffusion.load(str(tiny_sdxl)).conditioner
    data = training_data(picture_folder(tmp_path / "set", 6, SIZES))
    cache_embeddings(data, tmp_path / "cache", conditioner)
    batch = data.batch(1)
    expected = conditioner.encode(batch.captions, batch.sizes)
    assert batch.conditioning.time_ids is None
    conditioner.free()
    found = conditioner.with_sizes(batch.conditioning, batch.sizes)
    assert torch.equal(found.time_ids, expected.time_ids)
    assert close(found.tokens, expected.tokens) and close(found.pooled, expected.pooled)
    row = found.time_ids[0].tolist()
    assert row == [*batch.sizes[0].original, *batch.sizes[0].crop, *batch.sizes[0].target]


def test_pictures_without_captions_get_the_empty_one(tmp_path, model):
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        noise(32, 32).save(tmp_path / "set" / name / "1.png")
    data = training_data(tmp_path / "set", batch_size=2)
    assert cache_embeddings(data, tmp_path / "cache", model.conditioner) == 1
    expected = model.conditioner.encode(["", ""]).tokens
    assert close(data.batch(0).conditioning.tokens, expected)
