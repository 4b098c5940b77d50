"""Where models come from, and what a person is told when nothing usable is there."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from diffkit.errors import RunFailed, UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.skeleton import skeleton
from diffkit.randomness import normal
from tests import original_keys


def load(path, **options):
    return LatentDiffusion.load(path, **options)


def test_single_file_equals_the_folder_it_was_made_of(tiny_sd, tmp_path):
    model = load(tiny_sd)
    single = load(single_file(tiny_sd, tmp_path / "model.safetensors"), config=tiny_sd)
    for name, network in model.networks.items():
        ours, theirs = network.state_dict(), single.networks[name].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    z_t, t = normal((1, *model.latent_shape(32, 32)), 0, "z"), torch.tensor([500])
    cond = model.conditioner.encode(["a cat"])
    with torch.no_grad():
        difference = model.denoiser(z_t, t, cond) - single.denoiser(z_t, t, cond)
    assert difference.abs().max() < 1e-6


def single_file(folder, path, leave_out=()):
    """The tiny model in the original single-file layout, without some networks."""
    model = load(folder)
    unet = model.denoiser.model
    parts = {
        "unet": original_keys.unet(unet.state_dict(), unet.config.layers_per_block),
        "vae": original_keys.vae(model.codec.vae.state_dict(), blocks=2),
        "text_encoder": original_keys.text_encoder(
            model.conditioner.encoders["text_encoder"].state_dict()
        ),
    }
    kept = [tensors for name, tensors in parts.items() if name not in leave_out]
    save_file({k: v.contiguous() for part in kept for k, v in part.items()}, path)
    return path


def test_a_file_without_its_text_encoders_names_them(tiny_sd, tmp_path):
    """Many single files, such as the small SD3 ones, hold no text encoders; diffusers says so with
    an exception class of its own, which reached the user as a traceback."""
    path = single_file(tiny_sd, tmp_path / "model.safetensors", leave_out=("text_encoder",))
    config = shutil.copytree(tiny_sd, tmp_path / "config")
    for weights in config.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: lacks a part .*CLIPTextModel"):
        load(path, config=config)


def as_variant(folder, name, components=("unet", "vae", "text_encoder")):
    """Rename the weights of some components to those of a variant."""
    for component in components:
        for file in (folder / component).glob("*.safetensors"):
            file.rename(file.with_suffix(f".{name}.safetensors"))
    return folder


@pytest.mark.parametrize("components", [("unet",), ("unet", "vae", "text_encoder")])
def test_a_folder_with_one_variant_only_needs_no_word(tiny_sd, tmp_path, components):
    """Half-precision downloads hold *.fp16.safetensors alone, and no command could name them."""
    folder = as_variant(shutil.copytree(tiny_sd, tmp_path / "model"), "fp16", components)
    found, plain = load(folder).networks, load(tiny_sd).networks
    for name, network in plain.items():
        theirs = found[name].state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in network.state_dict().items()), name


def test_variants_are_chosen_by_name(tiny_sd, tmp_path):
    folder = as_variant(shutil.copytree(tiny_sd, tmp_path / "model"), "fp16")
    for file in folder.rglob("*.fp16.safetensors"):
        shutil.copy(file, file.with_name(file.name.replace("fp16", "bf16")))
    with pytest.raises(UserError, match="no plain weights; say with variant which of bf16, fp16"):
        load(folder)
    load(folder, variant="fp16")
    with pytest.raises(UserError, match="variant=fp8"):
        load(folder, variant="fp8")


@pytest.fixture
def on_the_hub(tiny_folder, tmp_path, monkeypatch):
    """`owner/name` in a hub cache: the revision "main" is Stable Diffusion 1, "v" is 2."""
    root = tmp_path / "cache" / "models--owner--name"
    (root / "refs").mkdir(parents=True)
    for revision, digit, name in (("main", "0", "sd"), ("v", "1", "sd-v")):
        (root / "refs" / revision).write_text(digit * 40)
        shutil.copytree(tiny_folder(name), root / "snapshots" / (digit * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return "owner/name"


def test_revisions_and_variants_of_a_hub_id(on_the_hub):
    """A variant that a repository lacks is a ValueError of diffusers, of which nothing said which
    model it was."""
    assert load(on_the_hub).schedule.prediction_type == "epsilon"
    assert load(on_the_hub, revision="v").schedule.prediction_type == "v_prediction"
    assert skeleton(on_the_hub, "v").schedule.prediction_type == "v_prediction"
    with pytest.raises(UserError, match=r"owner/name: cannot be loaded.*variant=fp8"):
        load(on_the_hub, variant="fp8")


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_freed_encoders_come_back_without_the_rest(tiny_folder, tmp_path, name):
    """Saving after the encoders were freed read the whole model a second time; with the other
    weights gone from the disk it must still work."""
    folder = shutil.copytree(tiny_folder(name), tmp_path / "model")
    model = load(folder)
    model.conditioner.free()
    for part in (model.family.denoiser, "vae"):
        for weights in (folder / part).glob("*.safetensors"):
            weights.unlink()
    saved = load(model.save(tmp_path / "saved")).networks
    for part, network in load(tiny_folder(name)).networks.items():
        theirs = saved[part].state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in network.state_dict().items()), part


def test_half_precision_and_device_reach_every_network(tiny_sd):
    model = load(tiny_sd, dtype=torch.float16)
    assert {n.dtype for n in model.networks.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder/here", "no such model. Give 'embedded', a diffusers folder"),
        ("nothing here", "no such model"),
        ("owner/name-that-is-not-cached", "cannot be fetched from the hub, nor is it a path"),
    ],
)
def test_missing_model(name, message):
    with pytest.raises(UserError, match=message):
        load(name)


def test_wrong_folder_layout_says_what_the_folder_is(tiny_sd, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: is not a diffusers model folder.*no model_index"):
        load(tmp_path / "empty")
    with pytest.raises(UserError, match="single component; give the pipeline folder, perhaps"):
        load(tiny_sd / "unet")
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "sd").symlink_to(tiny_sd)  # the fixtures' own folder holds others too
    with pytest.raises(UserError, match="There is a model inside it: .*sd"):
        load(tmp_path / "outer")
    (tmp_path / "lora").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="holds a LoRA"):
        load(tmp_path / "lora")


def test_damaged_folders_are_named(tiny_sd, tmp_path):
    broken = shutil.copytree(tiny_sd, tmp_path / "model")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model: "):
        load(broken)
    (broken / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not a diffusers model index"):
        load(broken)
    (broken / "model_index.json").write_text(json.dumps({"_class_name": "WuerstchenPipeline"}))
    with pytest.raises(UserError, match="WuerstchenPipeline: diffkit does not know"):
        load(broken)


def test_pickles_and_foreign_files_are_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"model\.ckpt.*pickle"):
        load(tmp_path / "model.ckpt")
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="holds no single-file checkpoint"):
        load(tmp_path / "lora.safetensors")


def test_options_that_would_do_nothing_are_refused(tiny_sd, tmp_path):
    with pytest.raises(UserError, match="config is for a single"):
        load(tiny_sd, config=tiny_sd)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="variant and revision"):
        load(tmp_path / "x.safetensors", variant="fp16")
    with pytest.raises(UserError, match="revision is for hub ids"):
        load(tiny_sd, revision="main")


def test_saving_never_overwrites_by_accident(tiny_sd, tmp_path):
    model = load(tiny_sd)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        model.save(tmp_path / "out")
    model.save(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"], "no partial folder stays behind"


def test_a_full_disk_leaves_the_older_model_whole(tiny_sd, tmp_path):
    import resource
    import signal

    model = load(tiny_sd)
    model.save(tmp_path / "out")
    before = (tmp_path / "out" / "model_index.json").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(RunFailed, match="out: the file size limit"):
            model.save(tmp_path / "out", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / "out" / "model_index.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
