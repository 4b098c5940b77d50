"""The benchmark of protection: its plain attack is what it says, its report is whole."""

from __future__ import annotations

import json
from pathlib import Path

import protection_cost
import pytest
import torch
from bench import protection
from real_sizes import REAL_SIZES, conditioning

from diffkit.files import read_json


def test_the_plain_attack_walks_and_wastes_what_it_is_said_to() -> None:
    """It moves the picture by levels, leaves gradients on the U-Net's weights, and calls the U-Net
    on picture and target."""
    setting = protection.Setting("tiny")
    arm = protection.plain_arm(setting)
    attack = arm.step.__self__  # type: ignore[attr-defined]
    calls: list[int] = []
    hook = attack.unet.register_forward_hook(lambda *_: calls.append(1))
    arm.step()
    hook.remove()
    assert len(calls) == 2
    moved = (attack.x - attack.clean) * 127.5
    assert moved.abs().max() == pytest.approx(1, abs=1e-4)
    assert any(p.grad is not None for p in attack.unet.parameters())
    assert all(p.grad is None for p in attack.vae.parameters())


@pytest.mark.parametrize("lean", [False, True])
def test_our_arms_are_the_real_attack(lean: bool) -> None:
    with protection.our_arm(protection.Setting("tiny", batch=2), "SDS", lean) as arm:
        arm.step()
        arm.step()
        assert not any(p.requires_grad for network in arm.networks for p in network.parameters())


def test_counting_predicts_more_for_the_shorter_step() -> None:
    rows = protection.counted(protection.Setting("tiny"))
    expected = {name: row["predicted"] for name, row in rows.items()}
    assert expected["plain AdvDM"] == 1 < expected["AdvDM"] < expected["SDS"]
    assert expected["AdvDM, low VRAM"] < expected["AdvDM"]
    assert all(row["saved_bytes"] > 0 for row in rows.values())


@pytest.mark.slow
def test_score_distillation_keeps_less_than_half_of_the_plain_attack() -> None:
    """At Stable Diffusion's true size, where the plain step costs what the arithmetic says: the
    encoder thrice forward or back, the U-Net on two pictures, again for checkpoints, and back to
    inputs and weights."""
    shape = REAL_SIZES["SD1.5"]
    with torch.device("meta"):
        pipeline = shape.build()
    tokens = conditioning(shape).tokens
    assert tokens is not None
    theirs = protection_cost.plain(pipeline, shape.size, tokens)
    mine = protection_cost.ours(shape.skeleton(), shape.size, conditioning(shape), ("SDS",))
    assert mine["SDS"]["saved_gb"] < 0.5 * theirs["saved_gb"]
    encoder, forward, backward = 1.08, 0.68, 0.67
    expected = 3 * encoder + 2 * forward + backward + 0.68  # and weights
    assert expected < theirs["tflop"] < expected + 0.68
    assert theirs["tflop"] / mine["SDS"]["tflop"] == pytest.approx(2.3, abs=0.1)


@pytest.mark.slow
def test_the_whole_benchmark_writes_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "tiny", "--pairs", "2", "--sizes", "SD1.5"]
    assert protection.main([*flags, "--output", str(tmp_path)]) == 0
    report = read_json(tmp_path / "protection.json")
    assert set(report["steps"]) == {
        "plain AdvDM", "AdvDM", "SDS", "AdvDM, low VRAM", "SDS, low VRAM"
    }  # fmt: skip
    assert report["counted"]["SD1.5@512"]["SDS"]["tflop"] == pytest.approx(2.84, rel=0.05)
    assert set(report["peak_bytes"]) == {"model alone", *report["steps"]}
    assert json.dumps(report)
    printed = capsys.readouterr().out
    assert "SDS / plain AdvDM speed" in printed
    assert "share reached" in printed
