"""Preference optimisation from the command line: results in plain diffusers, what cannot be
combined. (Stopping, killing and splitting: test_objective_runs.py.)"""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from diffkit.cli import main
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import load_lora
from tests.data.pairs import pair_folder
from tests.training.test_denoising_runs import picture, rows
from tests.training.test_processes import launch

SLOW = pytest.mark.slow
ADAPTIVE = ("--preference.loss", "adaptive_dpo")
BATCH = (*ADAPTIVE, "--adaptive.normalization", "batch")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Six pairs with prompts."""
    return pair_folder(tmp_path_factory.mktemp("pairs"), 6, ((32, 32),))


@pytest.fixture
def flags(pairs, tmp_path, tiny_folder):
    """Words of `diffkit train preference`."""

    def words(*more, model="sd", output="out"):
        found = ["--model", tiny_folder(model), "--data", pairs, "--tracker", "none"]
        found += ["--output", tmp_path / output, "--max-steps", 3, "--batch-size", 2]
        found += ["--warmup-steps", 0, "--learning-rate", "1e-3", "--checkpoint-every", 3, *more]
        return [str(word) for word in found]

    return words


def check_rows(found):
    """What a run of three steps logs."""
    assert found[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert (found[0]["accuracy"], found[0]["win_rate"], found[0]["winner_drift"]) == (0.5, 0.5, 1.0)
    assert [row["weight"] for row in found[:2]] == [1.0, 1.0] and found[2]["weight"] < 1
    names = {"margin", "winner_error", "loser_error", "reference_error", "minority"}
    assert names <= found[2].keys() and len(found[2]["loss_by_time"]) == 10


def test_a_model_in_plain_diffusers(flags, tmp_path, tiny_sd):
    """Only the denoiser has changed; the annotators' and the reference's weights are not in it."""
    assert main(["train", "preference", *flags(*ADAPTIVE)]) == 0
    check_rows(rows(tmp_path / "out"))
    result = tmp_path / "out" / "model"
    stock = StableDiffusionPipeline.from_pretrained(result, safety_checker=None)
    ours = LatentDiffusion.load(result).pipeline()
    assert torch.equal(torch.as_tensor(picture(stock)), torch.as_tensor(picture(ours)))
    for part in ("vae", "text_encoder", "unet"):
        (before,), (after,) = (list((f / part).glob("*.safetensors")) for f in (tiny_sd, result))
        old, new = load_file(before), load_file(after)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[k], new[k]) for k in old) == (part != "unet")


@pytest.mark.parametrize(
    ("name", "pipeline", "loss"),
    [
        ("sd", StableDiffusionPipeline, ADAPTIVE),
        pytest.param("sd3", StableDiffusion3Pipeline, ("--preference.pixel", "dpo"), marks=SLOW),
    ],
)
def test_a_lora_in_plain_diffusers(name, pipeline, loss, flags, tmp_path, tiny_folder):
    assert main(["train", "preference", *flags("--lora-rank", 2, *loss, model=name)]) == 0
    options = {} if name == "sd3" else {"safety_checker": None}
    stock = pipeline.from_pretrained(tiny_folder(name), **options)

    def picture(pipe):
        draw, asked = torch.Generator().manual_seed(0), {"height": 32, "width": 32}
        found = pipe("a", num_inference_steps=2, output_type="pt", generator=draw, **asked)
        return torch.as_tensor(found.images)

    before = picture(stock)
    stock.load_lora_weights(tmp_path / "out" / "lora")
    ours = LatentDiffusion.load(tiny_folder(name))
    load_lora(ours, tmp_path / "out" / "lora")
    after = picture(stock)
    torch.testing.assert_close(after, picture(ours.pipeline()))
    assert not torch.equal(before, after)


@SLOW
def test_a_run_that_drifts_stops(flags, tmp_path, capsys):
    words = flags("--learning-rate", 3, "--max-steps", 8, "--log-every", 1, "--max-grad-norm", 9)
    assert main(["train", "preference", *words]) == 1
    assert "the error of the winners has grown to" in capsys.readouterr().err
    assert 0 < len(rows(tmp_path / "out")) < 8


@SLOW
@pytest.mark.parametrize("more", [(*BATCH, "--adaptive.margin", "linear")])
def test_the_batch_of_two_processes_is_one_batch(more, flags, tmp_path):
    """The published norm is taken over the pairs of all processes."""
    words = ("--batch-size", 4, "--max-steps", 5, *more)
    assert main(["train", "preference", *flags(*words, output="one")]) == 0
    codes, said = launch(2, ["scripts/train_preference.py", *flags(*words, output="two")])
    assert codes == [0, 0], said
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for name in ("loss", "weight", "minority", "margin", "winner_error"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), (a["step"], name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--adaptive.rho", 3), "adaptive.rho: dpo has no annotators"),
        ((*BATCH, "--accumulation", 2), "adaptive.normalization: batch needs the whole batch"),
        ((*BATCH, "--batch-size", 1), "needs at least 2"),
        (("--warmup-steps", 100), "= 3; use --warmup-steps 0, or make --max-steps larger"),
        ((*ADAPTIVE, "--max-steps", 2), "adaptive.warmup_steps: in all 2 steps every pair"),
        (
            ("--preference.loss", "adaptive_ipo", "--adaptive.margin", "linear"),
            "adaptive.margin: adaptive_ipo has none",
        ),
        (("--denoising.min-snr", 5), "denoising.min_snr: weighs the denoising loss"),
        (("--preference.flip-rate", 0.1), "preference.flip_rate: dpo reckons"),
        (("--streaming",), "streaming: preference pairs"),
    ],
)
def test_what_cannot_be_combined(more, message, flags, capsys, tmp_path):
    assert main(["train", "preference", *flags(*more)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_longer_run_keeps_its_warm_up(flags, tmp_path, capsys):
    """By default the warm-up is a tenth of the run: made longer, a run would have weighed its first
    steps otherwise than one of that length, and a resumed one would have warmed up again."""
    assert main(["train", "preference", *flags(*ADAPTIVE)]) == 0
    longer = flags(*ADAPTIVE, "--max-steps", 40)
    assert main(["train", "preference", *longer]) == 2
    said = capsys.readouterr().err
    assert "adaptive.warmup_steps: 2 there, 4 now" in said
    assert "the same one (--adaptive.warmup-steps 2)" in said
    assert main(["train", "preference", *longer[:-1], "4", "--adaptive.warmup-steps", "2"]) == 0
    assert len(rows(tmp_path / "out")) == 4


def test_a_stopped_run_gives_its_result(flags, tmp_path, capsys):
    """A run that drifts stops before its checkpoint is written. It had no way out but to do so
    again: the limit was part of what the run is. Now a shorter run, or another limit, ends it."""
    limit = ("--preference.drift-limit", "1.0000001", "--learning-rate", "0.05")
    more = ("--checkpoint-every", 1, "--log-every", 1, "--warmup-steps", 1, *limit)
    assert main(["train", "preference", *flags(*more, "--max-steps", 9)]) == 1
    said = capsys.readouterr().err
    assert "with --max-steps set to its step writes its result" in said
    made = sorted((tmp_path / "out" / "checkpoints").glob("step-*"))
    last = int(made[-1].name.removeprefix("step-"))
    assert main(["train", "preference", *flags(*more, "--max-steps", last)]) == 0
    assert (tmp_path / "out" / "model" / "model_index.json").exists()
    free = ("--preference.drift-limit", "1e9", "--max-steps", last + 1)
    assert main(["train", "preference", *flags(*more, *free)]) == 0
    assert "going on after step" in capsys.readouterr().err
