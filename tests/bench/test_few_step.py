"""The benchmark of few-step training: counted arithmetic, and every part on the embedded model."""

from __future__ import annotations

from pathlib import Path

import few_step
import few_step_metric
import pytest

from diffkit.files import read_json


@pytest.mark.slow
def test_counted_arithmetic_is_the_papers_order() -> None:
    """GMAC of value and gradient at 512 pixels: three passes of the trunk (38.5), or of the one
    that pools before (15); three of decoder (1257) and VGG, or two where the target's picture is
    there."""
    found = few_step_metric.counted()
    ours = found["E-LatentLPIPS"]
    assert ours == pytest.approx(3 * 38.5, rel=0.01)
    assert found["E-LatentLPIPS, pre-pool"] == pytest.approx(45, rel=0.01)
    assert found[few_step_metric.GIVEN] / ours == pytest.approx(24, rel=0.05)
    assert found[few_step_metric.DECODED] > 3 * 1257


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path) -> None:
    words = ["--parts", "latency", "gan", "reward", "--pairs", "1", "--batch", "2", "--steps", "2"]
    assert few_step.main([*words, "--output", str(tmp_path)]) == 0
    latency, gan, reward = (
        read_json(tmp_path / f"few_step_{part}.json") for part in ("latency", "gan", "reward")
    )
    assert latency["n"] == 4 and latency["bound"] > 1
    assert gan["batch 2"]["r1_share"] > 0
    assert {"head on the teacher", "latent vit"} <= reward.keys()
