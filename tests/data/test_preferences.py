"""Batches of preference pairs: one address a pair, whatever its two pictures are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffkit.data.batch import Batch
from diffkit.data.fill import cache_embeddings, cache_latents
from diffkit.data.preference_sources import open_pairs
from diffkit.data.preferences import PreferenceBatch, PreferenceData
from diffkit.errors import RunFailed, UserError
from diffkit.models.conditioner import Sizes
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.randomness import SampleKeys
from tests.data.pairs import pair_folder
from tests.data.pictures import noise, write_jsonl

SIZES = ((48, 48), (40, 80), (90, 50))


def half(value, captions=("a cat", "a dog")):
    sizes = [Sizes((8, 8), (0, 0), (8, 8))] * 2
    return Batch(
        keys=SampleKeys(7, (0, 1), (4, 2)),
        images=torch.full((2, 3, 8, 8), value),
        moments=None,
        captions=list(captions),
        conditioning=None,
        labels=None,
        sizes=sizes,
        names=[f"{value}-0", f"{value}-1"],
        extras=[{}, {}],
    )


def preference_data(folder, **options):
    defaults = {"resolution": 32, "batch_size": 4, "seed": 0, "multiple": 8, "flip": True}
    return PreferenceData(open_pairs(folder), **{**defaults, **options})


def rows(batch):
    """(winner, loser, caption, address) of every pair of a batch."""
    keys = zip(batch.keys.epochs, batch.keys.indices, strict=True)
    return list(
        zip(batch.winners.names, batch.losers.names, batch.winners.captions, keys, strict=True)
    )


def same(a, b):
    assert rows(a) == rows(b)
    for name in ("winners", "losers"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.sizes == right.sizes and left.extras == right.extras
        assert torch.equal(left.images, right.images)


def close(a, b):
    return torch.allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def model(tiny_sd):
    return LatentDiffusion.load(str(tiny_sd))


def test_a_batch_of_pairs_has_one_address_a_pair():
    batch = PreferenceBatch(half(0.5), half(-0.5))
    assert len(batch) == 2
    assert batch.keys == SampleKeys(7, (0, 1), (4, 2))
    moved = batch.to("meta")
    assert moved.winners.images.device.type == moved.losers.images.device.type == "meta"
    assert moved.keys == batch.keys


def test_halves_of_other_pairs_are_refused():
    other = replace(half(0.0), keys=SampleKeys(7, (0, 1), (4, 3)))
    with pytest.raises(ValueError, match="other keys"):
        PreferenceBatch(half(0.5), other)
    with pytest.raises(ValueError, match="other captions"):
        PreferenceBatch(half(0.5), half(-0.5, captions=("a cat", "a cow")))


def test_what_a_batch_holds(tmp_path):
    data = preference_data(pair_folder(tmp_path, 6))
    assert len(data) == 6 and data.steps_per_epoch == 1.5
    seen = set()
    for step in range(6):
        batch = data.batch(step)
        assert batch.winners.images.shape == batch.losers.images.shape == (4, 3, 32, 32)
        for winner, loser, caption, (epoch, index) in rows(batch):
            pair = [f"{2 * index:03}.png", f"{2 * index + 1:03}.png"]
            assert [winner, loser] == (pair if index % 2 == 0 else pair[::-1])
            assert caption == f"prompt {index}"
            seen.add((epoch, index))
        assert [extras["rater"] for extras in batch.losers.extras] == [
            index % 3 for index in batch.keys.indices
        ]
    assert seen == {(epoch, index) for epoch in range(4) for index in range(6)}


@pytest.mark.parametrize("max_aspect", [1.0, 2.0])
def test_the_two_pictures_of_a_pair_are_seen_alike(tmp_path, max_aspect):
    """They are mirrored together and cut to one size, that of the winner's bucket."""
    options = {"crop": "random", "max_aspect": max_aspect}
    data = preference_data(pair_folder(tmp_path, 8, SIZES), **options)
    flips, targets = set(), set()
    for position in range(8):
        pair = data.source[position]
        size = data.sizes[pair.winner]
        for epoch in range(8):
            winner, loser = data.load(position, epoch)
            assert winner.view.target == loser.view.target == winner.pixels.shape[:2]
            assert winner.view.flip == loser.view.flip
            wide, tall = size[1] > 1.4 * size[0], size[0] > 1.4 * size[1]
            height, width = winner.view.target
            if max_aspect > 1:
                assert (width > height, height > width) == (wide, tall)
            flips.add(winner.view.flip)
            targets.add(winner.view.target)
    assert flips == {True, False} and len(targets) == (1 if max_aspect == 1 else 3)


def test_one_picture_as_winner_and_as_loser_looks_the_same(tmp_path):
    """So a pair of equal pictures, cut at random, differs by nothing."""
    noise(48, 90, 1).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    write_jsonl(tmp_path / "metadata.jsonl", [{"winner": "a.png", "loser": "b.png", "text": "x"}])
    batch = preference_data(tmp_path, crop="random").batch(3)
    assert torch.equal(batch.winners.images, batch.losers.images)
    assert batch.winners.sizes == batch.losers.sizes


