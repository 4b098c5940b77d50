"""Latent proxy rewards: what they read, what a refit trains of them, what they keep on disk."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from diffkit.errors import UserError
from diffkit.models.eager import eager_sum
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.randomness import normal
from diffkit.rewards.latent_clip import LatentClip
from diffkit.rewards.proxies import load_proxy, load_text, new_latent_clip, new_tap_proxy
from diffkit.rewards.proxy import LatentProxy
from diffkit.rewards.refit import pair_kl, proxy_logits
from diffkit.rewards.tap_proxy import keep_until
from tests import tiny

PROMPTS = ["cat", "a dog", "tree"]
KINDS = ("vit", "resnet", "taps")


@pytest.fixture(scope="module")
def model(tiny_sd) -> LatentDiffusion:
    loaded = LatentDiffusion.load(str(tiny_sd))
    loaded.denoiser.requires_grad_(False)
    return loaded


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    """The text tower of a tiny CLIP in transformers' layout: seven blocks, vectors of length 8."""
    place = tmp_path_factory.mktemp("clip")
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=16, intermediate_size=32, num_hidden_layers=7,
        num_attention_heads=2, max_position_embeddings=tiny.MAX_LENGTH, projection_dim=8,
        bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    torch.manual_seed(0)
    CLIPTextModelWithProjection(config).save_pretrained(place)
    tiny.clip_tokenizer().save_pretrained(place)
    return str(place)


@pytest.fixture(params=KINDS)
def proxy(request, model, clip_folder) -> LatentProxy:
    return make(request.param, model, clip_folder)


def make(kind: str, model: LatentDiffusion, clip_folder: str, seed: int = 0) -> LatentProxy:
    if kind == "taps":
        return new_tap_proxy(model.denoiser, model.conditioner.encode(["a"]), seed)
    sizes = {"patch": 8, "width": 64, "layers": 2}
    return new_latent_clip(model.codec, side_of(kind), clip_folder, kind, seed, **sizes)


def side_of(kind: str) -> int:
    return 32 if kind == "resnet" else 16


def latents(proxy: LatentProxy, n: int = 3, name: str = "z") -> Tensor:
    resnet = isinstance(proxy, LatentClip) and proxy.config.tower == "resnet"
    side = 32 if resnet else 16
    return normal((n, 4, side, side), name)


def told(proxy: LatentProxy, model: LatentDiffusion):
    return proxy.told(PROMPTS, model.conditioner.encode(PROMPTS))


def test_scores_are_cosines_one_a_sample(proxy, model):
    z, words = latents(proxy), told(proxy, model)
    value = proxy(z, words)
    assert value.shape == (3,) and value.dtype == torch.float32 and value.abs().max() <= 1
    torch.testing.assert_close(proxy(z, words, proxy.embed_text(words)), value)
    rows = torch.tensor([2, 0])
    part = words[rows] if isinstance(words, Tensor) else words.select(rows)
    torch.testing.assert_close(proxy(z[rows], part), value[rows])
    assert (proxy(latents(proxy, name="other"), words) - value).abs().max() > 1e-4


def test_the_seed_decides_the_weights_and_leaves_torchs_generator_alone(model, clip_folder):
    for kind in KINDS:
        state = torch.get_rng_state()
        first, again = make(kind, model, clip_folder), make(kind, model, clip_folder)
        assert torch.equal(torch.get_rng_state(), state)
        other = make(kind, model, clip_folder, seed=1)
        z, words = latents(first), told(first, model)
        assert torch.equal(first(z, words), again(z, words))
        assert not torch.equal(first(z, words), other(z, words))


