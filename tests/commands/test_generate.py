"""`diffkit generate` from end to end on tiny models: what it writes, resumes, repeats, refuses."""

from __future__ import annotations

import inspect
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT

import numpy as np
import pytest
from PIL import Image

from diffkit.cli import main
from diffkit.generation.recipe import read_recipe

ROOT = Path(__file__).parents[2]


def generate(*words: object) -> int:
    """The exit code of one command on a CPU, with few steps unless told."""
    flags = [] if "--from" in words or "--steps" in words else ["--steps", "2"]
    return main(["generate", *map(str, words), *flags, "--device", "cpu"])


def pixels(folder: Path) -> np.ndarray:
    """(pictures, H, W, 3) of a run, as integers."""
    files = sorted(folder.glob("0*.png"))
    return np.stack([np.asarray(Image.open(file).convert("RGB"), dtype=np.int16) for file in files])


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("0*.png")}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow above `size` bytes: what a full disk does to the writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "input.png"
    Image.effect_noise((48, 24), 90).convert("RGB").save(path)
    return path


def test_pictures_recipes_and_a_contact_sheet(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("a cat", "a dog", "--num", 2, "--seed", 7, "--model", tiny_sd, "--output", out)
    assert generate(*words, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["made"], report["kept"]) == (4, 0)
    assert [p["prompt"] for p in report["pictures"]] == ["a cat", "a cat", "a dog", "a dog"]
    assert [p["seed"] for p in report["pictures"]] == [7, 8, 9, 10]
    assert sorted(p.name for p in out.iterdir()) == [
        *(f"0000{i}.png" for i in range(4)),
        "contact_sheet.png",
    ]
    recipe = read_recipe(out / "00002.png")
    assert (recipe.prompt, recipe.seed, recipe.index, recipe.steps) == ("a dog", 9, 2, 2)
    assert (recipe.width, recipe.height, recipe.guidance) == (32, 32, 7.5)
    assert recipe.model == str(tiny_sd)


@pytest.mark.parametrize("scheduler", ["ddim", "euler-a"])
def test_the_batch_size_changes_no_picture(tiny_sd: Path, tmp_path: Path, scheduler: str) -> None:
    common = ("a", "b", "c", "--model", tiny_sd, "--scheduler", scheduler)
    for size in (1, 3):
        assert generate(*common, "--output", tmp_path / str(size), "--batch-size", size) == 0
    one, three = pixels(tmp_path / "1"), pixels(tmp_path / "3")
    assert np.abs(one - three).max() <= 1
    assert one.std() > 1


def test_the_same_command_goes_on_where_it_stopped(tiny_sd: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("a", "b", "c", "--model", tiny_sd, "--output", out)
    assert generate(*words) == 0
    first, before = pixels(out), times(out)
    (out / "00001.png").unlink()
    torn = (out / "00002.png").read_bytes()
    (out / "00002.png").write_bytes(torn[: len(torn) // 2])
    assert generate(*words) == 0
    assert np.abs(pixels(out) - first).max() <= 1
    assert times(out)["00000.png"] == before["00000.png"]
    assert generate(*words, "--num", 1, "--overwrite") == 0
    assert times(out)["00000.png"] != before["00000.png"]


def test_another_recipe_on_the_same_output_is_refused_by_key(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("a", "--model", tiny_sd, "--output", tmp_path / "out")
    assert generate(*words) == 0
    before = pixels(tmp_path / "out")
    assert generate(*words, "--steps", 3, "--negative", "b") == 2
    message = capsys.readouterr().err
    assert "negative ('' there, 'b' now), steps (2 there, 3 now)" in message
    assert "--overwrite" in message
    assert (pixels(tmp_path / "out") == before).all()
    assert generate(*words, "--steps", 3, "--overwrite") == 0
    assert (pixels(tmp_path / "out") != before).any()


def test_a_foreign_picture_is_not_overwritten(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "00000.png")
    assert generate("a", "--model", tiny_sd, "--output", tmp_path) == 2
    assert "carries no diffkit recipe" in capsys.readouterr().err


def test_a_retrained_model_is_another_recipe(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The path of a model says nothing of its weights; pictures of two models must not mix."""
    from diffkit.models.latent_diffusion import LatentDiffusion

    model = LatentDiffusion.load(tiny_sd)
    model.save(tmp_path / "model")
    words = ("a", "b", "--model", tmp_path / "model", "--output", tmp_path / "out")
    assert generate(*words) == 0
    next(model.denoiser.model.parameters()).data.add_(0.1)
    model.save(tmp_path / "model", overwrite=True)
    assert generate(*words) == 2
    assert "weights (" in capsys.readouterr().err


def test_from_repeats_a_picture(tiny_sd: Path, tmp_path: Path) -> None:
    words = ("a", "b", "--model", tiny_sd, "--scheduler", "euler-a", "--guidance", 3, "--steps", 4)
    assert generate(*words, "--output", tmp_path / "out") == 0
    again = tmp_path / "again"
    assert generate("--from", tmp_path / "out" / "00001.png", "--output", again) == 0
    assert np.abs(pixels(again)[0] - pixels(tmp_path / "out")[1]).max() <= 1
    assert read_recipe(again / "00001.png") == read_recipe(tmp_path / "out" / "00001.png")
    # One picture is no run: a sheet of a run in the same folder stays.
    assert not (again / "contact_sheet.png").exists()


def test_from_repeats_an_inpainted_picture_unless_its_input_changed(
    tiny_sd: Path, tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = tmp_path / "mask.png"
    Image.linear_gradient("L").save(mask)
    out, again = tmp_path / "out", tmp_path / "again"
    words = ("a", "--model", tiny_sd, "--image", picture, "--mask", mask, "--strength", 0.9)
    assert generate(*words, "--output", out, "--steps", 4) == 0
    # The picture's aspect at the model's area: 48x24 at 1024 square pixels.
    assert pixels(out).shape[1:3] == (24, 48)
    assert generate("--from", out / "00000.png", "--output", again) == 0
    assert (pixels(again) == pixels(out)).all()

    moved = picture.rename(tmp_path / "moved.png")
    assert generate("--from", out / "00000.png", "--output", tmp_path / "b") == 2
    assert "input.png: no such file" in capsys.readouterr().err
    new = ("--from", out / "00000.png", "--image", moved, "--output", tmp_path / "b")
    assert generate(*new) == 0
    Image.new("RGB", (48, 24)).save(moved)
    assert generate(*new, "--overwrite") == 2
    assert "moved.png changed since it was made" in capsys.readouterr().err


def test_a_variant_is_chosen_and_repeated(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the weights of a folder only the plain ones could be used."""
    from diffkit.models.latent_diffusion import LatentDiffusion

    model = LatentDiffusion.load(tiny_sd)
    folder, out, again = model.save(tmp_path / "model"), tmp_path / "out", tmp_path / "again"
    next(model.denoiser.model.parameters()).data.add_(0.1)
    model.denoiser.model.save_pretrained(folder / "unet", variant="other")
    words = ("a", "--model", folder, "--variant", "other", "--output", out)
    assert generate(*words) == 0
    assert generate("a", "--model", folder, "--output", out) == 2
    assert "weights (" in capsys.readouterr().err
    back = ("--from", out / "00000.png", "--output", again)
    assert generate(*back) == 2
    assert "the model's weights changed" in capsys.readouterr().err
    assert generate(*back, "--variant", "other") == 0
    assert (pixels(again) == pixels(out)).all()
    assert generate(*words[:3], "--revision", "main", "--output", out) == 2
    assert "revision is for hub ids" in capsys.readouterr().err


def test_from_refuses_what_the_recipe_decides(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate("a", "--model", tiny_sd, "--output", tmp_path) == 0
    assert generate("--from", tmp_path / "00000.png", "--guidance", 3) == 2
    assert "--guidance: the recipe of --from decides it" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    assert generate("--from", tmp_path / "plain.png") == 2
    assert "carries no diffkit recipe" in capsys.readouterr().err


def test_prompts_from_a_file(tiny_sd: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\n# a remark\na dog\n")
    out = tmp_path / "out"
    assert generate("--prompts", prompts, "--model", tiny_sd, "--output", out) == 0
    assert [read_recipe(p).prompt for p in sorted(out.glob("0*.png"))] == ["a cat", "a dog"]


def test_weighted_loras_change_the_picture(tiny_sd: Path, tmp_path: Path) -> None:
    from diffkit.models.latent_diffusion import LatentDiffusion
    from diffkit.models.lora import add_lora, save_lora

    model = LatentDiffusion.load(tiny_sd)
    for parameter in add_lora(model, rank=2).values():
        parameter.data.add_(0.2)
    save_lora(model, tmp_path / "lora", "default")
    made = {}
    for weight in ("0", "1", "2"):
        out = tmp_path / weight
        lora = f"{tmp_path / 'lora'}:{weight}"
        assert generate("a", "--model", tiny_sd, "--lora", lora, "--output", out) == 0
        made[weight] = pixels(out)
    assert generate("a", "--model", tiny_sd, "--output", tmp_path / "plain") == 0
    assert (made["0"] == pixels(tmp_path / "plain")).all()
    assert np.abs(made["1"] - made["0"]).max() > 1
    assert np.abs(made["2"] - made["1"]).max() > 1
    two = [f"{tmp_path / 'lora'}:{weight}" for weight in ("0.5", "0.5")]
    words = ("a", "--model", tiny_sd, "--lora", two[0], "--lora", two[1])
    assert generate(*words, "--output", tmp_path / "two") == 0
    assert np.abs(pixels(tmp_path / "two") - made["1"]).max() <= 1
    assert generate("--from", tmp_path / "2" / "00000.png", "--output", tmp_path / "again") == 0
    assert (pixels(tmp_path / "again") == made["2"]).all()


def test_a_card_in_the_model_folder_sets_the_defaults(tiny_sd: Path, tmp_path: Path) -> None:
    from diffkit.models.latent_diffusion import LatentDiffusion

    LatentDiffusion.load(tiny_sd).save(tmp_path / "model")
    card = tmp_path / "model" / "diffkit.json"
    card.write_text('{"guidance_scale": 2.5, "steps": 3}')
    words = ["generate", "a", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "o")]
    assert main(words) == 0
    recipe = read_recipe(tmp_path / "o" / "00000.png")
    assert (recipe.guidance, recipe.steps) == (2.5, 3)
    card.write_text('{"guidence": 2.5}')
    assert main([*words, "--overwrite"]) == 2


BAD = [
    ((), "no prompts"),
    (("a", "--prompts", "{tmp}/p.txt"), "not both"),
    (("--prompts", "{tmp}/absent.txt"), "absent.txt"),
    (("a", "--model", "{tmp}/absent"), "no such model"),
    (("a", "--model", "{tmp}/empty"), "not a diffusers model folder"),
    (("a", "--model", "{tmp}/pickle.ckpt"), "pickle.ckpt"),
    (("a", "--lora", "{tmp}/absent"), "absent"),
    (("a", "--lora", "{tmp}/absent:much"), "'much' is no weight"),
    (("a", "--size", "36"), "nearest sizes are 32x32 or 40x40"),
    (("a", "--size", "0x8"), "N or WxH"),
    (("a", "--dtype", "fp16"), "not on a CPU"),
    (("a", "--dtype", "fp64"), "fp16"),
    (("a", "--steps", "0"), "--steps 0: must be at least 1"),
    (("a", "--steps", "many"), "--steps: 'many' is not INT"),
    (("a", "--num", "0"), "--num 0"),
    (("a", "--guidance", "nan"), "--guidance nan: must be a number"),
    (("a", "--batch-size", "0"), "--batch-size 0"),
    (("a", "--guidance", "-1"), "--guidance -1"),
    (("a", "--negative", "b", "--guidance", "1"), "--negative: does nothing"),
    (("a", "--scheduler", "flow-euler"), "not for a DDPM-type model"),
    (("a", "--scheduler", "eulr"), "unknown"),
    (("a", "--attention", "nonsense"), "nonsense"),
    (("a", "--attention", "xformers"), "pip install"),
    (("a", "--strength", "0.5"), "--strength: needs --image"),
    (("a", "--mask", "{tmp}/m.png"), "--mask: needs --image"),
    (("a", "--image", "{tmp}/absent.png"), "absent.png: no such file"),
    (("a", "--image", "{tmp}/torn.png"), "torn.png: is not a whole picture"),
    (("a", "--image", "{tmp}/whole.png", "--strength", "0.1"), "--steps 10 or more"),
    (("a", "--image", "{tmp}/whole.png", "--mask", "{tmp}/torn.png"), "--mask"),
    (("a", "--output", "{tmp}/whole.png"), "whole.png"),
    (("a", "--output", "{tmp}/whole.png/below"), "whole.png"),
    (("--from", "{tmp}/absent.png"), "absent.png: no such file"),
    (("a", "--szie", "8"), "--size"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_exits_2_with_a_short_message(
    tiny_sd: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / "whole.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    (tmp_path / "p.txt").write_text("a\n")
    (tmp_path / "pickle.ckpt").write_bytes(b"\x80\x04.")
    (tmp_path / "empty").mkdir()
    given = [word.format(tmp=tmp_path) for word in words]
    if "--model" not in given and "--from" not in given:
        given += ["--model", str(tiny_sd)]
    if "--output" not in given:
        given += ["--output", str(tmp_path / "out")]
    assert generate(*given) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not list(tmp_path.glob("out/*.png"))


def test_a_full_disk_keeps_what_was_finished(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("a", "b", "--model", tiny_sd, "--output", tmp_path)
    with file_size_limit(1000):
        assert generate(*words) == 1
    assert "00000.png: the file size limit" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert generate(*words) == 0
    # Room for the pictures, none for the sheet.
    (tmp_path / "contact_sheet.png").unlink()
    (tmp_path / "00001.png").unlink()
    with file_size_limit(8000):
        assert generate(*words) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"00000.png", "00001.png"}


def test_ctrl_c_keeps_finished_pictures_and_the_next_run_goes_on(
    tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("a", "--num", 200, "--batch-size", 1, "--model", tiny_sd, "--output", tmp_path)

    def interrupt() -> None:
        while not (tmp_path / "00002.png").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert generate(*words) == 130
    thread.join()
    assert "what was finished is kept" in capsys.readouterr().err
    done = times(tmp_path)
    assert 3 <= len(done) < 200
    assert all(read_recipe(tmp_path / name) for name in done)
    few = ("a", "--num", len(done) + 1, *words[3:])
    assert generate(*few) == 0
    after = times(tmp_path)
    assert len(after) == len(done) + 1
    assert all(after[name] == done[name] for name in done)


_RANK = """
import sys
import diffkit.generation.run as run
from diffkit.cli import main

write = run.write_png

def told(path, image, recipe):
    write(path, image, recipe)
    print("made", recipe.index, file=sys.stderr)

run.write_png = told
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_share_the_pictures(tiny_sd: Path, tmp_path: Path) -> None:
    words = ["a", "b", "c", "d", "e", "--model", str(tiny_sd), "--scheduler", "ddpm"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--steps", "2", "--device", "cpu", "--output", str(tmp_path / "two"), "--json"]
    command = [sys.executable, "-c", _RANK, "generate", *words, *flags]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    made = [
        sorted(int(line.split()[1]) for line in errors.splitlines() if line.startswith("made"))
        for _, errors in outputs
    ]
    assert made == [[0, 2, 4], [1, 3]]
    assert json.loads(outputs[0][0])["made"] == 5
    assert outputs[1][0] == ""
    assert generate(*words, "--output", tmp_path / "one") == 0
    assert np.abs(pixels(tmp_path / "two") - pixels(tmp_path / "one")).max() <= 1
    assert (tmp_path / "two" / "contact_sheet.png").exists()


def test_the_help_names_the_guidance_of_every_family() -> None:
    """It named three families of eight."""
    from diffkit.commands.generate import GenerateConfig
    from diffkit.models.families import families

    source = inspect.getsource(GenerateConfig)
    told = source[source.index("    guidance: float") : source.index("    scheduler: str")]
    scales = {f"{family.guidance_scale:g}" for family in families()}
    assert scales <= set(re.findall(r"\d+(?:\.\d+)?", told))
