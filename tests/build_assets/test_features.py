"""The feature network's recipe: names matched across sets, splits, views and the optimizer."""

from __future__ import annotations

import augmentation
import captions
import common
import drawings
import features
import more_drawings
import numpy as np
import pytest
import torch
from diffkit.assets import path
from PIL import Image

from diffkit.files import read_jsonl, write_json
from diffkit.models.feature_network import FeatureNetwork, FeatureNetworkConfig

CONCEPTS = [
    {"id": "cow", "char": "🐄", "name": "cow"},
    {"id": "cow_face", "char": "🐮", "name": "cow face"},
    {"id": "bear", "char": "🐻", "name": "bear"},
    {"id": "cactus", "char": "🌵", "name": "cactus"},
    {"id": "eggplant", "char": "🍆", "name": "eggplant"},
    {"id": "keycap_1", "char": "1️⃣", "name": "keycap 1"},
]


def test_names_of_other_sets_find_their_concept():
    icons = ["cow", "cow-face", "bear-face", "cactus-1", "cactus-2", "aubergine", "keycap-1", "x"]
    found = more_drawings.matches(CONCEPTS, [], icons)
    assert found == {
        "cow": 0,
        "cow-face": 1,  # not the cow, whose older name this could be
        "bear-face": 2,
        "cactus-1": 3,
        "cactus-2": 3,
        "aubergine": 4,  # the Unicode name
        "keycap-1": 5,  # a whole name wins over a number
    }


def test_openmoji_is_no_training_set():
    """Its artists are the held-out ones of experiments on unseen styles."""
    assert not any("openmoji" in package for package in more_drawings.MORE_PACKAGES.values())


def test_one_further_drawing_of_a_concept_is_held_out():
    rows = [{"concept": f"c{i}", "set": s} for i in range(300) for s in ("a", "b", "c")]
    chosen = drawings.further_heldout(rows)
    assert len(chosen) == drawings.FURTHER_HELDOUT
    assert len({rows[index]["concept"] for index in chosen}) == drawings.FURTHER_HELDOUT
    sets = [rows[index]["set"] for index in chosen]
    assert min(sets.count(name) for name in "abc") > 25
    # the order of the rows decides nothing
    named = {(rows[i]["concept"], rows[i]["set"]) for i in chosen}
    turned = rows[::-1]
    assert named == {
        (turned[i]["concept"], turned[i]["set"]) for i in drawings.further_heldout(turned)
    }


@pytest.mark.parametrize("extra", [0, 3])
def test_premultiplied_keeps_leading_pictures_in_order(extra):
    rgba = np.zeros((1 + extra, 2, 2, 4), np.uint8)
    rgba[0] = (200, 100, 0, 51)
    result = drawings.premultiplied(torch.from_numpy(rgba))
    assert result.shape == (1 + extra, 4, 2, 2)
    assert result[0, :, 0, 0].tolist() == [40, 20, 0, 51]


def test_distance_is_on_white():
    """Clear is white: 0 from a white picture, 1 from a black one."""
    clear, white, black = torch.zeros(3, 4, 2, 2, dtype=torch.uint8)
    white[:], black[3] = 255, 255
    apart = drawings.distance(clear, torch.stack([white, black]))
    torch.testing.assert_close(apart, torch.tensor([0.0, 1.0]))


def test_arrows_and_clocks_are_not_mirrored():
    sided = {"name": "three o’clock", "group": "Travel & Places"}
    arrow = {"name": "play button", "group": "Symbols"}
    assert drawings.is_sided(sided) and drawings.is_sided(arrow)
    assert not drawings.is_sided({"name": "bright sun", "group": "Travel & Places"})


