"""The denoising loss: known values, gradient routing, addressed draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffkit.data.batch import Batch
from diffkit.errors import UserError
from diffkit.models.conditioner import Sizes
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.base import reduce_loss
from diffkit.objectives.denoising import (
    DenoisingConfig,
    DenoisingObjective,
    denoising_loss,
    min_snr_weight,
    offset_noise,
)
from diffkit.randomness import SampleKeys


def make_batch(n=4, size=32, seed=0, labels=None):
    keys = SampleKeys(seed, (0,) * n, tuple(range(n)))
    images = keys.uniform("test images", (3, size, size)) * 2 - 1
    sizes = [Sizes((size, size), (0, 0), (size, size))] * n
    captions = [f"picture {i}" for i in range(n)]
    return Batch(keys, images, None, captions, None, labels, sizes, captions, [{}] * n)


def rows(batch, part):
    return replace(
        batch,
        keys=batch.keys.select(part),
        images=batch.images[part],
        captions=batch.captions[part],
        sizes=batch.sizes[part],
    )


def losses(objective, batch):
    draws = objective.draw(batch, 0)
    with torch.no_grad():
        shared = objective.shared(draws)
    return objective.players()["denoiser"]("denoising", draws, shared)


def test_loss_by_hand():
    output = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.bfloat16)
    target = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    loss = denoising_loss(output, target)
    assert loss.dtype == torch.float32
    assert loss.tolist() == [2.5, 12.5]
    assert denoising_loss(output, target, torch.tensor([2.0, 0.0])).tolist() == [5.0, 0.0]
    assert denoising_loss(output.double(), target).dtype == torch.float64


def test_reduced_shares_add_up_to_the_mean():
    loss = torch.arange(7.0)
    shares = [reduce_loss(part, 7, processes=2) for part in (loss[:2], loss[2:3], loss[3:])]
    torch.testing.assert_close(sum(shares) / 2, loss.mean())


def test_min_snr_is_one_weighting_in_three_parametrisations():
    """|eps - eps'|^2 = snr |x0 - x0'|^2 and |v - v'|^2 = (snr + 1) |x0 - x0'|^2."""
    snr = torch.logspace(-4, 4, 50, dtype=torch.float64)
    x0 = min_snr_weight(snr, 5.0, "sample")
    assert torch.equal(x0, torch.minimum(snr, torch.tensor(5.0)))
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "epsilon") * snr, x0)
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "v_prediction") * (snr + 1), x0)


def test_min_snr_at_pure_noise_and_for_flow():
    nothing = torch.zeros(1)
    assert min_snr_weight(nothing, 5.0, "epsilon").item() == 1
    assert min_snr_weight(nothing, 5.0, "v_prediction").item() == 0
    with pytest.raises(UserError, match="min_snr"):
        min_snr_weight(nothing, 5.0, "velocity")


def test_offset_noise_moves_channel_means():
    eps, offsets = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 1, 1)
    moved = offset_noise(eps, offsets, 0.5)
    torch.testing.assert_close(moved.mean((2, 3)), eps.mean((2, 3)) + 0.5 * offsets[..., 0, 0])
    assert torch.equal(offset_noise(eps, offsets, 0.0), eps)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 9}, "takes 9 channels and the latents have 4: an inpainting"),
        ({"time_cond_proj_dim": 8}, "guidance embedding"),
    ],
)
def test_networks_with_further_inputs_are_refused_at_once(config, message, tiny_sd):
    """They were found out at the first step only, after hours of filling the caches."""
    pipeline = LatentDiffusion.load(tiny_sd).pipeline()
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, **config})
    with pytest.raises(UserError, match=message):
        DenoisingObjective(LatentDiffusion(pipeline), DenoisingConfig())


def test_the_codec_is_placed_once(tiny_sdxl):
    """A device without its number never equals what a module tells, so the VAE was moved, and its
    float32 copy made, in every micro-batch. "cpu:0" differs from "cpu" as "cuda" from "cuda:0".
    """
    model = LatentDiffusion.load(tiny_sdxl)
    model.codec.to(dtype=torch.float16)  # computes in float32, on a copy
    objective = DenoisingObjective(model, DenoisingConfig())
    objective.place(torch.device("cpu", 0))
    copies = []
    for _ in range(2):
        objective.shared(objective.draw(make_batch(2), 0))
        copies.append(model.codec._network())
    assert copies[0] is copies[1] is not model.codec.vae


@pytest.mark.parametrize("name", ["sd", "sd-v", "sdxl", "sd3"])
def test_every_family_learns_and_only_its_denoiser(name, tiny_folder):
    model = LatentDiffusion.load(tiny_folder(name))
    for network in model.networks.values():
        network.requires_grad_(network is model.denoiser.model)
    density = "logit_normal" if name == "sd3" else "uniform"
    config = DenoisingConfig(offset_noise=0.1, density=density)
    objective = DenoisingObjective(model, config)
    objective.place(torch.device("cpu"))
    terms = losses(objective, make_batch())
    assert terms["loss"].shape == terms["time"].shape == (4,)
    assert (terms["time"] >= 0).all() and (terms["time"] <= 1).all()
    terms["loss"].mean().backward()
    for part, network in model.networks.items():
        moved = [p.grad is not None and p.grad.any() for p in network.parameters()]
        assert any(moved) == (network is model.denoiser.model), part


def test_the_loss_is_that_of_diffusers_formula(tiny_folder):
    """The arithmetic of diffusers' text-to-image script on the same draws."""
    from diffusers import DDPMScheduler

    model = LatentDiffusion.load(tiny_folder("sd-v"))
    objective = DenoisingObjective(model, DenoisingConfig(condition_dropout=0.0))
    objective.place(torch.device("cpu"))
    batch = make_batch()
    draws = objective.draw(batch, 0)
    scheduler = DDPMScheduler.from_pretrained(tiny_folder("sd-v"), subfolder="scheduler")
    pipe = model.pipeline()
    with torch.no_grad():
        posterior = pipe.vae.encode(batch.images).latent_dist
        latents = (posterior.mean + posterior.std * draws.posterior) * 0.5
        states = model.conditioner.encode(batch.captions).tokens
        noisy = scheduler.add_noise(latents, draws.eps, draws.t)
        target = scheduler.get_velocity(latents, draws.eps, draws.t)
        output = pipe.unet(noisy, draws.t, states).sample
        expected = (output - target).square().mean((1, 2, 3))
        found = losses(objective, batch)["loss"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_sample_does_not_know_its_batch(tiny_sd):
    model = LatentDiffusion.load(tiny_sd)
    objective = DenoisingObjective(model, DenoisingConfig(offset_noise=0.2))
    objective.place(torch.device("cpu"))
    batch = make_batch(6)
    with torch.no_grad():
        whole = losses(objective, batch)
        parts = [losses(objective, rows(batch, slice(i, i + 2))) for i in (0, 2, 4)]
    for key, value in whole.items():
        torch.testing.assert_close(torch.cat([p[key] for p in parts]), value)


def test_repeats_draw_anew(tiny_sd):
    objective = DenoisingObjective(LatentDiffusion.load(tiny_sd), DenoisingConfig())
    first, again, other = (objective.draw(make_batch(), repeat) for repeat in (0, 0, 1))
    assert torch.equal(first.eps, again.eps) and torch.equal(first.t, again.t)
    assert not torch.equal(first.eps, other.eps) and not torch.equal(first.t, other.t)


@pytest.mark.parametrize(("rate", "dropped"), [(0.0, 0), (1.0, 4)])
def test_condition_dropout(rate, dropped, tiny_sd):
    model = LatentDiffusion.load(tiny_sd)
    objective = DenoisingObjective(model, DenoisingConfig(condition_dropout=rate))
    objective.place(torch.device("cpu"))
    cond = objective.shared(objective.draw(make_batch(), 0)).cond
    null = model.conditioner.null(4).tokens
    assert sum(torch.equal(a, b) for a, b in zip(cond.tokens, null)) == dropped


def test_dropout_has_its_rate(tiny_sd):
    objective = DenoisingObjective(LatentDiffusion.load(tiny_sd), DenoisingConfig())
    keys = SampleKeys(0, (0,) * 2000, tuple(range(2000)))
    share = (keys.uniform("drop") < objective.config.condition_dropout).float().mean()
    assert share.item() == pytest.approx(0.1, abs=0.03)


def test_flow_models_refuse_min_snr_and_others_logit_normal(tiny_sd, tiny_sd3):
    with pytest.raises(UserError, match="min_snr"):
        DenoisingObjective(LatentDiffusion.load(tiny_sd3), DenoisingConfig(min_snr=5.0))
    with pytest.raises(UserError, match="logit_normal"):
        DenoisingObjective(LatentDiffusion.load(tiny_sd), DenoisingConfig(density="logit_normal"))