def test_shares_and_iterators_make_up_the_global_batch(tmp_path):
    data = preference_data(pair_folder(tmp_path, 7, SIZES), max_aspect=2.0, crop="random")
    whole = [data.batch(step) for step in range(6)]
    for a, b in zip(data.batches(2, 6, workers=3), whole[2:], strict=True):
        same(a, b)
    for world, accumulation in ((2, 1), (1, 2), (2, 2)):
        streams = [list(data.batches(0, 6, rank, world, accumulation)) for rank in range(world)]
        for step in range(6):
            parts = [b for s in streams for b in s[step * accumulation : (step + 1) * accumulation]]
            assert [row for part in parts for row in rows(part)] == rows(whole[step])
            for name in ("winners", "losers"):
                images = torch.cat([getattr(part, name).images for part in parts])
                assert torch.equal(images, getattr(whole[step], name).images)


def test_the_fingerprint_is_that_of_the_preferences(tmp_path):
    folder = pair_folder(tmp_path, 4)
    before = preference_data(folder).fingerprint()
    assert preference_data(folder, seed=5, batch_size=2).fingerprint() == before
    table = folder / "metadata.jsonl"
    text = table.read_text()
    found = {before}
    for label in ("0", "0.5"):
        table.write_text(text.replace('"label_0": 1', f'"label_0": {label}', 1))
        found.add(preference_data(folder).fingerprint())
    assert len(found) == 3


def test_pairs_with_an_unreadable_picture_are_left_out(tmp_path, capsys):
    folder = pair_folder(tmp_path, 5)
    (folder / "003.png").write_bytes(b"garbage")
    data = preference_data(folder)
    said = capsys.readouterr().err
    assert "1 of 10 pictures cannot be read" in said and "003.png: not a picture" in said
    assert "1 of 5 pairs are left out" in said
    assert {i for step in range(8) for i in data.batch(step).keys.indices} == {0, 2, 3, 4}
    for name in ("001", "005", "007", "009"):
        (folder / f"{name}.png").write_bytes(b"garbage")
    with pytest.raises(UserError, match="None of the 5 pairs has two pictures that can be read"):
        preference_data(folder)


def break_off(folder, *numbers):
    for number in numbers:
        path = folder / f"{number:03}.png"
        path.write_bytes(path.read_bytes()[:-300])


def test_a_picture_that_breaks_later_gives_way_to_the_next_pair(tmp_path, capsys):
    """Both of its pictures come from that pair: half of one pair is no preference."""
    folder = pair_folder(tmp_path, 5)
    good = preference_data(folder)
    expected = [rows(good.batch(step)) for step in range(10)]
    capsys.readouterr()
    break_off(folder, 4)  # of pair 2, the next of which is 3
    data = preference_data(folder)
    assert data.fingerprint() == good.fingerprint()
    replaced = 0
    for step in range(10):
        for before, after in zip(expected[step], rows(data.batch(step)), strict=True):
            replaced += before != after
            if before[3][1] == 2:
                assert after == ("007.png", "006.png", "prompt 3", (before[3][0], 3))
            else:
                assert after == before
    assert replaced == 8
    said = capsys.readouterr().err
    assert said.count("004.png: cannot be decoded") == 1 and "another pair takes its place" in said
    break_off(folder, *(n for n in range(10) if n != 4))
    with pytest.raises(RunFailed, match="No pair of the size"):
        data.batch(0)


def test_batches_from_the_caches_equal_those_without(tmp_path, model):
    folder = pair_folder(tmp_path / "set", 6, SIZES)
    options = {"max_aspect": 2.0}
    plain, cached = preference_data(folder, **options), preference_data(folder, **options)
    assert cache_latents(cached, tmp_path / "cache", model.codec) == 24  # two views each
    assert cache_embeddings(cached, tmp_path / "cache", model.conditioner) == 6
    for a, b in zip(plain.batches(0, 5), cached.batches(0, 5), strict=True):
        assert rows(a) == rows(b)
        for name in ("winners", "losers"):
            left, right = getattr(a, name), getattr(b, name)
            assert right.images is None and left.sizes == right.sizes
            assert close(model.codec.encode_moments(left.images), right.moments)
            tokens = model.conditioner.encode(left.captions).tokens
            assert close(tokens, right.conditioning.tokens)


def test_a_picture_of_several_pairs_is_encoded_once(tmp_path, model):
    for number in range(4):
        noise(48, 48, number).save(tmp_path / f"{number}.png")
    table = [
        {"winner": f"{i}.png", "loser": f"{j}.png", "text": f"{i} is better"}
        for i in range(4)
        for j in range(4)
        if i < j
    ]
    write_jsonl(tmp_path / "metadata.jsonl", table)
    shares = []
    for rank in range(2):
        data = preference_data(tmp_path)
        place = {"rank": rank, "world": 2}
        latents = cache_latents(data, tmp_path / "cache", model.codec, **place)
        texts = cache_embeddings(data, tmp_path / "cache", model.conditioner, **place)
        shares.append((latents, texts))
    assert len(data) == 6 and shares == [(4, 2), (4, 1)]
    data = preference_data(tmp_path)
    assert cache_latents(data, tmp_path / "cache", model.codec) == 0
    batch = data.batch(0)
    assert batch.winners.moments.shape == batch.losers.moments.shape == (4, 8, 16, 16)


def test_broken_pictures_stand_aside_with_a_cache_as_without(tmp_path, model, capsys):
    folder = pair_folder(tmp_path / "set", 5)
    break_off(folder, 4)
    plain, cached = (preference_data(folder, flip=False) for _ in range(2))
    assert cache_latents(cached, tmp_path / "cache", model.codec) == 9
    for step in range(5):
        assert rows(plain.batch(step)) == rows(cached.batch(step))