def write_emoji(folder):
    """Every shipped concept and 250 others as random pictures; noto v1 and a copy of twemoji."""
    ids = [*captions.read_concepts(), *(f"other {index}" for index in range(250))]
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 255, (len(ids), 4, 64, 64, 4), dtype=np.uint8)
    rgba[..., 3] = 255
    rows = [{"concept": c, "set": s} for s in ("noto v1", "other") for c in ids]
    more = rng.integers(0, 255, (len(rows), 64, 64, 4), dtype=np.uint8)
    more[..., 3] = 255
    more[len(ids) :] = rgba[:, 1]
    np.save(folder / "rgba.npy", rgba)
    np.save(folder / "more.npy", more)
    concepts = [{"id": c, "name": c.replace("_", " "), "group": "Objects"} for c in ids]
    write_json(folder / "concepts.json", concepts)
    write_json(folder / "more.json", rows)
    return ids


def test_held_out_drawings_and_their_copies_are_never_drawn(tmp_path):
    ids = write_emoji(tmp_path)
    data = drawings.Drawings(tmp_path)
    base, count = len(ids) * 4, len(ids)
    assert int(data.heldout.sum()) == 32
    assert int(data.tested.sum()) == 32 + drawings.FURTHER_HELDOUT
    assert torch.equal(data.tested[:base], data.heldout.flatten())
    weights = data.concept_weights(further=True)
    assert not weights[data.tested].any()
    assert not weights[base : base + count][data.heldout[:, 0]].any()  # noto v1 of noto
    assert not weights[base + count :][data.heldout[:, 1]].any()  # the copies of twemoji
    gone = int((weights == 0).sum()) - int(data.tested.sum())
    assert 0 < gone <= 16
    total = torch.zeros(count).index_add(0, data.concept, weights)
    expected = torch.ones(count)
    expected[:128] = drawings.SHIPPED_WEIGHT
    torch.testing.assert_close(total, expected)
    assert (data.style[base:] == -1).all()


def test_the_first_stage_draws_the_four_styles_alone(tmp_path):
    ids = write_emoji(tmp_path)
    data = drawings.Drawings(tmp_path)
    weights = data.concept_weights(further=False)
    assert torch.equal(weights[: len(ids) * 4], data.weights())
    assert not weights[len(ids) * 4 :].any()
    assert not data.weights()[data.heldout.flatten()].any()


def test_a_copy_among_the_four_styles_is_reported(tmp_path):
    """A held-out twemoji copy is 0 from the twemoji drawing, which stays in training."""
    write_emoji(tmp_path)
    data = drawings.Drawings(tmp_path)
    tested = data.tested.nonzero()[:, 0]
    copies = tested >= len(data.heldout) * 5
    assert copies.any()
    twemoji = data.heldout[data.concept[tested], 1]
    assert (data.nearest[copies & ~twemoji] == 0).all()
    assert (data.nearest[~copies] > drawings.NEAR).all()


def test_an_unmoved_view_is_the_picture_over_its_background(tmp_path):
    write_emoji(tmp_path)
    data = drawings.Pictures(tmp_path)
    still = augmentation.Augmentation(0.0, 0.0, (1.0, 1.0), 0.0, 0.0, 0.0, 0.0)
    rows, generator = torch.tensor([5, 9]), torch.Generator().manual_seed(0)
    view = data.draw(rows, torch.zeros(2, 3, 1, 1), still, generator)
    torch.testing.assert_close(view, data.plain(rows, torch.tensor([0, 0])), atol=1e-4, rtol=0)
    small = data.draw(rows, torch.zeros(2, 3, 1, 1), still, generator, 32)
    means = torch.nn.functional.avg_pool2d(view, 2)
    torch.testing.assert_close(small, means, atol=1e-4, rtol=0)


def test_a_picture_that_may_not_be_mirrored_is_not():
    how = augmentation.Augmentation(1.0, 0.0, (1.0, 1.0), 0.0, 0.0, 0.0, 0.0)
    allowed = torch.arange(200) < 100
    theta = augmentation.affine(allowed, how, torch.Generator().manual_seed(0))
    mirrored = theta[:, 0, 0] < 0
    assert not mirrored[100:].any()
    assert 60 < int(mirrored[:100].sum()) < 100  # one in five stays as it is


