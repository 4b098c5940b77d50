"""The parts of a run, and that `kill -9` at any moment changes nothing but the time it takes."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffkit.assets import path as assets

from diffkit.errors import UserError
from diffkit.evaluation.folder import EvaluationFolder
from diffkit.evaluation.metrics.tools import Toolbox
from diffkit.evaluation.pictures import PictureSet
from diffkit.evaluation.plan import choose_prompts, pick
from diffkit.evaluation.request import EvaluationRequest, Side, stamp
from diffkit.evaluation.run import _bench_device, _stamps
from diffkit.evaluation.selection import Selection
from diffkit.evaluation.values import measure_samples
from diffkit.evaluation.wording import verdict
from diffkit.generation.recipe import read_recipe
from tests.evaluation.sets import evaluate, real_pictures, report_of, rows_of, times


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_pictures(tmp_path_factory.mktemp("real") / "pictures")


# -- prompts and seeds ----------------------------------------------------------------------------


def prompts_file(folder: Path, count: int) -> Path:
    file = folder / "prompts.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(count)))
    return file


def test_prompts_are_drawn_from_a_long_list_and_shared_by_a_short_one(tmp_path: Path) -> None:
    file = prompts_file(tmp_path, 100)
    request = EvaluationRequest(Side("model", "embedded"), prompts=file, num=10, per_prompt=4)
    planned = choose_prompts(request)
    assert (len(planned.prompts), planned.per_prompt, planned.num) == (3, 4, 10)
    numbers = [int(text.split()[1]) for text in planned.prompts]
    assert numbers == sorted(set(numbers))
    few = EvaluationRequest(Side("model", "embedded"), prompts=prompts_file(tmp_path, 3), num=20)
    assert choose_prompts(few).prompts == ("prompt 0", "prompt 1", "prompt 2")
    assert choose_prompts(few).per_prompt == 7
    with pytest.raises(UserError, match="--per-prompt 2: 3 prompts"):
        choose_prompts(EvaluationRequest(few.model, prompts=few.prompts, num=20, per_prompt=2))


def test_a_pick_depends_on_the_seed_alone() -> None:
    names = [str(i) for i in range(50)]
    assert pick(names, 7, 1) == pick(names, 7, 1)
    assert pick(names, 7, 1) != pick(names, 7, 2)
    assert set(pick(names, 7, 1)) < set(names)
    assert pick(names, 50, 3) == tuple(names)


def test_prompts_come_from_the_captions_then_from_the_card(real: Path) -> None:
    model = Side("model", "embedded")
    captioned = choose_prompts(EvaluationRequest(model, data=real, num=48))
    assert len(captioned.prompts) == 12
    assert captioned.prompts[0].startswith("watermelon, noto style")
    assert choose_prompts(EvaluationRequest(model, num=64)).source == "card of embedded"


def test_both_sets_draw_the_same_prompts_from_the_same_seeds(tiny_sd: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", prompts_file(tmp_path, 2)
    words = (tiny_sd, "--against", tiny_sd, "--prompts", file, "--output", out, "--seed", 40)
    flags = ("--num", 6, "--steps", 1, "--against-steps", 2, "--metrics", "high_frequency")
    assert evaluate(*words, *flags) == 0
    for index in range(6):
        ours, theirs = (read_recipe(out / s / f"{index:05d}.png") for s in ("model", "against"))
        assert (ours.steps, theirs.steps) == (1, 2)
        assert (ours.prompt, ours.seed) == (theirs.prompt, theirs.seed)
        assert (ours.prompt, ours.seed) == (f"prompt {index // 3}", 40 + index)
    names = [entry["name"] for entry in report_of(out)["sets"].values()]
    assert names == ["sd (steps 1)", "sd (steps 2)"]


def test_the_baseline_may_leave_out_what_both_are_given(tiny_sd: Path, tmp_path: Path) -> None:
    from diffkit.models.latent_diffusion import LatentDiffusion
    from diffkit.models.lora import add_lora, save_lora

    model = LatentDiffusion.load(tiny_sd)
    for parameter in add_lora(model, rank=2).values():
        parameter.data.fill_(0.2)
    save_lora(model, tmp_path / "lora", "default")
    lora = f"{tmp_path / 'lora'}:0.5"
    out, file = tmp_path / "out", prompts_file(tmp_path, 2)
    words = (tiny_sd, "--against", tiny_sd, "--prompts", file, "--num", 2, "--output", out)
    ours = ("--lora", lora, "--scheduler", "dpm++", "--guidance", 2)
    theirs = ("--against-lora", "none", "--against-scheduler", "own", "--against-guidance", 3)
    flags = ("--steps", 2, "--metrics", "high_frequency", "psnr")
    assert evaluate(*words, *ours, *theirs, *flags) == 0
    sets = report_of(out)["sets"]
    assert sets["model"]["loras"] == [[str(tmp_path / "lora"), 0.5]]
    assert sets["against"]["loras"] == []
    assert (sets["model"]["guidance"], sets["against"]["guidance"]) == (2, 3)
    assert sets["model"]["scheduler"] == "dpm++"
    assert sets["against"]["scheduler"] == "DDIMScheduler"
    assert sets["model"]["weights"] != sets["against"]["weights"]
    assert "guidance" in sets["model"]["name"]


# -- metrics and folders --------------------------------------------------------------------------


def test_selection() -> None:
    everything = Selection.parse(())
    assert everything.cost
    assert not everything.named
    assert Selection.parse(("all",)) == everything
    chosen = Selection.parse(("pairs", "frechet", "cost"))
    pairs = ["psnr", "ssim", "latent_lpips", "lpips"]
    assert [metric.name for metric in chosen.metrics] == ["frechet", *pairs]
    assert chosen.named == {"frechet", "cost"}
    assert Selection.parse(("cost",)).metrics == ()
    assert chosen.uses("lpips")
    assert not chosen.uses("scorer")
    with pytest.raises(UserError, match="Did you mean coverage"):
        Selection.parse(("coverge",))


def test_a_folder_remembers_its_request(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path / "out")
    config = {"seed": 0, "metrics": ["ssim"], "resamples": None, "model": {"steps": 2}}
    folder.check(config, overwrite=False)
    folder.prepare(config, overwrite=False)
    folder.check(config, overwrite=False)
    folder.check({**config, "metrics": ["pairs"]}, overwrite=False)
    folder.check({**config, "metrics": []}, overwrite=False)
    folder.check({**config, "metrics": ["psnr"]}, overwrite=False)
    folder.page.touch()
    folder.check({**config, "metrics": ["pairs"]}, overwrite=False)
    with pytest.raises(UserError, match="metrics"):
        folder.check({**config, "metrics": ["psnr"]}, overwrite=False)
    with pytest.raises(UserError, match=r"model.steps \(2 there, 3 now\)"):
        folder.check({**config, "model": {"steps": 3}}, overwrite=False)
    folder.check({**config, "seed": 1}, overwrite=True)
    folder.prepare({**config, "metrics": []}, overwrite=False)
    with pytest.raises(UserError, match="metrics"):  # some, where everything is shown
        folder.check(config, overwrite=False)


def test_a_stamp_changes_with_the_files(real: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    before = stamp(tmp_path)
    assert stamp(str(tmp_path)) == before
    os.utime(tmp_path / "a.png", ns=(1, 1))
    assert stamp(tmp_path) != before
    assert stamp("owner/name") == "owner/name"


def test_all_processes_come_to_the_same_decision(tmp_path: Path) -> None:
    """With a card each, one found the finished report and the other waited for it forever."""
    model = Side("model", str(tmp_path))
    stamps = [_stamps(EvaluationRequest(model, device=f"cuda:{rank}")) for rank in (0, 1)]
    assert stamps[0] == stamps[1] != _stamps(EvaluationRequest(model))
    assert _bench_device("mps") == "cpu"
    assert _bench_device("cuda:1") == "cuda:1"


def test_more_pictures_a_prompt_than_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--per-prompt 8: more than --num, which is 4"):
        EvaluationRequest(Side("model", "embedded"), num=4, per_prompt=8).check()


# -- values ---------------------------------------------------------------------------------------


def test_values_are_kept_and_measured_again_only_for_changed_pictures(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffkit.evaluation.values.BLOCK", 5)
    folder = real_pictures(tmp_path / "pictures")
    (metric,) = Selection.parse(("high_frequency",)).metrics
    file = tmp_path / "values" / "high_frequency-model.jsonl"

    def measured() -> torch.Tensor:
        pictures = PictureSet.open(folder)
        found = measure_samples([metric], pictures, None, Toolbox(), file.parent, "model")
        return found["high_frequency"]

    whole = measured()
    assert whole.shape == (12,)
    lines = file.read_text().splitlines()
    assert [json.loads(line).get("start") for line in lines] == [None, 0, 5, 10]
    untouched = times(file.parent)
    assert torch.equal(measured(), whole)
    assert times(file.parent) == untouched

    file.write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])  # torn by a kill
    assert torch.equal(measured(), whole)
    assert file.read_text().splitlines() == lines

    os.utime(folder / PictureSet.open(folder).names[7], ns=(1, 1))
    assert torch.equal(measured(), whole)
    again = file.read_text().splitlines()
    assert again[:2] == lines[:2]
    assert again[2] != lines[2]


# -- kills ----------------------------------------------------------------------------------------

FLAGS = ("--num", 8, "--per-prompt", 2, "--steps", 3, "--against-steps", 2, "--batch-size", 2)
METRICS = ("frechet", "recall", "alignment", "diversity", "psnr")


def command(model: Path, real: Path, out: Path) -> tuple[object, ...]:
    sets = (model, "--against", model, "--data", real, "--output", out)
    return (*sets, *FLAGS, "--resamples", 100, "--metrics", *METRICS)


def killed(words: tuple[object, ...], moment: Callable[[], bool]) -> bool:
    """Run the command in a forked process and kill it at the moment; whether it was in time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = evaluate(*words)
        finally:
            os._exit(code)
    while not moment():
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def bare(out: Path) -> dict[str, object]:
    """The report without what differs between any two runs."""
    report = report_of(out)
    for key in ("created", "command"):
        del report[key]
    return report


