"""Models without text: classes, null class, our loop and the stock pipelines, saving."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.models.embeddings import LabelEmbedding

from diffkit.errors import UserError
from diffkit.models.classes import Classes, parse_names
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import add_lora
from diffkit.models.sampling import sample
from diffkit.models.skeleton import skeleton
from diffkit.randomness import normal
from tests.tiny_labels import CLASSES, NAMES

slow = partial(pytest.param, marks=pytest.mark.slow)
PLAIN = ("pixel", slow("pixel-ddim"), "latent", slow("latent-kl"))
LABELLED = ("dit", "pixel-class", "latent-class", "pixel-class-edm")
STEPS = 5


def ours(model, noise, prompts, scale=1.0):
    cond = model.conditioner.encode(prompts)
    uncond = None if scale == 1 else model.conditioner.null(len(prompts))
    latents = sample(model.denoiser, noise, cond, uncond, steps=STEPS, guidance_scale=scale)
    with torch.no_grad():
        return (model.codec.decode(latents) / 2 + 0.5).clamp(0, 1)


def seeded(model, n=2):
    """The noise that a stock pipeline draws from `generator(n)`."""
    drawn = [torch.randn(1, *model.latent_shape(32, 32), generator=g) for g in generators(n)]
    return torch.cat(drawn)


def generators(n=2):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def stock(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    made = pipeline(
        generator=generators(), num_inference_steps=STEPS, output_type="np", **arguments
    )
    return torch.as_tensor(made.images).permute(0, 3, 1, 2)


def both_ways(tiny_folder, name, tmp_path, prompts, scale=1.0, **arguments):
    """Asserts that ours, the stock pipeline, and both after saving make the same pictures."""
    model = LatentDiffusion.load(tiny_folder(name))
    noise = seeded(model)
    images = ours(model, noise, prompts, scale)
    assert images.std() > 0.02, "a constant picture would equal anything"
    assert (images - stock(model.pipeline(), **arguments)).abs().max() < 1e-4
    model.save(tmp_path / "saved")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert type(plain) is type(model.pipeline())
    assert (images - stock(plain, **arguments)).abs().max() < 1e-4
    again = LatentDiffusion.load(tmp_path / "saved")
    assert (images - ours(again, noise, prompts, scale)).abs().max() < 1e-6
    return model, again


@pytest.mark.parametrize("name", PLAIN)
def test_unconditional_loops_equal_the_stock_pipelines(tiny_folder, tmp_path, name):
    """Pixels are limited to [-1, 1] on the way, as their schedulers say; latents are not."""
    model, _ = both_ways(tiny_folder, name, tmp_path, ["", ""], batch_size=2)
    assert (model.schedule.clip is None) == name.startswith("latent")


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_dit_equals_its_stock_pipeline(tiny_folder, tmp_path, scale):
    prompts, numbers = ["retriever", "207"], {"class_labels": [1, 207], "guidance_scale": scale}
    model, again = both_ways(tiny_folder, "dit", tmp_path, prompts, scale, **numbers)
    assert again.conditioner.classes == model.conditioner.classes
    stored = DiffusionPipeline.from_pretrained(tmp_path / "saved").labels
    assert stored["retriever"] == 1 and stored["red fox"] == 2


def test_older_dit_checkpoints_name_another_class(tiny_folder, tmp_path):
    model = LatentDiffusion.load(tiny_folder("dit"))
    model.save(tmp_path / "old")
    config = tmp_path / "old" / "transformer" / "config.json"
    values = json.loads(config.read_text()) | {"_class_name": "Transformer2DModel"}
    config.write_text(json.dumps(values))
    index = tmp_path / "old" / "model_index.json"
    values = json.loads(index.read_text()) | {"transformer": ["diffusers", "Transformer2DModel"]}
    index.write_text(json.dumps(values))
    noise = seeded(model)
    old = ours(LatentDiffusion.load(tmp_path / "old"), noise, ["0", "1"])
    assert torch.equal(old, ours(model, noise, ["0", "1"]))
    bones = skeleton(str(tmp_path / "old")).denoiser.model
    assert type(bones) is type(model.denoiser.model)


def test_dit_drops_no_labels_of_its_own(tiny_folder):
    """diffusers' DiT drops labels in train mode, in every block anew; the trainer drops them."""
    model = LatentDiffusion.load(tiny_folder("dit"))
    network = model.denoiser.model
    z_t = normal((64, *model.latent_shape(32, 32)), 0, "z")
    t, cond = torch.full((64,), 500), model.conditioner.encode(["red fox"] * 64)
    with torch.no_grad():
        told = model.denoiser.eval()(z_t, t, cond)
        state = torch.get_rng_state()
        assert torch.equal(model.denoiser.train()(z_t, t, cond), told)
        assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
        for module in network.modules():  # as diffusers leaves it
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.1
        assert not torch.allclose(network(z_t, t, cond.labels).sample[:, :4], told)