def test_a_refit_moves_the_unlocked_layers_and_no_others(proxy, model):
    proxy.lock()
    proxy.train()
    assert not any(module.training for module in proxy.modules())
    before = {name: value.clone() for name, value in proxy.state_dict().items()}
    trained = [p for p in proxy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    words = told(proxy, model)
    for step in range(2):  # the second moves what lies behind a bias of 0 as well
        candidates = torch.stack([latents(proxy, name=f"{step}{j}") for j in range(3)], 1)
        expert = 5 * normal((3, 3), "expert", step)
        optimizer.zero_grad()
        pair_kl(expert, proxy_logits(proxy, candidates, words)).mean().backward()
        optimizer.step()
    unlocked = set(proxy.unlocked())
    for name, value in proxy.state_dict().items():
        if name not in unlocked:
            assert torch.equal(value, before[name]), name
        elif not name.endswith("k_proj.bias"):  # shifts all scores of a query alike: no effect
            assert not torch.equal(value, before[name]), name


def test_which_layers_are_unlocked(model, clip_folder):
    """The paper's: the image tower's last block, norm and projection, five blocks of the text."""
    names = make("vit", model, clip_folder).unlocked()
    blocks = {n.split(".")[4] for n in names if n.startswith("text.encoder.encoder.layers")}
    assert blocks == {"2", "3", "4", "5", "6"}
    assert {n.split(".")[4] for n in names if "vision_model.encoder.layers" in n} == {"1"}
    assert not any("embedding" in name or "pre_layrnorm" in name for name in names)
    assert {"log_scale", "text.projection.weight", "image.visual_projection.weight"} <= set(names)
    names = make("resnet", model, clip_folder).unlocked()
    image = {name for name in names if name.startswith("image.")}
    assert image == {f"image.attnpool.{x}_proj.{k}" for x in "kqvc" for k in ("weight", "bias")}
    taps = make("taps", model, clip_folder)
    assert set(taps.unlocked()) == {name for name, _ in taps.named_parameters()}


def test_candidates_are_constants_of_a_refit(proxy, model):
    candidates = torch.stack([latents(proxy, name=str(j)) for j in range(3)], 1).requires_grad_()
    loss = pair_kl(normal((3, 3), "r"), proxy_logits(proxy, candidates, told(proxy, model)))
    loss.mean().backward()
    assert candidates.grad is None
    assert any(p.grad is not None for p in proxy.parameters())


def test_the_students_step_gives_the_proxy_no_gradient(proxy, model):
    proxy.lock()
    z, words = latents(proxy).requires_grad_(), told(proxy, model)
    with torch.no_grad():
        text = proxy.embed_text(words)
    total, *_ = eager_sum([lambda x: -proxy(x, words, text)], torch.ones(1), z, chunks=[None])
    total.mean().backward()
    assert z.grad.abs().max() > 0
    parameters = [*proxy.parameters(), *model.denoiser.parameters()]
    assert all(p.grad is None for p in parameters)


def test_the_towers_read_the_latents_of_the_autoencoder(model, clip_folder):
    """z / scale + shift, whatever the scale: the student and the refit cannot disagree about it."""
    proxy = make("vit", model, clip_folder)
    z = latents(proxy)
    shift, scale = model.codec.affine(z)
    assert float(scale) == 0.5
    torch.testing.assert_close(proxy.raw(z), z / scale + shift)
    seen = []
    handle = proxy.image.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    proxy.embed_latents(z)
    handle.remove()
    torch.testing.assert_close(seen[0], 2 * z)


def test_latents_of_another_size_are_read_too(model, clip_folder):
    proxy = make("vit", model, clip_folder)
    assert proxy(normal((3, 4, 16, 24), "wide"), told(proxy, model)).isfinite().all()


def test_taps_are_of_the_encoder_and_what_lies_behind_does_not_run(model, clip_folder):
    proxy = make("taps", model, clip_folder)
    assert proxy.config.taps == ("down_blocks.0", "down_blocks.1", "mid_block")
    ran = []
    last = model.denoiser.model.up_blocks[0]
    handle = last.register_forward_hook(lambda *args: ran.append(1))
    proxy(latents(proxy), told(proxy, model))
    assert not ran
    model.denoiser(latents(proxy), torch.zeros(3).long(), told(proxy, model))
    handle.remove()
    assert ran
    assert not any("denoiser" in name or "model" in name for name, _ in proxy.named_modules())


def test_taps_know_the_prompt(model, clip_folder):
    proxy = make("taps", model, clip_folder)
    z = latents(proxy, 1).expand(3, -1, -1, -1)
    f = proxy.embed_latents(z, told(proxy, model))
    assert (f[0] - f[1]).abs().max() > 1e-5


def test_the_temperature_is_bounded_and_can_come_back(proxy):
    assert float(proxy.logit_scale.detach()) == pytest.approx(1 / 0.07)
    with torch.no_grad():
        proxy.log_scale.fill_(math.log(1000))
    scale = proxy.logit_scale
    assert float(scale.detach()) == pytest.approx(100)
    scale.backward()
    assert proxy.log_scale.grad > 0


def test_it_comes_back_from_disk_bit_for_bit(proxy, model, tmp_path):
    proxy.save(tmp_path / "proxy")
    again = load_proxy(tmp_path / "proxy", lambda: model.denoiser)
    assert type(again) is type(proxy) and again.config == proxy.config
    z, words = latents(proxy), told(proxy, model)
    assert torch.equal(again(z, words), proxy(z, words))
    with pytest.raises(UserError, match="exists"):
        proxy.save(tmp_path / "proxy")


def test_folders_that_are_no_proxy_are_refused(model, clip_folder, tmp_path):
    with pytest.raises(UserError, match="is no latent proxy reward"):
        load_proxy(tmp_path, lambda: model.denoiser)
    proxy = make("taps", model, clip_folder)
    proxy.save(tmp_path / "p")
    config = (tmp_path / "p" / "config.json").read_text()
    (tmp_path / "p" / "config.json").write_text(config.replace("mid_block", "middle"))
    with pytest.raises(UserError, match="reads the block middle of its teacher"):
        load_proxy(tmp_path / "p", lambda: model.denoiser)


def test_a_new_resnet_tells_latents_apart(model, clip_folder):
    """Its batch norms knew no statistics and did nothing: features of latents without anything in
    common were equal up to rounding when its contrastive training began."""
    proxy = make("resnet", model, clip_folder)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in proxy.modules())
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 32, 32, generator=generator)
    with torch.no_grad():
        one, other = proxy.embed_latents(z)
    assert 1 - float(one @ other) > 1e-3


