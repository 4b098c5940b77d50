"""Two gloo processes at the same global batch give the losses of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(processes, words, **more):
    """The command in `processes` processes, as `accelerate launch --cpu` starts them.

    `more` are further variables of their environment.
    """
    port = free_port()
    running = []
    for rank in range(processes):
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": 1,
            **more,
        }
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        command = [sys.executable, *map(str, words)]
        running.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        )
    said = [process.communicate(timeout=400)[1] for process in running]
    return [process.returncode for process in running], "".join(said)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_equal_one(command, tmp_path, tiny_folder, pictures):
    flags = ["--max-steps", "6", "--batch-size", "4", "--warmup-steps", "2", "--seed", "3"]
    flags += ["--lr-schedule", "cosine", "--cache-latents", "--cache-embeddings", "--ema", "0.9"]
    flags += ["--checkpoint-every", "3", "--tracker", "none", "--learning-rate", "1e-3"]
    flags += ["--model", tiny_folder("sd-v"), "--data", pictures]
    assert command(*flags, output=tmp_path / "one") == 0
    words = ["scripts/train_denoising.py", *flags, "--accumulation", "2"]
    codes, said = launch(2, [*words, "--output", tmp_path / "two"])
    assert codes == [0, 0], said
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert (a["lr"], a["samples"], a["epoch"]) == (b["lr"], b["samples"], b["epoch"])
        assert a["count_by_time"] == b["count_by_time"]


@pytest.mark.slow
def test_two_players_in_two_processes(tmp_path):
    words, numbers = ["-m", "tests.training.toy"], ["8", "21", "4"]
    for processes, name in ((1, "one"), (2, "two")):
        codes, said = launch(processes, [*words, tmp_path / name, "still", *numbers])
        assert codes == [0] * processes, said
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key


@pytest.mark.slow
def test_one_process_is_stopped_and_both_end(tmp_path):
    """Ctrl-C reaches one process in step 5; both write the checkpoint of the step after it."""
    words = ["-m", "tests.training.toy", tmp_path, "still", "8", "200", "100"]
    codes, said = launch(2, words, STOP_IN=4, LOG_EVERY=100)
    assert codes == [130, 130], said
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]
    assert len(rows(tmp_path)) == 6


@pytest.mark.slow
def test_processes_that_see_other_folders_do_not_go_on(tmp_path):
    """The second process finds no checkpoint, as on a machine with storage of its own."""
    words = ["-m", "tests.training.toy", tmp_path / "mine", "still", "8", "4", "2"]
    codes, said = launch(1, words)
    assert codes == [0], said
    codes, said = launch(2, words, OTHER_OUTPUT=tmp_path / "other")
    assert codes == [1, 1]
    assert said.count("checkpoints of different steps ([4, 0], by rank)") == 2


@pytest.mark.slow
def test_sharded_state_is_plain_state(tmp_path):
    """FSDP2 over two CPU processes writes what one plain process writes, and reads it back."""
    module = ["-m", "tests.training.sharded", tmp_path]
    for processes, mode in ((1, "plain"), (2, "sharded"), (2, "resume")):
        codes, said = launch(processes, [*module, mode])
        assert codes == [0] * processes, said
    for name in ("weights", "optimizer", "average", "result"):
        plain, sharded, resumed = (
            load_file(tmp_path / f"{place}{name}.safetensors")
            for place in ("", "sharded/", "resumed-")
        )
        assert plain.keys() == sharded.keys() == resumed.keys()
        assert all(plain[key].shape == resumed[key].shape for key in plain)
        for key, value in plain.items():
            torch.testing.assert_close(sharded[key], value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "blocks"),
    [("sd", ["BasicTransformerBlock", "ResnetBlock2D"]), ("sd3", ["JointTransformerBlock"])],
)
def test_networks_are_sharded_block_by_block(model, blocks, tiny_folder):
    """Each block is gathered alone, and the loss is that of the whole network."""
    codes, said = launch(2, ["-m", "tests.training.blocks", tiny_folder(model)])
    assert codes == [0, 0], said
    assert all(f"FSDP{block}" in said for block in blocks)


@pytest.mark.slow
def test_sharded_students_ask_sharded_proxies(tiny_folder):
    codes, said = launch(2, ["-m", "tests.training.sharded_reward", tiny_folder("sd-v")])
    assert codes == [0, 0], said
