"""`diffkit train proxy_reward` and `diffkit train rg_lcd` on tiny true models: what is logged, what
is refused, and results that plain diffusers loads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from diffkit.cli import main
from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.consistency_config import ConsistencyConfig
from diffkit.objectives.proxy_reward import ProxyRewardConfig
from diffkit.objectives.reward_guided_config import RewardConfig
from diffkit.rewards.proxies import load_proxy, new_latent_clip
from diffkit.training.proxy_reward import ProxyRewardTraining
from diffkit.training.reward_guided import RewardGuidedTraining, build_reward_guided
from tests.training.test_denoising_runs import rows

SMALL = ("--proxy.text", "embedded", "--proxy.width", 64, "--proxy.layers", 2)
GUIDED = ("--lcd.guidance-min", 1, "--lcd.guidance-max", 3, "--lcd.solver-steps", 10)
SCORED = ("--reward.rewards", "embedded")


def in_one_step(pipeline):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 1, "guidance_scale": 2.0, "output_type": "pt"}
    return torch.as_tensor(pipeline("a", height=32, width=32, latents=noise, **options).images)


@pytest.fixture
def train(pictures, tmp_path, tiny_folder):
    """`train(method, *words)` on the tiny v-prediction model; returns the run's folder."""

    def run(method, *words, name="out"):
        flags = ["--model", tiny_folder("sd-v"), "--data", pictures, "--output", tmp_path / name]
        flags += ["--tracker", "none", "--max-steps", 4, "--batch-size", 4, "--warmup-steps", 0]
        flags += ["--learning-rate", "1e-3", *(GUIDED if method == "rg_lcd" else ()), *words]
        assert main(["train", method, *map(str, flags)]) == 0
        return tmp_path / name

    return run


def test_a_proxy_is_trained_and_then_fitted_to_the_reward(train, tiny_folder):
    """Both stages; the student loads in plain diffusers and samples there in one step."""
    first = train("proxy_reward", *SMALL, "--proxy.group", 2, name="proxy")
    found = rows(first)
    assert all(0 <= row["accuracy"] <= 1 and row["scale"] > 0 for row in found)
    card = (first / "proxy" / "README.md").read_text()
    assert "Latent proxy reward for" in card and "--reward.proxy" in card
    model = LatentDiffusion.load(tiny_folder("sd-v"))
    proxy = load_proxy(first / "proxy", lambda: model.denoiser)
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert proxy(z, proxy.told(["a", "b"], None)).abs().max() <= 1

    words = (*SCORED, "--reward.mode", "proxy", "--reward.proxy", first / "proxy")
    words += ("--reward.refit-rate", "1e-3", "--reward.refit-every", 2, "--ema", 0.5)
    run = train("rg_lcd", *words)
    found = rows(run)
    assert [("refit/loss" in row) for row in found] == [True, False, True, False]
    assert found[0]["lcd/proxy_weight"] == 0 < found[1]["lcd/proxy_weight"]
    assert found[0]["lcd/diversity"] > 0
    assert all(0 <= row["refit/accuracy"] <= 1 for row in found[::2])
    stock = StableDiffusionPipeline.from_pretrained(run / "model", safety_checker=None)
    assert isinstance(stock.scheduler, LCMScheduler)
    ours = LatentDiffusion.load(run / "model").pipeline()
    assert torch.equal(in_one_step(stock), in_one_step(ours))


@pytest.mark.slow
def test_the_direct_reward_of_a_lora_in_stock_diffusers(train, tiny_folder):
    words = ("--reward.rewards", "embedded:1,embedded@8:0.5", "--reward.checkpoint", "resnet")
    run = train("rg_lcd", *words, "--lora-rank", 2, "--accumulation", 2)
    found = rows(run)
    assert found[0]["embedded_weight"] == 0 < found[1]["embedded_weight"]
    for row in found:
        rewards = (row["embedded"], row["embedded@8"])
        assert all(-1 <= value <= 1 for value in rewards) and 0 <= row["saturated"] < 1
    stock = StableDiffusionPipeline.from_pretrained(tiny_folder("sd-v"), safety_checker=None)
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    before = in_one_step(stock)
    stock.load_lora_weights(run / "lora")
    assert (in_one_step(stock) - before).abs().max() > 1e-4


