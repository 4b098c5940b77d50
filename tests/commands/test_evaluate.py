"""`diffkit evaluate` from end to end on tiny models: what it measures, keeps, refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFilter

from tests.evaluation.sets import evaluate, real_pictures, report_of, rows_of, times

PAIRS = ("psnr", "ssim", "latent_lpips")
ALL = (
    *("frechet", "kernel", "precision", "recall", "density", "coverage", "alignment", "retrieval"),
    *("concept", "style", "background", "diversity", "vendi", "high_frequency", *PAIRS),
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_pictures(tmp_path_factory.mktemp("real") / "pictures")


@pytest.fixture(scope="module")
def alone(tiny_sd: Path, real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a model against itself, everything measured but the costs."""
    out = tmp_path_factory.mktemp("alone") / "out"
    words = (tiny_sd, "--against", tiny_sd, "--data", real, "--output", out)
    flags = ("--num", 12, "--per-prompt", 2, "--steps", 2, "--seed", 5, "--resamples", 100)
    metrics = ("quality", "text", "variety", "high_frequency", "pairs")
    assert evaluate(*words, *flags, "--metrics", *metrics) == 0
    return out


def again(out: Path, tiny_sd: Path, real: Path, *words: object) -> int:
    """The command of `alone` with more words."""
    flags = ("--num", 12, "--per-prompt", 2, "--steps", 2, "--seed", 5, "--resamples", 100)
    metrics = ("quality", "text", "variety", "high_frequency", "pairs")
    sets = (tiny_sd, "--against", tiny_sd, "--data", real, "--output", out)
    return evaluate(*sets, *flags, "--metrics", *metrics, *words)


def test_a_model_against_itself_differs_by_nothing(alone: Path) -> None:
    report = report_of(alone)
    rows = rows_of(report)
    assert tuple(rows) == ALL
    for name in PAIRS:
        assert rows[name]["difference"] is None
        assert set(rows[name]["values"]) == {"model"}
    assert rows["psnr"]["values"]["model"]["value"] == 100
    assert rows["ssim"]["values"]["model"]["value"] == pytest.approx(1)
    assert rows["latent_lpips"]["values"]["model"]["value"] == 0
    for name in set(ALL) - set(PAIRS):
        assert rows[name]["difference"] == {"value": 0, "low": 0, "high": 0}, name
        assert rows[name]["values"]["model"] == rows[name]["values"]["against"]
        assert "paired: the same prompts and noises" in rows[name]["note"]
    assert [row["name"] for row in report["skipped"]] == ["lpips"]
    assert "alexnet" in report["skipped"][0]["reason"]
    assert report["cost"] == {}


def test_every_number_says_what_it_is_of(alone: Path, real: Path) -> None:
    report = report_of(alone)
    assert (report["n"], report["prompts"], report["per_prompt"]) == (12, 6, 2)
    assert report["reference"] == {"source": str(real), "n": 12}
    assert report["pairing"] == "noises"
    for row in report["metrics"]:
        assert (row["n"], row["seed"]) == (12, 5)
        assert row["resize"].startswith("pictures at their own size")
        for value in row["values"].values():
            assert value["low"] <= value["high"]
    rows = rows_of(report)
    assert "real pictures scaled to cover 32x32" in rows["frechet"]["resize"]
    assert "real" not in rows["alignment"]["resize"]
    assert rows["frechet"]["label"] == "Fréchet distance (diffkit feature network)"
    assert (rows["frechet"]["n_reference"], rows["alignment"]["n_reference"]) == (12, None)
    assert set(report["spectra"]["sets"]) == {"model", "against", "reference"}
    assert len(report["spectra"]["frequency"]) == len(report["spectra"]["sets"]["model"]) == 16
    names = [entry["name"] for entry in report["sets"].values()]
    assert names[1] == f"{names[0]} (again)"


