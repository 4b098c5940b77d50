"""DreamBooth and textual inversion from the command line: results load in plain diffusers, runs
resume bit by bit, class pictures are made once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import load_file

from diffkit.cli import main
from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import load_lora
from diffkit.models.placeholder import load_embedding
from diffkit.training import companions
from tests.training.test_denoising_runs import picture, rows
from tests.training.test_processes import launch


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Three pictures without captions."""
    folder = tmp_path_factory.mktemp("subject")
    draw = np.random.default_rng(1)
    for i in range(3):
        pixels = draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def flags(subject, tmp_path, tiny_folder):
    """Words of `diffkit train` without the method."""

    def words(*more, model="sd", output="out", data=None):
        found = ["--model", tiny_folder(model), "--data", data or subject, "--size", 32]
        found += ["--output", tmp_path / output, "--tracker", "none", "--max-steps", 2]
        found += ["--checkpoint-every", 2, "--learning-rate", "0.01", "--batch-size", 1, *more]
        return [str(word) for word in found]

    return words


INSTANCE = ("--dreambooth.instance-prompt", "a sks dog")
CLASS = ("--dreambooth.class-prompt", "a dog", "--dreambooth.class-count", 2)
PRIOR = (*INSTANCE, *CLASS, "--dreambooth.class-steps", 2)
TEXT = ("--dreambooth.train-text-encoder",)
WORD = ("--textual-inversion.token", "<x>", "--textual-inversion.initializer", "ab")
WORD += ("--textual-inversion.vectors", 2, "--textual-inversion.prompts", "a {}", "one {}")


def weights(folder):
    """All tensors of the result."""
    files = sorted(folder.rglob("*.safetensors"))
    return {(str(f.relative_to(folder)), k): v for f in files for k, v in load_file(f).items()}


def same(first, second):
    left, right = weights(first), weights(second)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(
    ("method", "result", "more"),
    [
        pytest.param("dreambooth", "model", (*PRIOR, *TEXT), marks=pytest.mark.slow),
        ("dreambooth_lora", "lora", (*PRIOR, *TEXT, "--cache-latents", "--ema", "0.9")),
        ("textual_inversion", "embedding", (*WORD, "--ema", "0.9")),
    ],
)
def test_resumed_is_uninterrupted(method, result, more, flags, tmp_path):
    assert main(["train", method, *flags(*more, "--max-steps", 3, output="whole")]) == 0
    for steps in (1, 3):
        assert main(["train", method, *flags(*more, "--max-steps", steps, output="parts")]) == 0
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert len(rows(tmp_path / "whole")) == 3
    assert same(tmp_path / "whole" / result, tmp_path / "parts" / result)


def test_a_dreambooth_model_in_plain_diffusers(flags, tmp_path, tiny_sd):
    assert main(["train", "dreambooth", *flags(*INSTANCE, *TEXT)]) == 0
    result = tmp_path / "out" / "model"
    stock = StableDiffusionPipeline.from_pretrained(result, safety_checker=None)
    ours = LatentDiffusion.load(result).pipeline()
    assert torch.equal(torch.as_tensor(picture(stock)), torch.as_tensor(picture(ours)))
    before, after = weights(tiny_sd), weights(result)
    changed = {
        file.split("/")[0]
        for file, key in before
        if not torch.equal(before[file, key], after[file, key])
    }
    assert changed == {"unet", "text_encoder"}


