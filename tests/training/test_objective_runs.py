"""The objectives with a state of their own: what was stopped, killed, split or shared out equals
what was not.

Their running means, controllers and moving averages may only follow from what is equal on all
processes, and a checkpoint has to hold every one of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffkit.cli import main
from diffkit.training.configfile import load
from diffkit.training.registry import METHODS
from tests.data.pairs import pair_folder
from tests.data.trajectory_folder import build
from tests.training.test_denoising_runs import rows
from tests.training.test_processes import launch

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow

LPL = ("lpl", "--lpl.threshold", 0.05, "--lpl.share", 0.3)
PIXEL = ("pixel", "--pixel.calibration", 4, "--pixel.crop-latent", 8)
PREFERENCE = ("preference", "--denoising.condition-dropout", 0.2)
DPO = (*PREFERENCE, "--preference.kappa", 100)
ADAPTIVE = (*DPO, "--preference.loss", "adaptive_dpo", "--adaptive.warmup-steps", 2)
ADAPTIVE += ("--adaptive.margin", "quadratic")
LORA = ("--lora-rank", 2)
GRID = ("--lcd.solver-steps", 10, "--lcd.guidance-min", 1, "--lcd.guidance-max", 3)
GRID += ("--lcd.diversity-every", 2)
LCD = ("lcd", *GRID)
BOTH = ("--reward.rewards", "embedded:1,embedded@8:0.5")
DIRECT = ("rg_lcd", *GRID, *BOTH)
REFIT = ("rg_lcd", *GRID, *BOTH, "--reward.mode", "proxy", "--reward.refit-rate", "1e-3")
REFIT += ("--reward.refit-every", 2, "--reward.refit-share", 0.6, "--reward.smooth-real")
GAN = ("gan", "--gan.regression", "mse", "--gan.warmup", 2, "--gan.r1-every", 2, "--gan.gamma", 9)
GAN += ("--gan.diversity-every", 2)
TAPS = ("proxy_reward", "--proxy.network", "taps", "--proxy.group", 2)
CASES = {
    "lpl": LPL,
    "lpl, lora": (*LPL, *LORA, "--lpl.memory", "low"),
    "pixel": PIXEL,
    "pixel, lora": (*PIXEL, *LORA),
    "adaptive": (*ADAPTIVE, "--ema", 0.9),
    "adaptive, lora": (*ADAPTIVE, *LORA, "--adaptive.stability", "std"),
    "dpo": (*DPO, "--preference.sdpo"),
    "dpo, lora": (*DPO, *LORA, "--preference.anchor", 0.05),
    "alpha": (*DPO, "--preference.loss", "alpha_dpo", "--preference.drift-limit", 2),
    "simpo": (*PREFERENCE, "--preference.loss", "simpo", "--preference.pixel", "simpo"),
    "lcd": (*LCD, "--ema", 0.9),
    "lcd, lora": (*LCD, *LORA),
    "reward": DIRECT,
    "reward, lora": (*DIRECT, *LORA),
    "refit": REFIT,
    "refit, lora": (*REFIT, *LORA),
    "proxy": TAPS,
    "gan": (*GAN, "--ema", 0.9),
    "gan, lora": (*GAN, *LORA, "--gan.discriminator", "ladd"),
    "dmd": (*GAN, "--gan.dmd", "--dmd.updates", 2, "--gan.r1", "approximate"),
}
STATES = {
    "lpl": {"lpl"},
    "pixel": {"calibration"},
    "adaptive": {"annotator_slow", "annotator_fast", "preference"},
    "lcd": {"target", "diversity"},
    "lcd, lora": {"diversity"},
    "gan": {"gan", "diversity"},
    "reward": {"target", "diversity", "shares"},
    "refit": {"target", "diversity", "shares", "temperature"},
}
FAST = ("lpl", "pixel", "adaptive")
KILLED = (*FAST, "lcd", "reward", "refit", "gan")
# Adaptive-DPO magnifies what the model learnt to order one, with the rounding in it, which depends
# on the split. A new LoRA says too little for that; all weights do at a large rate, at which in
# turn the other losses magnify it. So does the sign of what a new LoRA says, the accuracy.
SPLIT = tuple(name for name in CASES if name != "adaptive, lora")


def split_rate(case):
    """The learning rate at which splits are compared."""
    return "--learning-rate", "1e-3" if case in ("adaptive", "dpo", "dpo, lora") else "1e-4"


def cases(*fast, among=tuple(CASES)):
    return [pytest.param(name, marks=[] if name in fast else SLOW) for name in among]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Seven pairs of different shapes, a picture and a prompt each."""
    return pair_folder(tmp_path_factory.mktemp("pairs"), 7, ((32, 32), (40, 32)))


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    """Ten noise-image pairs of the tiny model's kind."""
    return build(tmp_path_factory.mktemp("trajectories") / "pairs")