def test_one_row_a_picture(alone: Path) -> None:
    rows = [json.loads(line) for line in (alone / "samples.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(12))
    assert [row["group"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    for row in rows:
        assert all((alone / file).is_file() for file in row["pictures"].values())
        assert set(row["values"]["alignment"]) == {"model", "against"}
        assert set(row["values"]["psnr"]) == {"model"}
    mean = sum(row["values"]["alignment"]["model"] for row in rows) / len(rows)
    measured = rows_of(report_of(alone))["alignment"]["values"]["model"]["value"]
    assert measured == pytest.approx(mean)


def test_the_same_command_again_computes_nothing(
    alone: Path, tiny_sd: Path, real: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = times(alone)
    assert again(alone, tiny_sd, real, "--json") == 0
    assert times(alone) == before
    assert json.loads(capsys.readouterr().out) == report_of(alone)


def test_a_lost_report_is_made_again_from_what_is_kept(
    alone: Path, tiny_sd: Path, real: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(alone, tmp_path / "out")
    before = report_of(out)
    (out / "report.html").unlink()
    pictures = times(out / "model")
    values = times(out / "values") | times(out / "features")
    assert again(out, tiny_sd, real) == 0
    assert times(out / "model") == pictures
    assert times(out / "values") | times(out / "features") == values
    after = report_of(out)
    for report in (before, after):
        del report["created"], report["command"]
    assert after == before


def test_another_request_on_the_same_output(
    alone: Path, tiny_sd: Path, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = times(alone)
    assert again(alone, tiny_sd, real, "--seed", 6, "--against-steps", 3) == 2
    complaint = capsys.readouterr().err
    assert "seed (5 there, 6 now)" in complaint
    assert "against.steps (2 there, 3 now)" in complaint
    assert "--overwrite" in complaint
    assert again(alone, tiny_sd, real, "--resamples", 200) == 2
    assert "resamples (100 there, 200 now)" in capsys.readouterr().err
    assert times(alone) == before


def test_overwriting(
    tiny_sd: Path, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (tiny_sd, "--data", real, "--num", 4, "--steps", 1, "--output", tmp_path / "out")
    assert evaluate(*words, "--metrics", "alignment") == 0
    kept = times(tmp_path / "out" / "model")
    assert evaluate(*words, "--metrics", "alignment", "high_frequency") == 0
    assert set(rows_of(report_of(tmp_path / "out"))) == {"alignment", "high_frequency"}
    assert times(tmp_path / "out" / "model") == kept
    capsys.readouterr()
    assert evaluate(*words, "--metrics", "alignment") == 2
    assert evaluate(*words, "--metrics", "alignment", "--overwrite") == 0
    assert set(rows_of(report_of(tmp_path / "out"))) == {"alignment"}
    assert times(tmp_path / "out" / "model") != kept


def test_a_saved_reference_gives_the_same_numbers(
    alone: Path, tiny_sd: Path, real: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    rows = [json.loads(line) for line in (alone / "samples.jsonl").read_text().splitlines()]
    prompts.write_text("\n".join(dict.fromkeys(row["prompt"] for row in rows)))
    saved = alone / "reference.safetensors"
    words = (tiny_sd, "--data", saved, "--prompts", prompts, "--output", tmp_path / "out")
    flags = ("--num", 12, "--per-prompt", 2, "--steps", 2, "--seed", 5, "--resamples", 100)
    assert evaluate(*words, *flags, "--metrics", "frechet", "recall") == 0
    before, after = rows_of(report_of(alone)), rows_of(report_of(tmp_path / "out"))
    for name in ("frechet", "recall"):
        assert after[name]["values"]["model"] == before[name]["values"]["model"]
        assert after[name]["n_reference"] == 12
    assert report_of(tmp_path / "out")["reference"] == {"source": str(real), "n": 12}


def test_two_folders_of_pictures(real: Path, tmp_path: Path) -> None:
    """Blurred copies: less detail and another style, picture by picture, and nothing drawn."""
    blurred = shutil.copytree(real, tmp_path / "blurred")
    for file in blurred.glob("*.png"):
        Image.open(file).convert("RGB").filter(ImageFilter.GaussianBlur(2)).save(file)
    out = tmp_path / "out"
    assert evaluate(blurred, "--against", real, "--data", real, "--output", out) == 0
    report, rows = report_of(out), rows_of(report_of(out))
    assert report["pairing"] == "names"
    assert {row["name"] for row in report["skipped"]} == {"lpips", "cost", "diversity"}
    assert rows["high_frequency"]["difference"]["high"] < 0
    assert rows["frechet"]["difference"]["low"] > 0
    assert rows["frechet"]["values"]["against"]["value"] == pytest.approx(0, abs=1e-6)
    assert rows["psnr"]["values"]["model"]["value"] < 40
    assert not (out / "model").exists()
    sample = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    assert (out / sample["pictures"]["model"]).resolve().parent == blurred


def test_folders_of_other_requests_are_not_paired(real: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    some.mkdir()
    for i in range(9):
        Image.effect_noise((40, 40), 30 + 5 * i).convert("RGB").save(some / f"{i}.png")
    out = tmp_path / "out"
    words = ("--data", real, "--metrics", "quality", "high_frequency", "--output", out)
    assert evaluate(some, "--against", real, *words) == 0
    rows = rows_of(report_of(out))
    assert report_of(out)["pairing"] == "none"
    assert "unpaired" in rows["high_frequency"]["note"]
    assert "the baseline has 12 pictures" in rows["high_frequency"]["note"]
    assert rows["high_frequency"]["difference"]["low"] > 0
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 9 + 12
    assert all(len(row["pictures"]) == 1 for row in samples)


@pytest.mark.parametrize("name", ["pixel", "dit"])
def test_models_without_text(
    name: str, tiny_folder: Callable[[str], Path], real: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("--data", real, "--num", 8, "--steps", 2, "--output", out)
    sampler = ("--scheduler", "ddim") if name == "dit" else ()
    assert evaluate(tiny_folder(name), *words, *sampler, "--metrics", "quality", "variety") == 0
    report = report_of(out)
    assert report["prompts"] == {"pixel": 0, "dit": 2}[name]
    assert ("diversity" in rows_of(report)) == (name == "dit")
    assert rows_of(report)["frechet"]["values"]["model"]["value"] > 0


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "unknown metric": (("--metrics", "freshet"), "Did you mean frechet?"),
    "no reference": (("--prompts", "PROMPTS", "--metrics", "frechet"), "give --data"),
    "nothing to pair with": (("--prompts", "PROMPTS", "--metrics", "psnr"), "give --against"),
    "lpips without weights": (
        ("--against", "SELF", "--prompts", "PROMPTS", "--metrics", "lpips"),
        "alexnet",
    ),
    "captions that name no classes": (
        ("--prompts", "PROMPTS", "--metrics", "concept"),
        "names no concept",
    ),
    "no baseline": (("--against-steps", "3"), "--against-steps: needs --against"),
    "own scheduler": (
        ("--against", "SELF", "--against-scheduler", "own"),
        "does nothing without --scheduler",
    ),
    "no prompts": ((), "no prompts"),
    "one picture": (("--prompts", "PROMPTS", "--num", "1"), "--num 1: must be at least 2"),
    "too few prompts": (
        ("--prompts", "PROMPTS", "--num", "40", "--per-prompt", "4"),
        "--per-prompt 4",
    ),
    "no steps": (("--prompts", "PROMPTS", "--steps", "0"), "--steps 0"),
    "no steps of the baseline": (
        ("--prompts", "PROMPTS", "--against", "SELF", "--against-steps", "0"),
        "for against: --steps 0",
    ),
    "few resamples": (("--prompts", "PROMPTS", "--resamples", "10"), "--resamples 10"),
    "missing data": (("--data", "nowhere"), "no such folder or file"),
    "not a reference": (("--data", "PROMPTS", "--prompts", "PROMPTS"), "not a safetensors file"),
    "idle reference": (
        ("--data", "PROMPTS", "--prompts", "PROMPTS", "--metrics", "alignment"),
        "--data: none of the chosen metrics uses it",
    ),
    "idle extractor": (
        ("--prompts", "PROMPTS", "--metrics", "alignment", "--extractor", "inception"),
        "--extractor: none of the chosen metrics uses it",
    ),
    "unknown extractor": (("--prompts", "PROMPTS", "--extractor", "vgg"), "extractor 'vgg'"),
    "no such model": (("--prompts", "PROMPTS", "--against", "nowhere"), "nowhere: no such model"),
    "bad scheduler": (
        ("--prompts", "PROMPTS", "--against", "SELF", "--against-scheduler", "flow-euler"),
        "for SELF (--against): --scheduler flow-euler",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_drawn(
    case: str, tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    places = {"SELF": str(tiny_sd), "PROMPTS": str(prompts)}
    words, complaint = REFUSED[case]
    words = tuple(places.get(word, word) for word in words)
    output = tmp_path / "out"
    assert evaluate(tiny_sd, "--num", 8, "--output", output, *words) == 2
    assert complaint.replace("SELF", str(tiny_sd)) in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--steps", "3"), "--steps: does nothing here"),
        (("--lora", "x"), "--lora: does nothing here"),
        (("--prompts", "PROMPTS"), "--prompts: does nothing here"),
        (("--dtype", "bf16"), "--dtype: does nothing here"),
        (("--against", "REAL", "--against-guidance", "3"), "is a folder of pictures"),
        (("--metrics", "cost"), "give a model"),
    ],
)
def test_pictures_are_not_drawn(
    words: tuple[str, ...],
    complaint: str,
    real: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = tuple(str(real) if word == "REAL" else word for word in words)
    assert evaluate(real, "--output", tmp_path / "out", *words) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_foreign_folder_is_left_alone(
    tiny_sd: Path, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model folder has a config.json, too: --overwrite must not empty it."""
    for content in ("{}", '{"hidden_size": 3}'):
        (tmp_path / "config.json").write_text(content)
        words = (tiny_sd, "--data", real, "--num", 4, "--output", tmp_path, "--overwrite")
        assert evaluate(*words) == 2
        assert "holds no evaluation" in capsys.readouterr().err
        assert (tmp_path / "config.json").read_text() == content
