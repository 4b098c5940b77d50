"""Preference pairs behind `diffkit train`: what is counted, what is refused, what ends a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffkit.cli import main
from diffkit.errors import UserError
from diffkit.training.preference import PreferenceTraining
from tests.data.pairs import pair_folder
from tests.training.test_denoising_runs import rows


@pytest.fixture
def words(tmp_path, tiny_folder):
    """Words after `diffkit train preference`; the first six pairs lie in `set`."""
    pair_folder(tmp_path / "set", 6, ((32, 32),))

    def found(*more, model="sd-v", data="set"):
        flags = ["--model", tiny_folder(model), "--data", tmp_path / data, "--tracker", "none"]
        flags += ["--output", tmp_path / "out", "--batch-size", 2, "--max-steps", 2]
        flags += ["--warmup-steps", 0, "--preference.kappa", 100, *more]
        return ["preference", *map(str, flags)]

    return found


def relabel(tmp_path, *labels):
    """Give the first rows of the table these labels."""
    table = tmp_path / "set" / "metadata.jsonl"
    found = [json.loads(line) for line in table.read_text().splitlines()]
    for row, label in zip(found, labels):
        row["label_0"] = label
    table.write_text("".join(json.dumps(row) + "\n" for row in found))


def test_a_dry_run_counts_pairs_and_what_is_left_out(words, tmp_path, capsys):
    relabel(tmp_path, 0.5, None, 0.5)
    assert main(["train", *words("--dry-run")]) == 0
    said = capsys.readouterr()
    assert "pairs: 3 (1.5 steps an epoch)" in said.out
    assert "left out of 6 rows: 2 ties, 1 without a label" in said.out
    assert "3 of 6 rows are left out: 2 ties, 1 without a label." in said.err
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_go_on_with_other_preferences(words, tmp_path, capsys):
    assert main(["train", *words()]) == 0
    relabel(tmp_path, 0)
    assert main(["train", *words("--max-steps", 3)]) == 2
    assert "the run cannot go on as it was" in capsys.readouterr().err
    relabel(tmp_path, 1)
    assert main(["train", *words("--max-steps", 3)]) == 0
    assert len(rows(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streaming": True}, "streaming: preference pairs are looked up by number"),
        ({"image_column": "jpg_0"}, "image_column: a pair has two pictures, in the columns jpg_0"),
    ],
)
def test_flags_that_pairs_have_no_use_for(changes, message):
    config = PreferenceTraining(data="x", output=Path("y"), **changes)
    with pytest.raises(UserError, match=message):
        config.check()


def test_other_data_are_refused(words, tmp_path, pictures, capsys):
    assert main(["train", *words(data=pictures)]) == 2
    said = capsys.readouterr().err
    assert "names no pairs of pictures; expected winner and loser, or image_0" in said
    assert "Its columns: file_name, text." in said
    table = tmp_path / "set" / "metadata.jsonl"
    table.write_text(table.read_text().replace('"text"', '"said"'))
    assert main(["train", *words()]) == 2
    said = capsys.readouterr().err
    assert "6 of 6 pairs have no caption: 000.png over 001.png, " in said
    assert main(["train", *words("--caption-column", "said", "--dry-run")]) == 0


def test_models_of_classes_are_refused(words, capsys):
    assert main(["train", *words(model="dit")]) == 2
    assert "conditioned on classes, and preference pairs have captions" in capsys.readouterr().err


def test_the_check_command_knows_pairs(tmp_path, capsys):
    folder = pair_folder(tmp_path / "set", 4)
    assert main(["data", "check", str(folder)]) == 0
    assert (
        "8 images, 4 captions, 4 pairs, 0 ties, 0 rows without a label" in capsys.readouterr().out
    )
    (folder / "002.png").write_bytes(b"broken")
    assert main(["data", "check", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["problems"][0]["path"] == "002.png" and report["counts"]["pairs"] == 4