@pytest.fixture
def words(pictures, pairs, trajectories, tmp_path, tiny_folder):
    """(name of a case, output, more flags) -> the words after `diffkit train`."""

    def words(case, output, *more):
        method, *own = CASES[case]
        data = {"preference": pairs, "gan": trajectories}.get(method, pictures)
        found = [method, "--model", tiny_folder("sd-v"), "--data", data, "--tracker", "none"]
        found += ["--output", tmp_path / output, "--batch-size", 4, "--max-steps", 6]
        found += ["--learning-rate", "1e-3", "--warmup-steps", 0, "--checkpoint-every", 3]
        found += ["--seed", 3, *own, *more]
        # Trajectories are latents as they are.
        found += [] if method == "gan" else ["--flip"]
        return [str(w) for w in found if (method, w) != ("gan", "--cache-latents")]

    return words


def tensors(folder):
    """Everything that the last checkpoint and the result hold, by file and name."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    results = [
        path
        for name in ("model", "lora", "proxy")
        for path in (folder / name).rglob("*.safetensors")
    ]
    files = [*sorted(last.glob("*.safetensors")), *sorted(results)]
    return {(f.parent.name, f.name, name): t for f in files for name, t in load_file(f).items()}


def assert_same(first, second):
    assert rows(first) == rows(second)
    left, right = tensors(first), tensors(second)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def assert_close(one, other):
    """All that is logged and all that the objective keeps agree to 1e-4.

    Of weights, the whole does: Adam makes a whole step of a gradient that is next to nothing.
    """
    first, second = rows(one), rows(other)
    assert len(first) == len(second) == 6
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"loss_by_time"}:
            near = 1e-3 if key.endswith("grad_norm") else 1e-4
            expected = a[key] if a[key] is None else pytest.approx(a[key], rel=near, abs=1e-5)
            assert b[key] == expected, (a["step"], key)
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for key, value in left.items():
        if key[1].endswith(".state.safetensors"):
            gap = torch.linalg.vector_norm(right[key] - value)
            assert gap <= 1e-4 * torch.linalg.vector_norm(value) + 1e-7, key


def states(folder):
    """Names of what the last checkpoint holds beside the players."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    return {f.name.split(".")[0] for f in last.glob("*.state.safetensors")}


@pytest.mark.parametrize("case", cases(*FAST))
def test_stopped_and_resumed_is_uninterrupted(case, words, tmp_path):
    """Bit for bit: the rows, the weights and all that the objective keeps."""
    assert main(["train", *words(case, "whole")]) == 0
    for steps in (3, 6):
        assert main(["train", *words(case, "parts", "--max-steps", steps)]) == 0
    assert_same(tmp_path / "whole", tmp_path / "parts")
    if case in STATES:
        assert states(tmp_path / "whole") == STATES[case]


@pytest.mark.parametrize("case", cases("adaptive", among=SPLIT))
def test_parts_of_a_batch_equal_the_batch(case, words, tmp_path):
    assert main(["train", *words(case, "one", *split_rate(case))]) == 0
    assert main(["train", *words(case, "parts", *split_rate(case), "--accumulation", 2)]) == 0
    assert_close(tmp_path / "one", tmp_path / "parts")


@SLOW
@pytest.mark.parametrize("case", SPLIT)
def test_two_processes_equal_one(case, words, tmp_path):
    more = ("--cache-latents", "--cache-embeddings", *split_rate(case))
    assert main(["train", *words(case, "one", *more)]) == 0
    method, *flags = words(case, "two", *more)
    script = f"scripts/train_{method}.py"
    codes, said = launch(2, [script, *flags])
    assert codes == [0, 0], said
    assert_close(tmp_path / "one", tmp_path / "two")


def start(words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"scripts/train_{words[0]}.py", *words[1:]]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@SLOW
@pytest.mark.parametrize("case", KILLED)
def test_killed_and_resumed_is_uninterrupted(case, words, tmp_path):
    flags = ("--max-steps", 24, "--checkpoint-every", 5, "--log-every", 1)
    flags += ("--learning-rate", "1e-4")
    assert main(["train", *words(case, "whole", *flags)]) == 0
    metrics = tmp_path / "killed" / "metrics.jsonl"
    for moment in (8, 17):
        process = start(words(case, "killed", *flags))
        while process.poll() is None:
            made = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            if made >= moment:
                break
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert main(["train", *words(case, "killed", *flags)]) == 0
    assert_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("case", cases("adaptive"))
def test_a_configuration_file_says_the_same(case, words, tmp_path):
    """config.yaml of a run, given back with --config, is that run."""
    assert main(["train", *words(case, "first", "--max-steps", 3)]) == 0
    file = tmp_path / "first" / "config.yaml"
    method = CASES[case][0]
    again = ["--config", file, "--output", tmp_path / "second"]
    assert main(["train", method, *map(str, again)]) == 0
    first, second = (
        load(tmp_path / name / "config.yaml", METHODS[method].config)
        for name in ("first", "second")
    )
    assert replace(second, output=first.output, config=first.config) == first
    assert_same(tmp_path / "first", tmp_path / "second")


@pytest.mark.parametrize("case", cases(*FAST))
def test_a_dry_run_writes_nothing(case, words, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", *words(case, "out", "--dry-run")]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    counted = {"preference": "pairs: 7 (1.8 steps", "gan": "pairs: 10 (2.5 steps"}
    counted = counted.get(CASES[case][0], "pictures: 14")
    assert counted in said and "one step, measured without caches" in said