def test_dit_predicts_with_the_first_half_of_its_channels(tiny_folder):
    model = LatentDiffusion.load(tiny_folder("dit"))
    z_t, t = normal((1, *model.latent_shape(32, 32)), 0, "z"), torch.tensor([500])
    cond = model.conditioner.encode(["0"])
    with torch.no_grad():
        raw = model.denoiser.model(z_t, t, cond.labels).sample
        assert raw.shape[1] == 8
        assert torch.equal(model.denoiser(z_t, t, cond), raw[:, :4])
    with pytest.raises(UserError, match="square"):
        model.check_size(32, 64)


@pytest.mark.parametrize("name", LABELLED)
def test_classes_and_the_null_class_differ(tiny_folder, name):
    model = LatentDiffusion.load(tiny_folder(name))
    assert model.family.capabilities == {"cfg", "labels", "taps"}
    noise = normal((2, *model.latent_shape(32, 32)), 0, name)
    fox, owl = ours(model, noise, ["red fox"] * 2), ours(model, noise, ["snow owl"] * 2)
    none, guided = ours(model, noise, [""] * 2), ours(model, noise, ["red fox"] * 2, 3.0)
    for other in (owl, none, guided):
        assert (fox - other).abs().max() > 1e-4
    labels = model.conditioner.encode_labels(torch.tensor([2, 2]), 2)
    assert torch.equal(labels.labels, model.conditioner.encode(["red fox", "2"]).labels)


@pytest.mark.parametrize("name", [*LABELLED, "pixel", "latent"])
def test_bfloat16_and_taps(tiny_folder, name):
    model = LatentDiffusion.load(tiny_folder(name), dtype=torch.bfloat16)
    noise = normal((1, *model.latent_shape(32, 32)), 0, name)
    cond = model.conditioner.encode([model.conditioner.example])
    latents = sample(model.denoiser, noise, cond, steps=2)
    assert latents.dtype == torch.float32 and latents.isfinite().all()
    names = model.denoiser.tap_names
    with torch.no_grad(), model.denoiser.taps(names) as found:
        prediction = model.denoiser.predict(noise, torch.tensor([1]), cond)
    assert tuple(found) == names and prediction.x0.dtype == torch.float32


@pytest.mark.parametrize("name", ["pixel-class", "latent-class"])
def test_names_and_the_null_class_are_kept(tiny_folder, tmp_path, name):
    model = LatentDiffusion.load(tiny_folder(name))
    assert model.conditioner.classes == Classes(CLASSES, CLASSES, dict(enumerate(NAMES)))
    model.save(tmp_path / "saved")
    card = json.loads((tmp_path / "saved" / "diffkit.json").read_text())
    assert card == {"id2label": {str(i): n for i, n in enumerate(NAMES)}, "null_class": CLASSES}
    again = LatentDiffusion.load(tmp_path / "saved")
    assert again.conditioner.classes == model.conditioner.classes
    DiffusionPipeline.from_pretrained(tmp_path / "saved")


def test_without_a_null_class_there_is_no_guidance(tiny_folder):
    model = LatentDiffusion.load(tiny_folder("pixel-class-no-null"))
    assert model.family.guidance_scale == 1
    with pytest.raises(UserError, match="no null class"):
        model.conditioner.null()
    with pytest.raises(UserError, match="no such class"):
        model.conditioner.encode([""])
    z_t, cond = normal((1, 3, 32, 32), 0, "z"), model.conditioner.encode(["1"])
    with pytest.raises(UserError, match="class-conditional pixel U-Net models have no 'cfg'"):
        model.denoiser.guided(z_t, torch.tensor([5]), cond, cond, 2.0)


