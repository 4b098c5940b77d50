"""Configuration: strict files, flags over files, impossible combinations, what may change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from diffkit.commands.train import configs, parse
from diffkit.errors import UserError
from diffkit.objectives.denoising import DenoisingConfig
from diffkit.training.configfile import differing_keys, dump, load, to_plain
from diffkit.training.denoising import DenoisingTraining
from diffkit.training.folder import RunFolder
from tests.training.toy import ToyObjective, config_for, train

REQUIRED = ["--data", "pictures", "--output", "out"]


def from_file(tmp_path, text, *words):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return parse(DenoisingTraining, ["--config", str(path), *words], "diffkit train denoising")


def test_flags_win_over_the_file(tmp_path):
    text = "data: a\noutput: o\nlearning_rate: 1e-3\nseed: 4\ndenoising: {min_snr: 5}\n"
    config = from_file(tmp_path, text, "--seed", "9", "--denoising.offset-noise", "0.1")
    assert (config.data, config.learning_rate, config.seed) == ("a", 1e-3, 9)
    assert (config.denoising.min_snr, config.denoising.offset_noise) == (5.0, 0.1)


def test_a_required_flag_may_come_from_either(tmp_path):
    assert from_file(tmp_path, "data: a\n", "--output", "o").data == "a"
    with pytest.raises(UserError, match="output"):
        from_file(tmp_path, "data: a\n")


def test_dump_and_load_are_inverse(tmp_path):
    config = parse(configs()["denoising"], [*REQUIRED, "--lora-targets", "to_q", "to_k"], "x")
    path = tmp_path / "c.yaml"
    path.write_text(dump(config))
    assert load(path, DenoisingTraining) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1", ["learning_rat", "Did you mean learning_rate?"]),
        ("denoising: {min_snrr: 5}", ["denoising.min_snrr", "min_snr"]),
        ("max_steps: many", ["max_steps", "whole number", "text"]),
        ("max_steps: 1.5", ["max_steps", "whole number"]),
        ("max_steps: true", ["max_steps", "whole number"]),
        ("flip: 1", ["flip", "true or false"]),
        ("ema: yes please", ["ema", "number"]),
        ("lr_schedule: cosinus", ["lr_schedule", "cosine"]),
        ("lora_targets: to_q", ["lora_targets", "list"]),
        ("lora_targets: [1]", ["lora_targets[0]", "text"]),
        ("denoising: 3", ["denoising", "mapping"]),
        ("- 1", ["mapping"]),
        ("a: [", ["YAML"]),
    ],
)
def test_a_wrong_file_is_refused(text, words, tmp_path):
    with pytest.raises(UserError) as error:
        from_file(tmp_path, text, *REQUIRED)
    assert all(word in str(error.value) for word in ["config.yaml", *words])


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--batch-size", "0"], "batch_size"),
        (["--learning-rate", "-1"], "learning_rate"),
        (["--ema", "1"], "ema"),
        (["--decay-steps", "5"], "decay_steps"),
        (["--warmup-steps", "2000"], "warmup_steps"),
        (["--lora-alpha", "4"], "lora_alpha"),
        (["--cache", "c"], "cache"),
        (["--cache-latents", "--crop", "random"], "cache_latents"),
        (["--denoising.min-snr", "0"], "denoising.min_snr"),
        (["--denoising.condition-dropout", "2"], "denoising.condition_dropout"),
        (["--denoising.logit-mean", "1"], "denoising.logit_mean"),
    ],
)
def test_impossible_values_are_refused_by_name(words, name):
    config = parse(DenoisingTraining, [*REQUIRED, *words], "x")
    with pytest.raises(UserError, match=name):
        config.check()


def test_a_batch_must_be_divisible():
    config = config_for("o", batch_size=6, accumulation=2)
    assert config.check_processes(3) == 1
    with pytest.raises(UserError, match="batch_size: 6 .* 8 can"):
        config.check_processes(2)


def test_another_configuration_on_the_same_output_is_refused(tmp_path):
    config = config_for(tmp_path, max_steps=8)
    assert train(config, ToyObjective()) == 0
    with pytest.raises(UserError, match="learning_rate: 0.01 there, 0.1 now") as error:
        train(replace(config, learning_rate=0.1, seed=3, keep=5), ToyObjective())
    assert "seed" in str(error.value)
    assert "keep" not in str(error.value)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["learning_rate"] == 0.01


def test_steps_that_were_made_keep_their_rates(tmp_path):
    assert train(config_for(tmp_path, max_steps=8), ToyObjective()) == 0
    with pytest.raises(UserError, match="max_steps: 8 there, 20 now"):
        train(config_for(tmp_path, max_steps=20), ToyObjective())


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        train(config_for(tmp_path), ToyObjective())


def test_overwrite_starts_anew(tmp_path):
    assert train(config_for(tmp_path, max_steps=8), ToyObjective()) == 0
    fresh = config_for(tmp_path, max_steps=6, learning_rate=0.1, overwrite=True)
    assert train(fresh, ToyObjective()) == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()][0] != "step-00000008"


def test_differing_keys_are_dotted():
    old = to_plain(DenoisingTraining("a", "o"))
    new = to_plain(replace(DenoisingTraining("a", "o"), seed=2))
    new["denoising"]["min_snr"] = 5.0
    assert differing_keys(old, new) == {"seed": (0, 2), "denoising.min_snr": (None, 5.0)}


def test_a_default_may_be_said_in_full_or_left_out(tmp_path):
    """condition_dropout and density got defaults that depend on the model, None; runs that had
    been started before were refused as runs of another configuration, 0.1 and uniform."""
    output = tmp_path / "out"
    output.mkdir()

    def check(old: DenoisingConfig, new: DenoisingConfig) -> None:
        first, again = (
            DenoisingTraining("data", output, denoising=denoising) for denoising in (old, new)
        )
        plain = to_plain(first)
        for name in ("guidance", "log_mean", "log_std"):  # later than the rest
            del plain["denoising"][name]
        (output / "config.yaml").write_text(yaml.safe_dump(plain))
        RunFolder(again).check(again)

    before, now = DenoisingConfig(condition_dropout=0.1, density="uniform"), DenoisingConfig()
    check(before, now)
    check(now, before)
    check(DenoisingConfig(density="log_normal"), now)
    with pytest.raises(UserError, match="denoising.condition_dropout: 0.2 there, None now"):
        check(DenoisingConfig(condition_dropout=0.2), now)
    with pytest.raises(UserError, match="denoising.density: None there, 'logit_normal' now"):
        check(now, DenoisingConfig(density="logit_normal"))