def test_erasing_covers_one_rectangle_of_one_colour():
    how = augmentation.Augmentation(0, 0, (1, 1), 0, 0, 0, 0, erase=1.0)
    images = torch.full((50, 3, 40, 40), -1.0)
    changed = augmentation.erase(images, how, torch.Generator().manual_seed(0))
    covered = (changed != images).all(1)
    area = covered.float().mean((1, 2))
    assert (area > 0.13**2).all() and (area < 0.48**2).all()
    rows, columns = covered.any(2).float(), covered.any(1).float()
    assert torch.equal(covered.float(), rows[:, :, None] * columns[:, None])
    inside = changed[0].flatten(1)[:, covered[0].flatten()]
    assert (inside == inside[:, :1]).all()


def test_mosaics_mix_one_style_and_keep_a_quarter():
    style = torch.tensor([0, 0, 1, 1])
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8)
    mixed = features.mosaics(images, style)
    assert torch.equal(mixed[:, :, 4:, 4:], images[:, :, 4:, 4:])
    assert torch.equal((mixed >= 2).flatten(1).all(1), style == 1)
    assert mixed[0].unique().tolist() == [0.0, 1.0]


def test_a_unit_step_turns_a_weight_by_the_rate():
    """For a weight of n rows and norm sqrt(n), an orthogonal step of rate r has norm r sqrt(n)."""
    weight = torch.nn.Parameter(
        torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    )
    optimizer = features.Unit([weight], lr=0.0)
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    before = weight.detach().clone()
    assert before.norm().item() == pytest.approx(4.0, rel=1e-5)
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.step()
    assert weight.norm().item() == pytest.approx(4.0, rel=1e-5)
    # Newton-Schulz leaves singular values between about 0.7 and 1.2
    assert 0.6 * 0.05 < (weight - before).norm().item() / 4 < 1.25 * 0.05


@pytest.mark.parametrize("stage", [features.FIRST, features.SECOND])
def test_every_weight_has_one_optimizer(stage):
    network = FeatureNetwork(FeatureNetworkConfig(("a", "b"), common.STYLES, (4, 8, 8), (1, 1)))
    groups = [group for o in features.optimizers_for(network, stage) for group in o.param_groups]
    held = [id(weight) for group in groups for weight in group["params"]]
    assert sorted(held) == sorted(map(id, network.parameters()))


def test_the_interval_draws_whole_pairs():
    assert features.interval(torch.ones(30, dtype=torch.bool), 1) == [1.0, 1.0]
    right = torch.tensor([False, True] * 50)
    low, high = features.interval(right.repeat_interleave(8), 8)
    assert low == pytest.approx(0.4, abs=0.03) and high == pytest.approx(0.6, abs=0.03)


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    """With a clock that counts steps, stopping and starting again changes nothing."""

    def run(state, stops):
        for minutes in stops:
            torch.manual_seed(0)
            module = torch.nn.Linear(3, 1)
            ticks = iter(range(1000))
            monkeypatch.setattr(features.time, "process_time", lambda ticks=ticks: next(ticks))

            def step(generator, module=module):
                x = torch.randn(4, 3, generator=generator)
                return module(x).square().mean(), torch.tensor(0.0)

            optimizers = [features.adamw(list(module.parameters()), 0.1)]
            budget = features.Budget(minutes)
            features.train(module, step, budget, state, optimizers, 0)
        return torch.load(state, weights_only=True)

    monkeypatch.setattr(features, "rate", lambda progress, step: 1.0)
    once, twice = run(tmp_path / "a.pt", [0.5]), run(tmp_path / "b.pt", [0.25, 0.5])
    assert once["step"] == twice["step"] == 30
    assert all(torch.equal(once["modules"][k], twice["modules"][k]) for k in once["modules"])


def test_the_shipped_network_knows_its_held_out_pictures():
    """The pictures of `assets/sample`, of pairs that its training did not see."""
    network = FeatureNetwork.load(path("features"))
    rows = list(read_jsonl(path("sample") / "metadata.jsonl"))[::2]
    pixels = [np.asarray(Image.open(path("sample") / row["file_name"])) for row in rows]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        named = network.classify(images)["concept"].argmax(-1)
    truth = network.concept_indices([row["text"][0].split(", ")[0] for row in rows])
    assert (named == truth).float().mean() >= 0.9
