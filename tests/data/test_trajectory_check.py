"""What `diffkit data check` says of a folder of noise-image pairs."""

from __future__ import annotations

import json

import torch

from diffkit.cli import main
from diffkit.data.check import check
from diffkit.data.trajectory_store import Shard, Stamp, shard_path, write_header, write_shard
from tests.data.trajectory_folder import build, header


def found(folder):
    return {problem.path: (problem.kind, problem.message) for problem in check(folder).problems}


def test_a_whole_folder_has_no_problems(tmp_path, capsys):
    folder = build(tmp_path / "pairs", bad=(2,))
    report = check(folder)
    assert report.problems == ()
    assert report.counts == {"pairs": 9, "dropped": 1, "prompts": 3}
    assert "9 noise-image pairs of 3 prompts, 1 left out" in report.summary()
    assert main(["data", "check", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["pairs"] == 9
    assert main(["data", "check", str(folder), "--smallest", "64"]) == 2
    assert "--smallest: is about pictures" in capsys.readouterr().err


def test_every_kind_of_bad_shard_is_named(tmp_path):
    folder = build(tmp_path / "pairs", count=28)
    paths = [shard_path(folder, number) for number in range(7)]
    head = header(count=28)

    def rewrite(number, indices, value=1.0, shape=head.shape, digest=None, stop=None):
        shard = Shard(torch.full((4, *shape), value).half(), torch.tensor(indices))
        stop = (number + 1) * 4 if stop is None else stop
        stamp = Stamp(digest or head.digest(), stop, 4, 2, "cpu", "")
        write_shard(paths[number], shard, stamp)

    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:-3])
    data = bytearray(paths[2].read_bytes())
    data[-1] ^= 4
    paths[2].write_bytes(data)
    rewrite(3, [12, 13, 15, 14])
    rewrite(4, [16, 17, 18, 19], value=torch.inf)
    rewrite(5, [20, 21, 22, 23], digest="other")
    rewrite(6, [24, 25, 26, 27], shape=(4, 8, 8))
    problems = found(folder)
    assert [problems[path.name][0] for path in paths] == [
        "missing shard",
        "corrupt",
        "corrupt",
        "corrupt",
        "corrupt",
        "other settings",
        "corrupt",
    ]
    words = ("pairs 0 to 3", "not whole", "bits were changed", "in order", "not finite")
    for path, word in zip(paths, words, strict=False):
        assert word in problems[path.name][1]
    assert "latents are (4, 4, 8, 8)" in problems[paths[6].name][1]


def test_prompts_of_other_pairs_and_a_smaller_count_are_named(tmp_path):
    folder = build(tmp_path / "pairs")
    write_header(folder, header(count=12))
    (folder / "prompts.jsonl").write_text('{"label": null, "text": "another"}\n')
    problems = found(folder)
    assert problems["prompts.jsonl"][0] == "other settings"
    (folder / "prompts.jsonl").unlink()
    kind, message = found(folder)["prompts.jsonl"]
    assert kind == "missing prompts" and message.endswith("it brings them back.")
    assert str(folder) not in message
    assert problems["pairs-00002.safetensors"][1].endswith("pairs 10 to 11 are missing")
