"""`diffkit trajectories`: pairs of a teacher, made once, by many, and again from their seeds."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffkit.cli import main
from diffkit.data.trajectories import TrajectoryData
from diffkit.data.trajectory_store import (
    Shard,
    read_header,
    read_prompt_rows,
    read_shard,
    read_stamp,
    shard_path,
    write_header,
    write_shard,
)
from diffkit.generation.trajectories import Teacher
from diffkit.generation.trajectory_verify import verify_pairs
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.sampling import sample

ROOT = Path(__file__).parents[2]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat\na blue dog\n\n# not this\na bird\n")
    return path


def words(folder: Path, model: Path, prompts: Path | None, *more: object) -> list[str]:
    flags = [] if prompts is None else ["--prompts", prompts]
    flags += ["--model", model, "--output", folder, "--device", "cpu", *more]
    return list(map(str, flags))


def make(folder: Path, model: Path, prompts: Path | None, *more: object) -> int:
    few = ["--steps", 2, "--count", 7, "--shard", 3, "--batch-size", 2]
    return main(["trajectories", *words(folder, model, prompts, *few, *more)])


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("pairs-*"))}


def test_pairs_are_the_end_points_of_the_teachers_sampler(tiny_sd, prompts, tmp_path, capsys):
    """And of no other noise than that of their address, whatever the batch was."""
    folder = tmp_path / "pairs"
    assert make(folder, tiny_sd, prompts, "--guidance", 3, "--seed", 5, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {
        "folder": str(folder),
        "pairs": 7,
        "prompts": 3,
        "made": 7,
        "kept": 0,
        "dropped": 0,
        "elsewhere": 0,
    }
    header = read_header(folder)
    assert header.steps == 2 and header.guidance == 3 and header.dtype == "fp32"
    assert header.scheduler["class"] == "DDIMScheduler" and header.times[-1] == -1
    assert header.scheduler["timestep_spacing"] == "leading" and header.times[0] == 501
    batch = TrajectoryData(folder, batch_size=1, seed=0).pairs([0, 4, 6])
    assert batch.captions == ["a red cat", "a blue dog", "a red cat"]
    model = LatentDiffusion.load(tiny_sd)
    expected = sample(
        model.denoiser,
        batch.noise,
        model.conditioner.encode(batch.captions),
        model.conditioner.null(3),
        steps=2,
        guidance_scale=3,
    )
    assert batch.latents.isclose(expected, rtol=2e-3, atol=2e-3).all()


def test_stored_pairs_are_made_again_bit_by_bit(tiny_sd, prompts, tmp_path, capsys):
    folder = tmp_path / "pairs"
    make(folder, tiny_sd, prompts)
    verify = ["trajectories", "--output", str(folder), "--verify", "5", "--device", "cpu"]
    assert main([*verify, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "checked": 5,
        "identical": 5,
        "largest": 0.0,
        "allowed": 1e-3,
        "passed": True,
    }
    assert main([*verify, "--steps", "3"]) == 2
    assert "--steps: the folder decides it" in capsys.readouterr().err


def test_other_pairs_changed_bits_and_another_teacher_are_found_out(
    tiny_sd, prompts, tmp_path, capsys
):
    folder = tmp_path / "pairs"
    make(folder, tiny_sd, prompts)
    verify = ["trajectories", "--output", str(folder), "--verify", "7", "--device", "cpu"]
    other = shutil.copytree(tiny_sd, tmp_path / "other")
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file(weights | {"conv_in.bias": weights["conv_in.bias"] + 1}, path)
    assert main([*verify, "--model", str(other)]) == 2
    assert "was made with another weights" in capsys.readouterr().err

    path = shard_path(folder, 1)
    shard, stamp = read_shard(path), read_stamp(path)
    assert shard is not None and stamp is not None
    write_shard(path, Shard(-shard.latents, shard.indices), stamp)
    assert main(verify) == 1
    assert "7 pairs made anew: 4 bit by bit" in (said := capsys.readouterr().err)
    assert "NOT those of their seeds" in said
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert main(verify) == 1
    assert "its bits were changed since it was written" in capsys.readouterr().err


def test_a_run_goes_on_where_it_stopped_and_grows(tiny_sd, prompts, tmp_path, capsys):
    folder, straight = tmp_path / "pairs", tmp_path / "straight"
    make(straight, tiny_sd, prompts)
    make(folder, tiny_sd, prompts, "--count", 3)
    first = shards(folder)
    assert make(folder, tiny_sd, prompts, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kept"] == 3 and report["made"] == 4
    assert shards(folder) == shards(straight) and len(first) == 1
    torn, changed = shard_path(folder, 1), shard_path(folder, 0)
    torn.write_bytes(torn.read_bytes()[:-7])
    bits = bytearray(changed.read_bytes())
    bits[-1] ^= 1
    changed.write_bytes(bits)
    (folder / "prompts.jsonl").unlink()
    again = ["--steps", 2, "--shard", 3, "--batch-size", 2]  # without --count those that are there
    assert main(["trajectories", *words(folder, tiny_sd, prompts, *again)]) == 0
    assert shards(folder) == shards(straight)
    assert read_prompt_rows(folder, read_header(folder))[2].text == "a bird"
    assert make(folder, tiny_sd, prompts, "--count", 4) == 2
    assert "holds 7 pairs, more than --count 4" in capsys.readouterr().err


def test_a_folder_of_other_settings_is_refused(tiny_sd, prompts, tmp_path, capsys):
    folder = tmp_path / "pairs"
    make(folder, tiny_sd, prompts)
    kept = shards(folder)
    for flags, named in (
        (("--seed", 1), "seed (0 there, 1 now)"),
        (("--guidance", 2), "guidance (7.5 there, 2.0 now)"),
        (("--steps", 3), "steps (2 there, 3 now)"),
        (("--dtype", "bf16"), "dtype ('fp32' there, 'bf16' now)"),
    ):
        assert make(folder, tiny_sd, prompts, *flags) == 2
        assert named in capsys.readouterr().err
    prompts.write_text("something else\n")
    assert make(folder, tiny_sd, prompts) == 2
    assert "prompts (" in capsys.readouterr().err and shards(folder) == kept
    assert make(folder, tiny_sd, prompts, "--seed", 1, "--overwrite") == 0
    assert shards(folder) != kept and read_header(folder).seed == 1
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    assert make(tmp_path / "own", tiny_sd, prompts) == 2
    assert "is not empty and holds no pairs" in capsys.readouterr().err


def test_overwrite_removes_pairs_and_nothing_of_ones_own(tiny_sd, prompts, tmp_path, capsys):
    own, pairs = tmp_path / "own", tmp_path / "pairs"
    own.mkdir()
    (own / "prompts.jsonl").write_text("mine")
    assert make(own, tiny_sd, prompts, "--overwrite") == 2
    assert "is not empty and holds no pairs" in capsys.readouterr().err
    assert [path.name for path in own.iterdir()] == ["prompts.jsonl"]
    assert make(prompts, tiny_sd, prompts, "--overwrite") == 2
    assert "is a file; an output folder is needed" in capsys.readouterr().err
    pairs.mkdir()
    inside = pairs / "prompts.jsonl"
    inside.write_text('{"prompt": "a cat"}\n')
    (pairs / "trajectories.json").write_text("{}")
    assert make(pairs, tiny_sd, inside, "--overwrite") == 2
    assert "keep yours outside of --output" in capsys.readouterr().err and inside.exists()


def test_what_cannot_be_asked_for_is_refused(tiny_sd, prompts, tmp_path, capsys):
    folder = tmp_path / "pairs"

    def refusal(prompts: Path | None, *more: object) -> str:
        assert make(folder, tiny_sd, prompts, *more) == 2
        assert not folder.exists()
        return capsys.readouterr().err

    assert "no prompts: give --prompts FILE" in refusal(None)
    assert "not both" in refusal(prompts, "--data", tmp_path)
    assert "--split: needs --data" in refusal(None, "--split", "test")
    assert "--shard 0: must be at least 1" in refusal(prompts, "--shard", 0)
    for guidance in (-1, "nan", "inf"):
        assert f"--guidance {guidance}" in refusal(prompts, "--guidance", guidance)
    assert "1 is no guidance" in refusal(prompts, "--guidance", 0.5)
    assert "multiples of" in refusal(prompts, "--size", 33)
    assert "1001 steps" in refusal(prompts, "--steps", 1001)
    assert "not on a CPU" in refusal(prompts, "--dtype", "fp16")


def test_pairs_that_come_out_not_finite_now_are_not_those_that_were_stored(
    tiny_sd, prompts, tmp_path, capsys
):
    """max(0, nan) is 0: a teacher that overflows passed as equal up to rounding."""
    folder = tmp_path / "pairs"
    make(folder, tiny_sd, prompts)
    header = read_header(folder)
    model = LatentDiffusion.load(tiny_sd)
    teacher = Teacher(model, header, read_prompt_rows(folder, header))
    assert verify_pairs(teacher, folder, 3).passed
    with torch.no_grad():
        next(model.denoiser.model.parameters()).fill_(torch.inf)
    found = verify_pairs(teacher, folder, 3)
    assert found.largest == math.inf and not found.passed
    halved = shutil.copytree(folder, tmp_path / "fp16")
    write_header(halved, replace(header, dtype="fp16"))
    assert main(["trajectories", "--output", str(halved), "--verify", "1", "--device", "cpu"]) == 2
    assert "made in fp16, which a CPU does not compute with" in capsys.readouterr().err


def test_pairs_that_are_not_finite_are_dropped_and_counted(tiny_sd, tmp_path, capsys):
    """A text encoder whose embedding of one letter is infinite makes such pairs of its prompts."""
    broken = shutil.copytree(tiny_sd, tmp_path / "broken")
    path = next((broken / "text_encoder").glob("*.safetensors"))
    tokenizer = LatentDiffusion.load(tiny_sd).conditioner.components["tokenizer"]
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("token_embedding.weight"))
    weights[name][tokenizer("z").input_ids[1]] = torch.inf
    save_file(weights, path, metadata={"format": "pt"})
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb z\nc\n")
    folder = tmp_path / "pairs"
    assert make(folder, broken, prompts, "--json") == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["dropped"] == 2 and "2 pairs are left out" in output.err
    data = TrajectoryData(folder, batch_size=1, seed=0)
    assert data.kept == [0, 2, 3, 5, 6]
    assert data.pairs(range(5)).latents.isfinite().all()
    prompts.write_text("z\n")
    assert make(tmp_path / "none", broken, prompts) == 1
    assert "not one pair is finite" in capsys.readouterr().err


def test_captions_of_a_data_folder_are_prompts(tiny_sd, tmp_path):
    data = tmp_path / "pictures"
    data.mkdir()
    for number, texts in enumerate(("a cat\na tiger\n", "a dog\n", "a cat\n")):
        Image.new("RGB", (32, 32)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(texts)
    folder = tmp_path / "pairs"
    flags = ["--data", data, "--steps", 1, "--guidance", 1]
    assert main(["trajectories", *words(folder, tiny_sd, None, *flags)]) == 0
    batch = TrajectoryData(folder, batch_size=1, seed=0).pairs(range(4))
    assert batch.captions == ["a cat", "a tiger", "a dog", "a cat"]


def test_classes_are_prompts_in_turn(tiny_folder, tmp_path):
    folder = tmp_path / "pairs"
    model = tiny_folder("dit")
    flags = ["--steps", 1, "--guidance", 1, "--count", 4]
    assert main(["trajectories", *words(folder, model, None, *flags)]) == 0
    data = TrajectoryData(folder, batch_size=1, seed=0)
    data.check(LatentDiffusion.load(model))
    labels = data.pairs(range(4)).labels
    assert labels is not None and labels.tolist() == [0, 1, 2, 3]


def start(folder: Path, model: Path, prompts: Path, *more: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "diffkit.cli", "trajectories"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *words(folder, model, prompts, *more)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_processes_share_the_shards_and_one_that_is_killed_goes_on(tiny_sd, prompts, tmp_path):
    """Each shard is made once; what a killed process was making is made by the next."""
    straight, folder = tmp_path / "straight", tmp_path / "pairs"
    flags = ["--steps", 10, "--count", 60, "--shard", 2, "--batch-size", 2]
    assert main(["trajectories", *words(straight, tiny_sd, prompts, *flags)]) == 0
    victim = start(folder, tiny_sd, prompts, *flags)
    while len(shards(folder)) < 2:
        assert victim.poll() is None
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("pairs-*")}
    assert len(kept) < 30
    both = [start(folder, tiny_sd, prompts, *flags, "--json") for _ in range(2)]
    reports = []
    for process in both:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        reports.append(json.loads(output))
    assert shards(folder) == shards(straight)
    assert all((folder / name).stat().st_mtime_ns == made for name, made in kept.items())
    made = [report["made"] for report in reports]
    assert min(made) > 0 and sum(made) == 60 - 2 * len(kept)


@pytest.mark.slow
def test_processes_of_one_launch_share_the_shards(tiny_sd, prompts, tmp_path):
    straight, folder = tmp_path / "straight", tmp_path / "pairs"
    flags = ["--steps", 3, "--count", 12, "--shard", 2, "--batch-size", 2]
    assert main(["trajectories", *words(straight, tiny_sd, prompts, *flags)]) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = [*launch, "-m", "diffkit.cli", "trajectories"]
    done = subprocess.run(
        [*command, *words(folder, tiny_sd, prompts, *flags, "--json")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["elsewhere"] == 0 and shards(folder) == shards(straight)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["sdxl", "sd3", "flux", "pixart-sigma", "latent", "pixel", "sdxl-edm"]
)
def test_every_family_can_teach(name, tiny_folder, prompts, tmp_path):
    """Sizes, shifts by resolution and embedded guidance are told; noise of EDM is scaled a copy."""
    folder, model = tmp_path / "pairs", tiny_folder(name)
    texts = None if name in ("latent", "pixel") else prompts
    assert main(["trajectories", *words(folder, model, texts, "--steps", 2, "--count", 2)]) == 0
    data = TrajectoryData(folder, batch_size=1, seed=0)
    data.check(LatentDiffusion.load(model))
    noise = data.pairs([0, 1]).noise
    assert 0.8 < noise.std() < 1.2
    verify = ["trajectories", "--output", str(folder), "--verify", "2", "--device", "cpu"]
    assert main(verify) == 0
