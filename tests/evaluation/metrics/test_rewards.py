"""Rewards as metrics of an evaluation."""

from __future__ import annotations

import pytest
import torch
from diffkit.assets import path

from diffkit.errors import UserError
from diffkit.evaluation.metrics.base import SampleBatch
from diffkit.evaluation.metrics.registry import METRICS, select
from diffkit.evaluation.metrics.tools import Toolbox
from diffkit.evaluation.pictures import PictureSet
from diffkit.evaluation.selection import Selection
from diffkit.evaluation.values import measure_samples


def test_the_embedded_reward_is_the_alignment(tmp_path):
    """And its values are kept in a file whose name every file system takes."""
    pictures = PictureSet.open(path("sample"), num=16)
    tools = Toolbox(prompts=pictures.prompts)
    (metric,) = select(["reward:embedded"])
    both = [metric, METRICS["alignment"]]
    found = measure_samples(both, pictures, None, tools, tmp_path, "model")
    torch.testing.assert_close(found["reward:embedded"], found["alignment"])
    assert (tmp_path / "reward-embedded-model.jsonl").is_file()
    assert metric.title(None, tools) == "reward (diffkit text-image scorer)"
    assert "64x64" in metric.resize(None, tools) and metric.better == "higher"


def test_prompts_outside_the_run_are_read_too():
    tools = Toolbox(prompts=["a cat"])
    images = torch.zeros(2, 3, 64, 64)
    (metric,) = select(["reward:embedded@16"])
    inside = metric.run(SampleBatch(images, ("a cat", "a cat")), tools)
    beside = metric.run(SampleBatch(images, ("a cat", "a dog")), tools)
    torch.testing.assert_close(inside[0], beside[0])
    assert inside[1] != beside[1]


def test_rewards_are_named_beside_groups():
    chosen = Selection.parse(["pairs", "reward:hpsv2:/weights.safetensors", "reward:aesthetic:/h"])
    assert [metric.name for metric in chosen.metrics][-2:] == ["reward:hpsv2", "reward:aesthetic"]
    assert chosen.named == {"reward:hpsv2", "reward:aesthetic"}
    assert "prompts" in chosen.metrics[-2].needs and "prompts" not in chosen.metrics[-1].needs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reward:nothing"], "reward 'nothing': unknown. Known: embedded, hpsv2"),
        (["reward:hpsv2", "reward:hpsv2:/a"], "is named with other weights too"),
        (["rewards"], "unknown"),
    ],
)
def test_wrong_names_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        Selection.parse(words)
