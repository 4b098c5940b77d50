"""Bad input and bad luck: a clear message, the right exit code, and a good checkpoint kept."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import signal
from datetime import timedelta
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from diffkit.errors import RunFailed, UserError
from diffkit.objectives.base import Phase
from diffkit.training.checkpoints import Checkpoint, Checkpoints
from diffkit.training.devices import make_accelerator, release_accelerator
from diffkit.training.folder import RunFolder
from diffkit.training.players import Player, make_optimizer
from diffkit.training.signals import StopRequest
from diffkit.training.trackers import require_tracker
from tests.training.toy import ToyObjective, TwoPlayers, config_for, train


def steps_kept(folder):
    return [int(path.name[-8:]) for path in sorted((folder / "checkpoints").iterdir())]


@pytest.mark.parametrize("kind", [ToyObjective, TwoPlayers])
def test_nan_stops_and_the_last_checkpoint_is_good(kind, tmp_path):
    """The toy's noise is NaN from epoch 1 on, that is from step 8."""
    with pytest.raises(RunFailed, match=r"step 8: .*loss is nan.*last checkpoint is good"):
        train(config_for(tmp_path), kind(poison=1))
    assert steps_kept(tmp_path) == [4]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert train(config_for(tmp_path), kind()) == 0  # the cause removed, it goes on