def test_text_towers_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(UserError, match="give 'embedded', or a folder or hub id"):
        load_text("/nowhere")
    with pytest.raises(UserError, match="cannot be read as the text tower"):
        load_text(str(tmp_path))


def test_the_embedded_text_tower_is_the_scorers():
    tower = load_text("embedded")
    assert tower.projection.out_features == 128
    assert tower.tokens(["red apple", "cat"]).shape == (2, 32)


def test_small_latents_have_no_resnet(model, clip_folder):
    with pytest.raises(UserError, match="latents of 16x16 are too small"):
        new_latent_clip(model.codec, 16, clip_folder, "resnet")


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "pixart-sigma", "dit"])
def test_a_head_reads_the_same_of_a_teacher_that_was_cut(name, tiny_folder):
    """Networks of one list of blocks, of two, of scales: none runs what lies behind the head."""
    model = LatentDiffusion.load(tiny_folder(name))
    conditioner = model.conditioner
    cond = conditioner.encode([conditioner.example], (32, 32))
    head = new_tap_proxy(model.denoiser, cond)
    shape = model.latent_shape(32, 32)
    z = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, size = head(z, cond), sum(p.numel() for p in model.denoiser.parameters())
        keep_until(model.denoiser, head.config.taps[-1])
        assert torch.equal(head(z, cond), before)
    whole = head.config.taps[-1] == model.denoiser.tap_names[-1]  # two blocks in all
    assert (sum(p.numel() for p in model.denoiser.parameters()) == size) is whole
    head.check(cond)