def assert_survives(model: Path, real: Path, tmp_path: Path, moments: list[str]) -> None:
    assert evaluate(*command(model, real, tmp_path / "whole")) == 0
    out = tmp_path / "killed"
    words = command(model, real, out)
    for pattern in moments:
        assert killed(words, lambda pattern=pattern: any(out.glob(pattern))), pattern
        assert not (out / "report.html").exists()
    assert evaluate(*words) == 0
    assert bare(out) == bare(tmp_path / "whole")
    rows = [(folder / "samples.jsonl").read_text() for folder in (out, tmp_path / "whole")]
    assert rows[0] == rows[1]
    assert rows_of(report_of(out))["frechet"]["difference"] is not None


def test_killed_while_drawing_while_measuring_and_before_the_report(
    tiny_sd: Path, real: Path, tmp_path: Path
) -> None:
    moments = ["model/00003.png", "against/00001.png", "values/alignment-against.jsonl"]
    assert_survives(tiny_sd, real, tmp_path, [*moments, "features/against-*.jsonl"])


@pytest.mark.slow
def test_killed_at_random_moments(tiny_sd: Path, real: Path, tmp_path: Path) -> None:
    assert evaluate(*command(tiny_sd, real, tmp_path / "whole")) == 0
    out = tmp_path / "killed"
    words = command(tiny_sd, real, out)
    start = time.monotonic()
    while True:
        end = time.monotonic() + random.uniform(0.1, 3.0)
        if not killed(words, lambda end=end: time.monotonic() > end):
            break
        if time.monotonic() - start > 60:
            assert evaluate(*words) == 0
            break
    assert bare(out) == bare(tmp_path / "whole")


