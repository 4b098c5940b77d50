"""Metrics by name: what each needs, what it is called, why it cannot be computed."""

from __future__ import annotations

import pytest
import torch

from diffkit.errors import UserError
from diffkit.evaluation.metrics.base import Situation
from diffkit.evaluation.metrics.registry import GROUPS, METRICS, select
from diffkit.evaluation.metrics.tools import NETWORKS, Toolbox

CAPTIONS = ("frog, noto style, red background", "owl, fluent 3d style, blue background")
INPUTS = {"prompts", "reference", "against"}


def situation(prompts=CAPTIONS, has=INPUTS, n_reference=100) -> Situation:
    groups = torch.tensor([list(dict.fromkeys(prompts)).index(text) for text in prompts])
    return Situation(frozenset(has), prompts, groups, n_reference, Toolbox(prompts=prompts))


def names(metrics) -> tuple[str, ...]:
    return tuple(metric.name for metric in metrics)


def test_names_and_groups_are_chosen_once_and_in_order():
    assert names(select(["psnr", "pairs", "frechet"])) == ("frechet", *GROUPS["pairs"])
    assert names(select([])) == names(select(["all"])) == tuple(METRICS)
    with pytest.raises(UserError, match=r"--metrics fid: unknown\. Metrics: frechet.*quality"):
        select(["fid"])


def test_every_metric_belongs_to_a_group_and_names_its_needs():
    grouped = {name for group in GROUPS.values() for name in group}
    assert grouped == set(METRICS)
    for name, metric in METRICS.items():
        assert metric.name == name and metric.about.endswith(".")
        assert metric.needs <= INPUTS | NETWORKS | {"features"}
        assert ("features" in metric.needs) == (metric.kind == "set")


@pytest.mark.parametrize(
    ("name", "without", "reason"),
    [
        ("frechet", "reference", "give --data"),
        ("psnr", "against", "give --against"),
        ("alignment", "prompts", "no prompts"),
    ],
)
def test_a_missing_input_is_the_reason(name, without, reason):
    assert reason in METRICS[name].missing(situation(has=INPUTS - {without}))
    assert METRICS[name].missing(situation()) is None


@pytest.mark.parametrize(
    ("name", "prompts", "reason"),
    [
        ("retrieval", ["a", "a"], "same prompt"),
        ("concept", ["a horse in space", CAPTIONS[0]], "'a horse in space' names no concept"),
        ("style", ["frog", "owl"], "'frog' names no style"),
        ("style", ["frog, noto style", "owl, noto style"], "the same style"),
        ("background", ["frog, pink background", CAPTIONS[0]], "names no background"),
        ("diversity", CAPTIONS, "every prompt has one picture"),
        ("recall", CAPTIONS, "more than 5 pictures"),
    ],
)
def test_prompts_that_do_not_fit_are_the_reason(name, prompts, reason):
    assert reason in METRICS[name].missing(situation(tuple(prompts)))


def test_captions_that_fit_are_measured():
    for name in ("retrieval", "concept", "style", "background"):
        assert METRICS[name].missing(situation()) is None


def test_a_missing_backbone_is_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "Download https://" in METRICS["lpips"].missing(situation())
