"""Prompts against pictures on the shipped sample, whose captions are known to be true."""

from __future__ import annotations

import pytest
import torch
from diffkit.assets import path

from diffkit.evaluation.metrics.base import SampleBatch
from diffkit.evaluation.metrics.captions import BACKGROUNDS, Caption, background_of
from diffkit.evaluation.metrics.registry import METRICS
from diffkit.evaluation.metrics.tools import Toolbox
from diffkit.evaluation.pictures import PictureSet, to_float


@pytest.fixture(scope="module")
def sample():
    """128 images, sixteen concepts on eight backgrounds, their captions, and the networks."""
    pictures = PictureSet.open(path("sample"), num=128)
    images = torch.cat([batch.images for batch in pictures.batches(64)])
    return images, pictures.prompts, Toolbox(prompts=pictures.prompts)


def values(name: str, sample, shift: int = 0) -> torch.Tensor:
    """The metric of every picture with its own caption, or with that of `shift` pictures on."""
    images, prompts, tools = sample
    moved = prompts[shift:] + prompts[:shift]
    found = METRICS[name].run(SampleBatch(images, moved), tools)
    assert found.shape == (128,) and found.dtype == torch.float32
    return found


def test_true_captions_fit_better_than_others(sample):
    """Pictures come in eights of one concept and style: eight on is another concept."""
    own, other = values("alignment", sample), values("alignment", sample, shift=8)
    assert (own > other).float().mean() > 0.95
    assert own.mean() > other.mean() + 0.4
    assert own.abs().max() <= 1 and other.abs().max() <= 1


def test_the_own_prompt_is_found_among_128(sample):
    assert values("retrieval", sample).mean() > 0.7
    assert values("retrieval", sample, shift=8).mean() < 0.05


def test_concepts_styles_and_backgrounds_are_recognised(sample):
    """The pairs of concept and style are held out of the training of the classifier."""
    assert values("concept", sample).mean() > 0.9
    assert values("style", sample).mean() > 0.6
    assert values("background", sample).mean() == 1


def test_shuffled_captions_score_nothing(sample):
    assert values("concept", sample, shift=8).mean() < 0.02
    assert values("background", sample, shift=1).mean() == 0


def test_style_of_exchanged_captions(sample):
    """Every caption gets a style that its picture has not: all hits become misses."""
    images, prompts, tools = sample
    styles = sorted({str(Caption.parse(text).style) for text in prompts})
    turned = []
    for text in prompts:
        style = str(Caption.parse(text).style)
        wrong = styles[(styles.index(style) + 1) % len(styles)]
        turned.append(text.replace(f", {style} style", f", {wrong} style"))
    hits = METRICS["style"].run(SampleBatch(images, tuple(turned)), tools)
    own = values("style", sample)
    assert not (hits.bool() & own.bool()).any() and hits.mean() <= 1 - own.mean()


def test_the_palette_names_itself():
    colours = to_float(torch.tensor(list(BACKGROUNDS.values()), dtype=torch.uint8))
    images = colours[:, :, None, None].expand(-1, 3, 48, 80)
    assert background_of(images) == list(BACKGROUNDS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red apple, noto style, blue background", ("red apple", "noto", "blue")),
        ("owl, gray background, fluent 3d style", ("owl", "fluent 3d", "gray")),
        ("owl", ("owl", None, None)),
        ("", (None, None, None)),
        ("a photo, of style", ("a photo", "of", None)),
    ],
)
def test_captions_are_read(text, expected):
    caption = Caption.parse(text)
    assert (caption.concept, caption.style, caption.background) == expected
