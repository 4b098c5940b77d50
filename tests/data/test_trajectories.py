"""Pairs of noise and end point as batches."""

from __future__ import annotations

import pytest
import torch

from diffkit.data.fill import cache_embeddings
from diffkit.data.layout import read_layout
from diffkit.data.trajectories import TrajectoryData
from diffkit.data.trajectory_store import (
    Prompt,
    read_header,
    read_shard,
    shard_path,
    trajectory_noise,
    write_header,
)
from diffkit.errors import RunFailed, UserError
from diffkit.models.conditioner import Sizes
from diffkit.randomness import normal
from tests.data.trajectory_folder import PROMPTS, build, header


@pytest.fixture
def folder(tmp_path):
    return build(tmp_path / "pairs")


def test_a_batch_has_noise_by_address_and_the_end_point_of_the_same_pair(folder):
    data = TrajectoryData(folder, batch_size=4, seed=1)
    (batch,) = data.batches(0, 1)
    assert len(batch) == 4 and batch.keys.seed == 1 and batch.labels is None
    assert batch.noise.dtype == batch.latents.dtype == torch.float32
    for row, index in enumerate(batch.keys.indices):
        assert (batch.latents[row] == index).all()
        assert batch.noise[row].equal(normal((4, 16, 16), 7, index, "trajectory"))
        assert batch.captions[row] == PROMPTS[index % 3].text
    assert batch.sizes == [Sizes((32, 32), (0, 0), (32, 32))] * 4
    assert batch.to("cpu").noise.equal(batch.noise)


def test_every_pair_is_seen_once_an_epoch_and_seeds_change_the_order(folder):
    def seen(seed):
        data = TrajectoryData(folder, batch_size=5, seed=seed)
        return [i for batch in data.batches(0, 2) for i in batch.keys.indices]

    assert sorted(seen(0)) == list(range(10)) and seen(0) != seen(1)


def test_processes_and_parts_share_a_batch(folder):
    data = TrajectoryData(folder, batch_size=4, seed=1)
    (whole,) = data.batches(3, 4)
    parts = [
        part.noise
        for rank in range(2)
        for part in data.batches(3, 4, rank=rank, world=2, accumulation=2, workers=1)
    ]
    assert torch.cat(parts).equal(whole.noise)


def test_places_and_unrelated_pairs_do_not_depend_on_the_split(folder):
    """Never the pair itself; another one at another visit."""
    data = TrajectoryData(folder, batch_size=4, seed=1)
    (whole,) = data.batches(3, 4)
    parts = [p for rank in range(2) for p in data.batches(3, 4, rank, 2, 2, workers=1)]
    assert sum((part.places for part in parts), ()) == whole.places == (0, 1, 2, 3)
    assert torch.cat([part.unrelated for part in parts]).equal(whole.unrelated)
    others = []
    for epoch in range(200):
        batch = data.pairs([0, 1, 9], epoch)
        assert (batch.unrelated != batch.latents).all()
        others.append(batch.unrelated[2, 0, 0, 0].item())
    assert set(others) == set(range(9))


def test_pairs_that_were_not_finite_are_passed_over(tmp_path):
    data = TrajectoryData(build(tmp_path / "pairs", bad=(0, 5)), batch_size=8, seed=0)
    (batch,) = data.batches(0, 1)
    assert len(data) == 8 and data.kept[0] == 1
    assert sorted(batch.keys.indices) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert batch.latents[:, 0, 0, 0].tolist() == list(batch.keys.indices)


def test_classes_come_as_labels(tmp_path):
    prompts = (Prompt("cat", 3), Prompt("dog", 1))
    data = TrajectoryData(build(tmp_path / "pairs", prompts), batch_size=4, seed=0)
    batch = data.pairs([0, 1, 2])
    assert batch.labels is not None and batch.labels.tolist() == [3, 1, 3]
    assert batch.captions == ["cat", "dog", "cat"]


