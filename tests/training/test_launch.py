"""What a run is built from: data with captions, the wanted variant, frozen parts in its dtype."""

from __future__ import annotations

import json
import shutil

import datasets

from tests.data.pictures import encoded, noise


def without_captions(pictures, folder, *names):
    """A copy of the fixture's folder in which some pictures have no caption."""
    shutil.copytree(pictures, folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        if row["file_name"] in names:
            row["text"] = []
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_pictures_without_captions_do_not_train_silently(command, pictures, tmp_path, capsys):
    """A run on text used to take "" for a caption that was forgotten; now it names the pictures.

    Only a run that drops all captions anyway goes without.
    """
    bare = without_captions(pictures, tmp_path / "set", "3.png", "8.png")
    assert command(data=bare) == 2
    assert "2 of 14 pictures have no caption: 3.png, 8.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    everything = ("--denoising.condition-dropout", 1)
    assert command(*everything, "--max-steps", 1, data=bare) == 0


def test_a_stream_without_captions_is_refused(command, tmp_path, capsys):
    """A stream shows its columns before the first row; a row without a caption shows when read."""
    datasets.disable_progress_bars()
    pictures = [{"bytes": encoded(noise(32, 32, n)), "path": None} for n in range(6)]
    shards = tmp_path / "shards"
    shards.mkdir()

    def write(columns):
        table = datasets.Dataset.from_dict({"image": pictures, **columns})
        table.cast_column("image", datasets.Image(decode=False)).to_parquet(shards / "0.parquet")

    write({})
    assert command("--streaming", data=shards) == 2
    assert "no column of captions" in capsys.readouterr().err
    write({"text": ["a", "b", "", "d", "e", "f"]})
    assert command("--streaming", "--max-steps", 1, data=shards) == 0
    assert "row 2: left out (no caption)" in capsys.readouterr().err