# -- several processes ----------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_share_the_drawing(tiny_sd: Path, real: Path, tmp_path: Path) -> None:
    from tests.training.test_processes import launch

    out = tmp_path / "two"
    words = ("-m", "diffkit.cli", "evaluate", *command(tiny_sd, real, out), "--device", "cpu")
    codes, said = launch(2, words)
    assert codes == [0, 0], said
    assert evaluate(*command(tiny_sd, real, tmp_path / "one")) == 0
    one, two = bare(tmp_path / "one"), bare(out)
    assert one["metrics"] == two["metrics"]


# -- the embedded model ---------------------------------------------------------------------------


def verdicts(report: dict[str, object]) -> dict[str, str | None]:
    return {n: verdict(row["difference"], row["better"]) for n, row in rows_of(report).items()}


@pytest.mark.slow
def test_four_steps_are_clearly_worse_than_twenty_five(tmp_path: Path) -> None:
    """One picture a prompt: the interval is over prompts, so many prompts make it narrow."""
    out = tmp_path / "out"
    words = ("embedded", "--steps", 4, "--against", "embedded", "--against-steps", 25)
    flags = ("--num", 96, "--per-prompt", 1, "--batch-size", 8, "--data", assets("sample"))
    metrics = ("quality", "high_frequency", "cost")
    assert evaluate(*words, *flags, "--output", out, "--metrics", *metrics) == 0
    found = verdicts(report_of(out))
    worse = {name for name, said in found.items() if said == "worse"}
    assert len(worse) >= 2, found
    assert "better" not in found.values()
    assert found["high_frequency"] == "changed"
    assert report_of(out)["cost"]["model"]["speedup"]["low"] > 2
