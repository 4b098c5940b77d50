"""A run that was stopped and resumed equals one that was not, bit by bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from diffkit.errors import RunFailed
from tests.training.toy import ToyObjective, TwoPlayers, config_for, train


def rows(folder):
    """metrics.jsonl without the timings."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def tensors(folder):
    """Everything that the last checkpoint and the result hold, by file and name."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    files = [*sorted(last.glob("*.safetensors")), *sorted((folder / "model").iterdir())]
    return {(f.name, name): t for f in files for name, t in load_file(f).items()}


def assert_same(first, second):
    assert rows(first) == rows(second)
    left, right = tensors(first), tensors(second)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(objective class, accumulation) -> (folder, the samples that it drew), trained once."""
    made = {}

    def run(kind, accumulation):
        if (kind, accumulation) not in made:
            folder = tmp_path_factory.mktemp("whole")
            objective = kind()
            assert train(config_for(folder, accumulation=accumulation), objective) == 0
            made[kind, accumulation] = folder, objective.seen
        return made[kind, accumulation]

    return run


# Seven steps an epoch: inside epochs 0, 1 and 2, and at both borders.
@pytest.mark.parametrize("stop", [3, 7, 10, 14, 17])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", [ToyObjective, TwoPlayers])
def test_stopped_and_resumed_is_uninterrupted(kind, accumulation, stop, uninterrupted, tmp_path):
    whole, seen = uninterrupted(kind, accumulation)
    config = config_for(tmp_path, accumulation=accumulation)
    before, after = kind(), kind()
    assert train(config, before, stop_in=stop) == 130
    assert len(rows(tmp_path)) == stop + 1
    assert train(config, after) == 0
    assert before.seen + after.seen == seen
    assert_same(whole, tmp_path)


def test_several_stops(uninterrupted, tmp_path):
    whole, _ = uninterrupted(TwoPlayers, 1)
    for stop in (0, 1, 6, 13, 19):
        assert train(config_for(tmp_path), TwoPlayers(), stop_in=stop) == 130
    assert train(config_for(tmp_path), TwoPlayers()) == 0
    assert_same(whole, tmp_path)


def test_every_sample_once_an_epoch(uninterrupted):
    _, seen = uninterrupted(ToyObjective, 1)
    for epoch in range(3):
        assert sorted(index for e, index, _ in seen if e == epoch) == list(range(14))


def test_phases_run_when_they_are_due(uninterrupted):
    folder, seen = uninterrupted(TwoPlayers, 1)
    found = rows(folder)
    assert [r["step"] for r in found if "penalty/loss" in r] == [1, 17]
    assert all({"critic/loss", "critic/gap", "generator/loss"} <= r.keys() for r in found)
    # Repeat 0 is drawn once for all phases of a step, repeats 1 to 4 for the critic alone.
    assert [repeat for *_, repeat in seen[:10:2]] == [0, 1, 2, 3, 4]
    assert len(seen) == 21 * 5 * 2


def test_rows_beyond_the_checkpoint_are_made_again(uninterrupted, tmp_path):
    """A killed run leaves rows that its last checkpoint does not know, and perhaps half a row."""
    whole, _ = uninterrupted(ToyObjective, 1)
    assert train(config_for(tmp_path), ToyObjective(), stop_in=9) == 130
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 11, "loss": 9.0}\n{"step": 12, "lo')
    assert train(config_for(tmp_path), ToyObjective()) == 0
    assert_same(whole, tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "missing", "no state"])
def test_a_damaged_checkpoint_is_passed_over(damage, uninterrupted, tmp_path, capsys):
    whole, _ = uninterrupted(ToyObjective, 1)
    assert train(config_for(tmp_path), ToyObjective(), stop_in=9) == 130
    last = sorted((tmp_path / "checkpoints").iterdir())[-1]
    file = last / ("state.json" if damage == "no state" else "net.safetensors")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        file.unlink()
    assert train(config_for(tmp_path), ToyObjective()) == 0
    assert "damaged" in capsys.readouterr().err
    assert_same(whole, tmp_path)


def test_old_checkpoints_go(uninterrupted):
    folder, _ = uninterrupted(ToyObjective, 1)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000020", "step-00000021"]


def test_a_longer_run_equals_one_of_that_length(tmp_path):
    """max_steps may grow as long as the rates of the steps that were made stay the same."""
    long = {"lr_schedule": "constant", "max_steps": 20}
    assert train(config_for(tmp_path / "a", **long), ToyObjective()) == 0
    short = long | {"max_steps": 9}
    assert train(config_for(tmp_path / "b", **short), ToyObjective()) == 0
    assert train(config_for(tmp_path / "b", **long), ToyObjective()) == 0
    assert_same(tmp_path / "a", tmp_path / "b")


def test_what_an_objective_keeps_beside_its_players_comes_back(tmp_path):
    """A controller's average decides draws: without it a resumed run would part from the other."""
    first, second, whole = ToyObjective(), ToyObjective(), ToyObjective()
    train(config_for(tmp_path / "parts", max_steps=8), first, stop_in=4)
    assert first.mean > 0
    train(config_for(tmp_path / "parts", max_steps=8), second)
    assert second.begun == [5, 6, 7]
    train(config_for(tmp_path / "whole", max_steps=8), whole)
    assert torch.equal(second.mean, whole.mean)


def test_a_step_begins_in_the_precision_of_the_run(tmp_path):
    """What is looked at there runs the networks, whose sharded weights are gathered in bf16."""
    objective = ToyObjective()
    train(config_for(tmp_path, max_steps=1, mixed_precision="bf16", warmup_steps=0), objective)
    assert objective.cast


def test_a_checkpoint_without_that_state_is_refused(tmp_path):
    train(config_for(tmp_path, max_steps=8), ToyObjective(), stop_in=4)
    path = next((tmp_path / "checkpoints").glob("step-*")) / "state.json"
    path.with_name("controller.state.safetensors").unlink()
    state = json.loads(path.read_text())
    del state["files"]["controller.state.safetensors"]
    path.write_text(json.dumps(state))
    with pytest.raises(RunFailed, match="lacks mean of controller"):
        train(config_for(tmp_path, max_steps=8), ToyObjective())


def test_an_objective_may_stop_a_run_that_goes_wrong(tmp_path):
    class Fails(ToyObjective):
        def inspect(self):
            if len(self.begun) >= 10:
                raise RunFailed("diverged")

    with pytest.raises(RunFailed, match="diverged"):
        train(config_for(tmp_path), Fails())
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())][-1] == "step-00000008"