@pytest.mark.parametrize(
    ("name", "pipeline", "encoders"),
    [
        ("sd", StableDiffusionPipeline, {"text_encoder"}),
        pytest.param(
            "sdxl",
            StableDiffusionXLPipeline,
            {"text_encoder", "text_encoder_2"},
            marks=pytest.mark.slow,
        ),
        ("sd3", StableDiffusion3Pipeline, {"text_encoder", "text_encoder_2"}),
    ],
)
def test_a_lora_in_plain_diffusers(name, pipeline, encoders, flags, tmp_path, tiny_folder):
    assert main(["train", "dreambooth_lora", *flags(*INSTANCE, *TEXT, model=name)]) == 0
    stock = pipeline.from_pretrained(tiny_folder(name))
    plain = stock.encode_prompt
    result = tmp_path / "out" / "lora"
    stock.load_lora_weights(result)
    listed = stock.get_list_adapters()
    assert set(listed) == encoders | {LatentDiffusion.load(tiny_folder(name)).family.denoiser}
    ours = LatentDiffusion.load(tiny_folder(name))
    before = ours.conditioner.encode(["a sks dog"], (32, 32)).tokens
    load_lora(ours, result)
    after = ours.conditioner.encode(["a sks dog"], (32, 32)).tokens
    assert not torch.equal(before, after)
    options = {"do_classifier_free_guidance": False, "device": torch.device("cpu")}
    if name == "sd":
        options["num_images_per_prompt"] = 1
    if name == "sd3":
        options |= {"prompt_2": None, "prompt_3": None}
    with torch.no_grad():
        torch.testing.assert_close(plain(prompt="a sks dog", **options)[0], after)