def test_the_fingerprint_follows_every_bit(folder, tmp_path):
    first = TrajectoryData(folder, batch_size=4, seed=0).fingerprint()
    assert TrajectoryData(folder, batch_size=2, seed=1).fingerprint() == first
    for name, values in {"bad": {"bad": (3,)}, "seed": {"seed": 8}, "count": {"count": 9}}.items():
        other = build(tmp_path / name, **values)
        assert TrajectoryData(other, batch_size=4, seed=0).fingerprint() != first


def test_what_is_not_whole_is_refused(folder):
    def refusal():
        with pytest.raises(UserError) as error:
            TrajectoryData(folder, batch_size=4, seed=0)
        return str(error.value)

    shard = shard_path(folder, 1)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    assert "pairs-00001.safetensors: is not there, or not whole" in refusal()
    changed = bytearray(whole)
    changed[-1] ^= 1
    shard.write_bytes(changed)
    assert "pairs-00001.safetensors: its bits were changed" in (said := refusal())
    assert "Run the command again that made the pairs" in said
    shard.write_bytes(whole)
    write_header(folder, header(count=11))
    assert "pairs-00002.safetensors: is not there, or not whole" in refusal()
    write_header(folder, header(guidance=3.0))
    assert "other settings" in refusal()
    (folder / "prompts.jsonl").write_text('{"label": null, "text": "another"}\n')
    assert "not the prompts" in refusal()
    (folder / "trajectories.json").write_text('{"format": 1, "steps": 1}')
    assert "has not the keys of a header" in refusal()
    (folder / "trajectories.json").unlink()
    assert "made by `diffkit trajectories`" in refusal()


def test_a_shard_with_other_bits_is_not_read(folder):
    path = shard_path(folder, 0)
    shard = read_shard(path)
    assert shard is not None and shard.indices.tolist() == [0, 1, 2, 3]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert read_shard(path) is None


def test_a_shard_that_vanishes_during_the_run_is_named(folder):
    data = TrajectoryData(folder, batch_size=4, seed=0)
    shard_path(folder, 0).unlink()
    with pytest.raises(RunFailed, match="pairs-00000.safetensors: cannot be read"):
        list(data.batches(0, 3))


def test_embeddings_are_cached_by_prompt(folder, tiny_sd, tmp_path):
    from diffkit.models.latent_diffusion import LatentDiffusion

    model = LatentDiffusion.load(tiny_sd)
    data = TrajectoryData(folder, batch_size=4, seed=0)
    data.check(model)
    assert cache_embeddings(data, tmp_path / "cache", model.conditioner) == 3
    batch = data.pairs([0, 1, 3])
    expected = model.conditioner.encode(batch.captions)
    assert batch.conditioning is not None and batch.conditioning.tokens is not None
    assert batch.conditioning.tokens.isclose(expected.tokens, atol=1e-5).all()
    model.codec.vae.register_to_config(scaling_factor=0.25)
    with pytest.raises(UserError, match="are not of this model's kind"):
        data.check(model)


def test_the_noise_of_a_pair_hangs_on_the_seed_and_its_index_alone():
    head = header()
    assert trajectory_noise(head, [5, 2])[1].equal(trajectory_noise(head, [2])[0])
    other = trajectory_noise(header(seed=8), [2])[0]
    assert not other.equal(trajectory_noise(head, [2])[0])


def test_headers_differ_by_what_decides_pairs(folder):
    head = read_header(folder)
    assert head == header() and head.shards == 3 and list(head.rows(2)) == [8, 9]
    assert head.differing(header(model="elsewhere", count=12)) == []
    assert head.digest() == header(model="elsewhere", count=12).digest()
    more = header(steps=3, times=(999.0, 666.0, 333.0, -1.0))
    assert head.differing(more) == ["steps (2 there, 3 now)"]
    other = header(scheduler={"class": "DDIMScheduler", "clip_sample": True}, seed=1)
    said = ["scheduler clip_sample (None there, True now)", "seed (7 there, 1 now)"]
    assert head.differing(other) == said
    assert head.differing(header(times=(999.0, 400.0, -1.0))) == ["time 1 (499.0 there, 400.0 now)"]


def test_a_folder_of_pairs_is_no_folder_of_pictures(folder):
    with pytest.raises(UserError, match="holds noise-image pairs, not pictures; .* train gan"):
        read_layout(folder)
