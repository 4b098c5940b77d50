"""The measures of samples of fixed captions, on pictures of which everything is known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from diffkit.assets import path
from gates import read_pictures
from runner.judge import Asked, Distances, Judge, scorer_features
from torch import Tensor

from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.text_image_scorer import TextImageScorer

STYLES = ("noto", "twemoji", "fluent flat", "fluent 3d")


@pytest.fixture(scope="module")
def known() -> tuple[Judge, Tensor]:
    """A judge of four concepts and four styles, and the sample's own pictures of them (8, 4, ...).

    The first rows are a concept each, of another style each, the others several concepts of a
    style.
    """
    images, rows = read_pictures(path("sample"))
    concepts = [next(r["concept"] for r in rows if r["style"] == style) for style in STYLES]
    places = [[i for i, r in enumerate(rows) if r["concept"] == name][:4] for name in concepts]
    places += [[i for i, r in enumerate(rows) if r["style"] == style][::16] for style in STYLES]
    grid = images[torch.tensor(places)]
    asked = [Asked(name, name.replace("_", " ")) for name in concepts]
    asked += [Asked(f"{style} style", None, style) for style in STYLES]
    return Judge(FeatureNetwork.load(path("features")), asked, images, grid), grid


def scores(judge: Judge, images: Tensor, order: Sequence[int] | None = None) -> dict[str, float]:
    chosen = images if order is None else images[list(order)]
    return judge.scores(chosen.mean(2, keepdim=True), chosen)


def test_real_pictures_are_what_was_asked_for(known: tuple[Judge, Tensor]) -> None:
    judge, images = known
    own = scores(judge, images)
    assert own["concept"] == 1 and own["style"] >= 0.8
    assert own["shaded"] == 0.25  # one of the four concepts
    assert own["diversity"] > 0


def test_pictures_of_other_captions_are_not(known: tuple[Judge, Tensor]) -> None:
    """And to the pictures as a whole, of which captions are no part, they are as near."""
    judge, images = known
    own, swapped = scores(judge, images), scores(judge, images, (1, 2, 3, 0, 5, 6, 7, 4))
    assert swapped["concept"] == 0 and swapped["style"] <= 0.2
    assert swapped["kernel"] == pytest.approx(own["kernel"])
    assert swapped["kernel_taught"] == pytest.approx(own["kernel_taught"])


def test_blurred_pictures_are_taken_for_shaded_ones(
    known: tuple[Judge, Tensor],
) -> None:
    """So a soft student is far from the pictures, whatever else it does well."""
    judge, images = known
    flat = images.flatten(0, 1)
    soft = torch.nn.functional.avg_pool2d(flat, 9, 1, 4, count_include_pad=False)
    own, blurred = scores(judge, images), scores(judge, soft.unflatten(0, images.shape[:2]))
    assert blurred["shaded"] > own["shaded"]
    for distance in ("kernel", "kernel_taught", "kernel_looks"):
        assert blurred[distance] > own[distance] + 0.05


def test_distances_by_the_scorer_have_the_size_of_the_others(known: tuple[Judge, Tensor]) -> None:
    """Its unit vectors alone would leave a cubic kernel next to nothing to tell apart."""
    judge, images = known
    scorer = TextImageScorer.load(path("scorer"))
    rows = scorer_features(scorer, images.flatten(0, 1))
    assert float(rows.square().mean()) == pytest.approx(1, rel=1e-5)
    features = partial(scorer_features, scorer)
    found = Distances(features, judge.asked, images.flatten(0, 1), images, "scorer").of(images)
    assert set(found) == {"scorer", "scorer_taught", "scorer_looks"}
    grey = Distances(features, judge.asked, images.flatten(0, 1), images, "scorer").of(0 * images)
    assert all(grey[name] > found[name] + 1 for name in found)