def test_no_checkpoint_of_weights_that_are_not_finite(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    good = {"net": {"w": torch.ones(2)}}
    checkpoints.write(Checkpoint(1, good))
    with pytest.raises(RunFailed, match="w of net is not finite"):
        checkpoints.write(Checkpoint(2, {"net": {"w": torch.tensor([1.0, torch.inf])}}))
    assert checkpoints.latest().step == 1


@contextlib.contextmanager
def file_size_limit(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_and_the_last_checkpoint_survives(tmp_path):
    """Small files still fit, a checkpoint does not."""
    run = {"lr_schedule": "constant", "log_every": 1}
    assert train(config_for(tmp_path, max_steps=4, **run), ToyObjective(2000)) == 0
    with file_size_limit(50_000), pytest.raises(RunFailed, match="step-00000008.* size limit"):
        train(config_for(tmp_path, max_steps=9, **run), ToyObjective(2000))
    assert steps_kept(tmp_path) == [4]
    assert train(config_for(tmp_path, max_steps=9, **run), ToyObjective(2000)) == 0
    assert steps_kept(tmp_path) == [8, 9]


def test_a_result_that_does_not_fit(command, tiny_folder, capsys):
    tiny_folder("sd-v")
    with file_size_limit(50_000):
        assert command("--cache-latents", "--cache-embeddings", "--checkpoint-every", 100) == 1
    assert "size limit" in capsys.readouterr().err
    assert command("--cache-latents", "--cache-embeddings", "--checkpoint-every", 100) == 0


def test_two_runs_in_one_folder(tmp_path):
    first, second = RunFolder(config_for(tmp_path)), RunFolder(config_for(tmp_path))
    first.hold()
    with pytest.raises(UserError, match="another process"):
        second.hold()
    first.release()
    second.release()
    second.hold()
    second.release()


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        train(config_for(tmp_path / "file" / "run"), ToyObjective())
    with pytest.raises(UserError, match="is a file"):
        train(config_for(tmp_path / "file"), ToyObjective())


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP, which needs CUDA"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "--mixed-precision bf16"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "--accumulation"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without GPUs cannot do")
def test_launch_configurations_that_cannot_run(variables, message, monkeypatch, tmp_path):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        make_accelerator(config_for(tmp_path))


def test_no_validation_pictures_under_fsdp(monkeypatch, tmp_path):
    """Sharded weights cannot be sampled from; that is said before anything is loaded."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match="validation_prompts.*FSDP"):
        make_accelerator(config_for(tmp_path, validation_prompts=tmp_path / "prompts.txt"))


def test_processes_wait_for_a_slow_one(tmp_path):
    """Writing a checkpoint or filling a cache may take longer than NCCL's own ten minutes."""
    accelerator = make_accelerator(config_for(tmp_path))
    release_accelerator(accelerator)
    assert accelerator.init_handler.timeout >= timedelta(hours=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works there")
def test_fp16_on_a_cpu(tmp_path):
    with pytest.raises(UserError, match="fp16 needs a CUDA GPU"):
        make_accelerator(config_for(tmp_path, mixed_precision="fp16"))


def test_missing_libraries_are_named():
    if find_spec("bitsandbytes") is None:
        with pytest.raises(UserError, match="pip install bitsandbytes"):
            make_optimizer([nn.Parameter(torch.ones(1))], config_for("o", optimizer="adamw8bit"))
    if find_spec("wandb") is None:
        with pytest.raises(UserError, match="pip install wandb"):
            require_tracker("wandb")


def test_a_player_without_parameters(tmp_path):
    with pytest.raises(UserError, match="no trainable parameter"):
        Player("net", nn.Linear(1, 1).requires_grad_(False), config_for(tmp_path), average=False)


def test_frozen_parts_stay(tmp_path):
    objective = ToyObjective()
    frozen = objective.modules["net"].frozen.weight.clone()
    trained = objective.modules["net"].net[0].weight.detach().clone()
    assert train(config_for(tmp_path, max_steps=3, ema=None), objective) == 0
    assert torch.equal(objective.modules["net"].frozen.weight, frozen)
    assert not torch.equal(objective.modules["net"].net[0].weight, trained)


class OnlyGenerator(TwoPlayers):
    """The generator alone takes steps; its loss runs through the critic."""

    def phases(self):
        return (Phase("generator", "generator"),)


def test_a_phase_moves_its_own_player_only(tmp_path):
    objective = OnlyGenerator()
    before = {name: m.net[0].weight.detach().clone() for name, m in objective.modules.items()}
    assert train(config_for(tmp_path, max_steps=3, ema=None), objective) == 0
    after = {name: m.net[0].weight for name, m in objective.modules.items()}
    assert torch.equal(before["critic"], after["critic"])
    assert not torch.equal(before["generator"], after["generator"])
    assert all(p.grad is None for p in objective.modules["critic"].parameters())


def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "31"), "31"),
        (("--batch-size", "3", "--accumulation", "2"), "batch_size: 3"),
        (("--model", "/nowhere/model"), "/nowhere/model"),
        (("--data", "/nowhere/pictures"), "/nowhere/pictures"),
        (("--mixed-precision", "fp16"), "fp16"),
        (("--max-steps", "ten"), "ten"),
        (("--max-stepz", "10"), "--max-steps"),
        (("--validation-prompts", "/nowhere/prompts.txt"), "/nowhere/prompts.txt"),
        (("--config", "/nowhere/config.yaml"), "/nowhere/config.yaml"),
        (("--streaming", "--cache-latents"), "streaming"),
        (("--attention", "telepathy"), "telepathy"),
        (("--lora-rank", "2", "--lora-targets", "to_nothing"), "to_nothing"),
    ],
)
def test_what_cannot_start_exits_2(words, message, command, tmp_path, capsys):
    assert command(*words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_pictures_must_stay_while_a_run_is_not_finished(command, pictures, tmp_path, capsys):
    mine = tmp_path / "mine"
    shutil.copytree(pictures, mine)
    assert command("--max-steps", 3, data=mine) == 0
    lines = (mine / "metadata.jsonl").read_text().splitlines()
    (mine / "metadata.jsonl").write_text("\n".join(lines[:-1]))
    (mine / "13.png").unlink()
    assert command("--max-steps", 6, data=mine) == 2
    assert "added, removed or renamed" in capsys.readouterr().err


def test_a_corrupt_picture_is_named(command, pictures, tmp_path, capsys):
    mine = tmp_path / "mine"
    shutil.copytree(pictures, mine)
    (mine / "3.png").write_bytes((mine / "3.png").read_bytes()[:60])
    assert command(data=mine) in (0, 1)
    assert "3.png" in capsys.readouterr().err
