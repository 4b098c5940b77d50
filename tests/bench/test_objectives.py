"""The benchmark of objectives: its script does what it is said to, its arms train, its report is
whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lpl_step
import objective_steps
import objectives
import pytest
import torch
from lpl_script import README, ScriptLoss, inliers

from diffkit.files import read_json
from diffkit.models.codec import Codec
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.perceptual.outliers import outlier_mask


@pytest.fixture(scope="module")
def arms() -> lpl_step.Arms:
    return lpl_step.Arms(64, tiny=True)


@pytest.fixture(scope="module")
def vae(arms: lpl_step.Arms) -> Any:
    return arms.vae()


def test_the_script_is_as_described(arms: lpl_step.Arms, vae: Any) -> None:
    """No `post_quant_conv`; a mask of one branch, so that equal latents have a distance; the mean
    over layers; halving weights."""
    predicted, true = (z.detach() for z in arms.latents())
    features = ScriptLoss(vae).features(true)
    ours = list(Codec(vae).features(true, Codec(vae).feature_names))
    assert [f.shape for f in features] == [f.shape for f in ours]
    assert not any(torch.allclose(a, b) for a, b in zip(features, ours, strict=True))
    plain = ScriptLoss(vae)
    assert plain(true, true).item() == 0
    assert ScriptLoss(vae, masked=True)(true, true).item() > 0
    pairs = list(zip(plain.features(predicted), features, strict=True))
    layers = [plain.layer(i, *pair) for i, pair in enumerate(pairs)]
    torch.testing.assert_close(plain(predicted, true), sum(layers) / 5)
    halved = ScriptLoss(vae, halving=True)(predicted, true)
    weights = (1, 0.5, 0.25, 0.125, 0.125)
    expected = sum(w * layer for w, layer in zip(weights, layers, strict=True)) / 5
    torch.testing.assert_close(halved, expected)
    assert README == {"shared": True, "halving": True, "masked": True}


def test_the_masks_differ_in_ties_and_sampling_alone() -> None:
    maps = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    maps[0, 1, 20:25, 30:35] = 50.0
    for ratio, down in ((4, 2), (8, 1)):
        assert torch.equal(inliers(maps, down), outlier_mask(maps, ratio))


def test_every_way_has_a_gradient(arms: lpl_step.Arms, vae: Any) -> None:
    grads = {name: arms.step(name, vae)() for name in lpl_step.ARMS}
    assert all(grad.isfinite().all() and grad.any() for grad in grads.values())
    torch.testing.assert_close(grads[lpl_step.PLAIN], grads[lpl_step.LOW], rtol=1e-4, atol=1e-6)
    checkpointed = grads[f"{lpl_step.SCRIPT}, blocks checkpointed"]
    torch.testing.assert_close(grads[lpl_step.SCRIPT], checkpointed)


@pytest.mark.slow
def test_steps_train_the_denoiser_and_nothing_else(tiny_folder: Any, tmp_path: Path) -> None:
    for name in objective_steps.ARMS:
        model = LatentDiffusion.load(tiny_folder("sd"))
        before = [p.clone() for p in model.denoiser.model.parameters()]
        frozen = [p.clone() for p in model.codec.vae.parameters()]
        step = objective_steps.build(name, model, 4, tmp_path)
        assert torch.stack([step(), step()]).isfinite().all(), name
        pairs = zip(before, model.denoiser.model.parameters(), strict=True)
        assert any(not torch.equal(a, b) for a, b in pairs), name
        assert all(map(torch.equal, frozen, model.codec.vae.parameters())), name


@pytest.mark.slow
def test_memory_at_stable_diffusions_size() -> None:
    """At 512 pixels and K = 4 in bfloat16: what the low-memory mode keeps is one gradient of the
    latents' size, far below the 694 MiB of checkpointed blocks and losses; and all that it holds at
    any time is below 0.4 of the script's."""
    rows = lpl_step.counted(512)
    script, low = rows[lpl_step.SCRIPT], rows[lpl_step.LOW]
    assert low["kept"] == 4 * 64 * 64 * 4 / 2**20
    assert low["working"] < 0.4 * script["working"]
    assert rows[lpl_step.PLAIN]["kept"] < 0.75 * script["kept"]


@pytest.mark.slow
def test_the_whole_benchmark_writes_its_report(
    tiny_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tiny", "--size", "64", "--pairs", "2", "--batch", "4"]
    flags += ["--model", str(tiny_folder("sd")), "--output", str(tmp_path)]
    assert objectives.main(flags) == 0
    report = read_json(tmp_path / "objectives.json")
    arms = set(objective_steps.ARMS)
    assert set(report["steps"]) == arms - {objective_steps.BASELINE}
    assert set(report["steps_peak_bytes"]) == arms
    assert len(report["script"]) == 3 and len(report["counted"]) == 5
    assert set(report["script_peak_bytes"]) == set(lpl_step.ARMS)
    printed = capsys.readouterr().out
    assert "LPL, low memory: keeps 0.00 MiB" in printed
    assert "of plain fine-tuning" in printed