@pytest.mark.slow
def test_weight_zero_is_plain_distillation_to_the_bit(train, tmp_path):
    plain = train("lcd", *GUIDED, name="plain")
    control = train("rg_lcd", "--reward.beta", 0, name="control")
    file = "model/unet/diffusion_pytorch_model.safetensors"
    left, right = (load_file(folder / file) for folder in (plain, control))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert rows(plain) == rows(control)


@pytest.mark.slow
def test_a_head_on_the_teacher_is_trained_beforehand_too(train, tiny_folder):
    first = train("proxy_reward", "--proxy.network", "taps", "--cache-embeddings", name="proxy")
    model = LatentDiffusion.load(tiny_folder("sd-v"))
    assert load_proxy(first / "proxy", lambda: model.denoiser).config.features
    words = (*SCORED, "--reward.mode", "proxy", "--reward.proxy", first / "proxy")
    words += ("--lora-rank", 2)
    assert rows(train("rg_lcd", *words))[-1]["refit/loss"] > 0
    words = ("--reward.mode", "frozen_proxy", "--reward.proxy", first / "proxy")
    assert rows(train("rg_lcd", *words, name="frozen"))[-1]["proxy_weight"] > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lora_rank": 4}, "the proxy trains whole"),
        ({"gradient_checkpointing": True}, "keeps its activations"),
        ({"cache_embeddings": True}, "text tower of its own"),
        ({"batch_size": 1}, "at least 2 in all"),
        ({"proxy": ProxyRewardConfig(group=1)}, "a pair needs others"),
        ({"proxy": ProxyRewardConfig("taps", width=8)}, "has no effect on --proxy.network taps"),
        ({"proxy": ProxyRewardConfig("resnet"), "max_aspect": 2.0}, "latents of one size"),
    ],
)
def test_flags_of_the_proxy_that_do_nothing_are_refused(tmp_path, flags, said):
    with pytest.raises(UserError) as caught:
        ProxyRewardTraining("x", tmp_path, **flags).check()
    assert said in str(caught.value)


def test_rewards_of_a_real_model_are_named(tmp_path):
    """Without a word a large model was pulled to what a scorer of 64x64 emoji likes."""
    config = RewardGuidedTraining("x", tmp_path, model="owner/model")
    with pytest.raises(UserError, match="reward.rewards: name what is rewarded, such as hpsv2"):
        config.check()
    RewardGuidedTraining("x", tmp_path).check()
    RewardGuidedTraining("x", tmp_path, model="m", reward=RewardConfig("none")).check()
    RewardGuidedTraining("x", tmp_path, model="m", reward=RewardConfig(rewards="hpsv2")).check()


def test_a_latent_resnet_of_another_size_is_refused_at_the_start(tmp_path, tiny_sd):
    model = LatentDiffusion.load(tiny_sd)
    new_latent_clip(model.codec, 32, "embedded", "resnet", width=64).save(tmp_path / "proxy")
    reward = RewardConfig("frozen_proxy", proxy=tmp_path / "proxy")
    lcd = ConsistencyConfig(solver_steps=10)
    config = RewardGuidedTraining("x", tmp_path, size=32, reward=reward, lcd=lcd)
    model = config.prepared(model)
    with pytest.raises(UserError, match="latents of 32x32 alone; use --size 64"):
        build_reward_guided(model, config, None)
    build_reward_guided(model, replace(config, size=64), None)


def test_groups_are_whole_in_every_part_of_a_batch(tmp_path):
    """Else the number of processes would decide who is compared with whom."""
    config = ProxyRewardTraining("x", tmp_path, batch_size=8, proxy=ProxyRewardConfig(group=4))
    assert config.check_processes(2) == 4
    with pytest.raises(UserError, match="--proxy.group 2"):
        config.check_processes(4)
    with pytest.raises(UserError, match="--proxy.group 4"):
        ProxyRewardTraining("x", tmp_path, batch_size=8, accumulation=2).check_processes(1)


def test_a_refit_that_never_comes_again_is_refused(tmp_path):
    config = RewardGuidedTraining("x", tmp_path, max_steps=5)
    config.reward = RewardConfig(mode="proxy", refit_every=6)
    with pytest.raises(UserError, match="fitted once"):
        config.check()