def test_class_pictures_are_made_once(flags, tmp_path, capsys, monkeypatch):
    assert main(["train", "dreambooth_lora", *flags(*PRIOR)]) == 0
    assert "making 2 class pictures of 'a dog'" in capsys.readouterr().err
    (folder,) = (tmp_path / "out" / "cache").glob("companions-*")
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert len(times) == 2

    def refuse(*_):
        raise AssertionError("the class pictures were made again")

    monkeypatch.setattr(companions, "_sample", refuse)
    assert main(["train", "dreambooth_lora", *flags(*PRIOR, "--max-steps", 3)]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")} == times
    shared = ("--cache", tmp_path / "out" / "cache")
    assert main(["train", "dreambooth_lora", *flags(*PRIOR, *shared, output="other")]) == 0


@pytest.mark.slow
def test_a_killed_sampling_goes_on(flags, tmp_path):
    assert main(["train", "dreambooth_lora", *flags(*PRIOR, output="a")]) == 0
    (folder,) = (tmp_path / "a" / "cache").glob("companions-*")
    kept = (folder / "00000.png").read_bytes(), (folder / "00001.png").read_bytes()
    (folder / "complete.json").unlink()
    (folder / "00001.png").write_bytes(kept[1][:50])
    assert main(["train", "dreambooth_lora", *flags(*PRIOR, "--overwrite", output="a")]) == 0
    assert (folder / "00000.png").read_bytes() == kept[0]
    assert (folder / "00001.png").read_bytes() == kept[1]


def test_given_class_pictures_and_captions(flags, tmp_path, pictures, subject):
    """A style LoRA reads the captions of the folder; a class folder is taken as it is."""
    given = ("--dreambooth.class-prompt", "a dog", "--dreambooth.class-images", subject)
    assert main(["train", "dreambooth_lora", *flags(*given, data=pictures)]) == 0
    (first, *_) = rows(tmp_path / "out")
    assert {"loss", "instance_loss", "prior_loss"} <= first.keys()
    assert not (tmp_path / "out" / "cache").exists()


@pytest.mark.parametrize(
    ("name", "kind"), [("sd", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)]
)
def test_a_textual_inversion_in_plain_diffusers(name, kind, flags, tmp_path, tiny_folder):
    assert main(["train", "textual_inversion", *flags(*WORD, model=name)]) == 0
    result = tmp_path / "out" / "embedding"
    stock = kind.from_pretrained(tiny_folder(name))
    files = {"": "learned_embeds.safetensors"}
    if name == "sdxl":
        files["_2"] = "learned_embeds_2.safetensors"
    for part, file in files.items():
        encoder, tokenizer = (getattr(stock, f"{x}{part}") for x in ("text_encoder", "tokenizer"))
        before = encoder.get_input_embeddings().weight.detach().clone()
        options = {"text_encoder": encoder, "tokenizer": tokenizer, "weight_name": file}
        stock.load_textual_inversion(result, **options)
        table = encoder.get_input_embeddings().weight
        learnt = load_file(result / file)["<x>"]
        ids = tokenizer.convert_tokens_to_ids(["<x>", "<x>_1"])
        assert torch.equal(table[ids], learnt) and learnt.dtype == torch.float32
        assert torch.equal(table[: len(before)], before)
        start = tokenizer.encode("ab", add_special_tokens=False)
        assert (learnt - before[start]).abs().amax(1).gt(1e-3).all()
    ours = LatentDiffusion.load(tiny_folder(name))
    assert load_embedding(ours, result) == "<x>"
    theirs = LatentDiffusion(stock).conditioner.encode(["a <x>"], (32, 32)).tokens
    assert torch.equal(ours.conditioner.encode(["a <x>"], (32, 32)).tokens, theirs)
    with pytest.raises(UserError, match="already in tokenizer"):
        load_embedding(ours, result)
    card = (result / "README.md").read_text()
    assert "textual_inversion" in card and "load_textual_inversion" in card
    if name == "sd":
        assert torch.as_tensor(picture(lambda _, **o: stock("a <x>", **o))).isfinite().all()
    checkpoint = load_file(tmp_path / "out/checkpoints/step-00000002/embedding.safetensors")
    assert all(key.endswith("rows") for key in checkpoint) and len(checkpoint) == len(files)


def test_validation_pictures_follow_the_word(flags, tmp_path):
    """Prompts are encoded anew each time: the pictures of later steps differ."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a <x>\n")
    shown = ("--validation-prompts", prompts, "--validation-every", 1, "--validation-steps", 1)
    words = flags(*WORD, *shown, "--learning-rate", "1.0")
    assert main(["train", "textual_inversion", *words]) == 0
    first, second = (
        np.asarray(Image.open(p)) for p in sorted((tmp_path / "out" / "samples").iterdir())
    )
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        pytest.param("dreambooth", PRIOR, marks=pytest.mark.slow),
        ("dreambooth_lora", (*PRIOR, *TEXT)),
        pytest.param("textual_inversion", WORD, marks=pytest.mark.slow),
    ],
)
def test_dry_run_writes_nothing(method, more, flags, tmp_path, capsys):
    assert main(["train", method, *flags(*more, "--dry-run")]) == 0
    assert "parameters are trained" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("dreambooth", ("--cache-embeddings", *INSTANCE, *TEXT), "cache_embeddings: prompts are"),
        ("dreambooth", ("--compile", *INSTANCE, *TEXT), "compile: prompts are encoded"),
        ("dreambooth", ("--lora-rank", 2, *INSTANCE), "lora_rank: dreambooth trains all"),
        ("dreambooth", ("--streaming", *INSTANCE), "streaming: is for data"),
        ("dreambooth_lora", (), "have no caption"),
        ("dreambooth_lora", ("--lora-rank", "None", *INSTANCE), "lora_rank: dreambooth_lora"),
        ("textual_inversion", (*WORD, "--lora-rank", 2), "lora_rank: textual inversion"),
        ("textual_inversion", (*WORD, "--cache-embeddings"), "cache_embeddings: prompts are"),
        ("textual_inversion", (*WORD, "--caption-column", "text"), "caption_column: captions"),
    ],
)
def test_what_cannot_be_combined(method, more, message, flags, capsys, tmp_path):
    assert main(["train", method, *flags(*more)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_models_of_classes_are_refused(flags, capsys, tiny_folder):
    assert main(["train", "dreambooth", *flags(*INSTANCE, model="dit")]) == 2
    assert "models read no text" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("dreambooth", (*PRIOR, *TEXT)),
        ("dreambooth_lora", (*PRIOR, *TEXT)),
        ("textual_inversion", WORD),
    ],
)
def test_two_processes_equal_one(method, more, flags, tmp_path):
    """Of SDXL, whose first text encoder has a last layer that nobody reads."""
    words = flags(*more, "--batch-size", 4, "--max-steps", 4, model="sdxl", output="one")
    assert main(["train", method, *words]) == 0
    words = flags(*more, "--batch-size", 4, "--max-steps", 4, model="sdxl", output="two")
    codes, said = launch(2, [f"scripts/train_{method}.py", *words])
    assert codes == [0, 0], said
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