def test_what_unconditional_models_cannot_do_is_refused_by_name(tiny_folder):
    model = LatentDiffusion.load(tiny_folder("latent"))
    with pytest.raises(UserError, match="unconditional latent U-Net models have no 'lora'"):
        add_lora(model, 2)
    with pytest.raises(UserError, match="'a cat': this model is unconditional"):
        model.conditioner.encode(["a cat"])
    with pytest.raises(UserError, match="no text encoder"):
        model.conditioner.fingerprint()
    with pytest.raises(UserError, match="no image2image pipeline"):
        model.pipeline("image2image")
    with pytest.raises(UserError, match="have no 'cfg'"):
        model.family.require("cfg")


def test_text_models_read_no_labels(tiny_sd):
    with pytest.raises(UserError, match="Stable Diffusion models have no 'labels'"):
        LatentDiffusion.load(tiny_sd).conditioner.encode_labels(torch.tensor([0]), 1)


def test_a_class_is_meant_by_name_or_number():
    classes = Classes(3, 3, {0: "tench, Tinca tinca", 2: "7"})
    words = ["Tinca tinca", " TENCH ", "tench, tinca tinca", "1", "7", "", "2"]
    assert classes.numbers(words) == [0, 0, 0, 1, 2, 3, 2]
    with pytest.raises(UserError, match="'tensh': no such class. Nearest: 0 .tench, Tinca tinca."):
        classes.number("tensh")
    for text in ("3", "-1", "1.5", "zebra"):
        with pytest.raises(UserError, match="numbers from 0 to 2"):
            classes.number(text)
    with pytest.raises(UserError, match="stores no names"):
        Classes(5).number("cat")
    with pytest.raises(UserError, match="id2label: '3'"):
        parse_names({"3": "x"}, 3)


def test_a_name_of_two_classes_means_neither():
    """ImageNet has two cranes and two maillots; the second crane could not be had by name and its
    pictures were trained as the first."""
    names = {0: "crane", 1: "crane", 2: "maillot", 3: "maillot, tank suit"}
    classes = Classes(4, 4, names)
    with pytest.raises(UserError, match=r"several .* so, 0 .crane. and 1 .crane.. Give the number"):
        classes.number("Crane")
    assert classes.numbers(["maillot", "tank suit", "1"]) == [2, 3, 1]
    assert [classes.prompt(number) for number in range(4)] == ["0", "1", *list(names.values())[2:]]
    assert classes.numbers([classes.prompt(number) for number in range(4)]) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("config", "card", "message"),
    [
        ({"num_class_embeds": 5}, {"null_class": 2}, "null_class: 2 is not the last"),
        ({"class_embed_type": "timestep"}, {}, "class_embed_type 'timestep'"),
        ({"sample_size": None}, {}, "sample_size"),
        ({"in_channels": 4}, {}, "1 or 3 channels, not 4"),
    ],
)
def test_networks_that_do_not_fit_are_refused(tmp_path, config, card, message):
    from diffusers import DDPMPipeline, DDPMScheduler

    from tests.tiny_labels import unet2d

    DDPMPipeline(unet2d(**config), DDPMScheduler()).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "diffkit.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=message):
        _ = LatentDiffusion.load(tmp_path / "m").default_size


def test_sizes_are_multiples_of_what_the_network_halves(tiny_folder):
    pixel, latent = (LatentDiffusion.load(tiny_folder(n)) for n in ("pixel", "latent"))
    assert (pixel.size_multiple, latent.size_multiple) == (2, 4)
    assert (pixel.default_size, latent.default_size) == (32, 32)
    cond = pixel.conditioner.encode([""])
    assert sample(pixel.denoiser, normal((1, 3, 18, 22), 0), cond, steps=1).shape[-2:] == (18, 22)
    with pytest.raises(UserError, match="multiples of 2"):
        pixel.latent_shape(17, 32)


def test_names_in_the_index_count_too(tiny_folder, tmp_path):
    """diffusers itself writes there what a pipeline's config holds."""
    pipeline = LatentDiffusion.load(tiny_folder("pixel-class")).pipeline()
    pipeline.register_to_config(id2label={"1": "hen"}, null_class=CLASSES)
    pipeline.save_pretrained(tmp_path / "m")
    expected = Classes(CLASSES, CLASSES, {1: "hen"})
    assert LatentDiffusion.load(tmp_path / "m").conditioner.classes == expected
    assert skeleton(str(tmp_path / "m")).conditioner.classes == expected
