"""Discriminators on tiny true networks: what they see, what trains, second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.models.discriminators import (
    Discriminator,
    Given,
    feature_discriminator,
    twice_differentiable,
    unet_discriminator,
)
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import add_lora
from diffkit.objectives.adversarial_losses import mean_logit, r1_penalty
from diffkit.randomness import normal

Folder = Callable[[str], Path]


def given(model: LatentDiffusion, count: int = 2, side: int = 16) -> tuple[Tensor, Given]:
    """Latents and what they are judged with."""
    shape = (model.codec.channels, side, side)
    cond = model.conditioner.encode(["a cat", "a dog"][:count], (32, 32))
    return normal((count, *shape), "x"), Given(cond, normal((count, *shape), "z"))


def noised(about: Given, t: int = 300) -> Given:
    times = torch.full((len(about.noise),), t)
    return Given(about.cond, about.noise, times, normal(about.noise.shape, "eps"))


def of_unet(folder: Path, **options: bool) -> tuple[LatentDiffusion, Discriminator]:
    torch.manual_seed(0)
    model = LatentDiffusion.load(folder)
    _, about = given(model, 1)
    return model, unet_discriminator(model.denoiser, about, **options)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_three_heads_at_every_scale(name: str, tiny_folder: Folder) -> None:
    """Of sizes 8 and 16, the decoder's, as its skip connections are; widths by hand for SD."""
    model, critic = of_unet(tiny_folder(name))
    x, about = given(model)
    assert [tuple(m.shape) for m in critic(x, about)] == [(2, 1, 8, 8)] * 3 + [(2, 1, 16, 16)] * 3
    assert critic.names == tuple(
        f"up_blocks.{i}:{part}" for i in (0, 1) for part in ("skip", "joined", "out")
    )
    widths = [head[0].num_channels for head in critic.heads]  # type: ignore[index]
    # mid 16; the last skip of the encoder 16, the next lower level's 8.
    assert widths == [16, 32, 16, 8, 24, 8]


def test_heads_start_by_their_seed_and_not_by_the_generator_of_torch(tiny_sd: Path) -> None:
    """They took torch's own draws, so that a resumed or repeated run was another run."""
    model = LatentDiffusion.load(tiny_sd)
    _, about = given(model, 1)
    first, again, other = (unet_discriminator(model.denoiser, about, seed=s) for s in (1, 1, 2))
    pairs = list(zip(first.state_dict().items(), again.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    weights = [critic.heads[0][2].weight for critic in (first, other)]  # type: ignore[index]
    assert not torch.equal(*weights) and weights[0].abs().max() <= 16**-0.5


def test_one_head_without_scales(tiny_sd: Path) -> None:
    model, critic = of_unet(tiny_sd, multiscale=False)
    x, about = given(model)
    assert critic.names == ("up_blocks.1:out",) and len(critic.scales) == 0
    assert [m.shape for m in critic(x, about)] == [(2, 1, 16, 16)]


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_odd_sides(name: str, tiny_folder: Folder) -> None:
    """A U-Net takes any latents; tokens go back to the places they came from."""
    model = LatentDiffusion.load(tiny_folder(name))
    make = unet_discriminator if name == "sd" else feature_discriminator
    sides = (9, 12) if name == "sd" else (8, 12)
    cond = model.conditioner.encode(["a"], (32, 32))
    x = normal((1, model.codec.channels, *sides), "x")
    found = make(model.denoiser, Given(cond, x))(x, noised(Given(cond, x)))
    assert found[-1].shape[2:] == (sides if name == "sd" else (4, 6))


def test_neither_the_noise_nor_the_scales_matter_at_first(tiny_sd: Path) -> None:
    """Their convolutions are zero, but have a gradient: after one step both matter."""
    model, critic = of_unet(tiny_sd)
    x, about = given(model)
    other = Given(about.cond, about.noise.flip(0))
    blind = unet_discriminator(model.denoiser, about.select(slice(1)), noise_input=False)
    blind.scales = torch.nn.ModuleList()
    blind._scaled = ()
    blind.heads.load_state_dict(critic.heads.state_dict())
    before = critic(x, about)
    assert all(torch.equal(a, b) for a, b in zip(before, critic(x, other), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, blind(x, about), strict=True))
    parameters = [p for p in critic.parameters() if p.requires_grad]
    mean_logit(before).sum().backward()
    torch.optim.SGD(parameters, 0.1).step()
    changed = zip(critic(x, about), critic(x, other), strict=True)
    assert all(not torch.equal(a, b) for a, b in changed)
    with torch.no_grad():
        scaled = critic(x, about)
        critic.scales[0].weight.zero_()  # type: ignore[union-attr]
        unscaled = critic(x, about)
    same = [torch.equal(a, b) for a, b in zip(scaled, unscaled, strict=True)]
    # The skip connections of both levels that come in first: one from below, one from above.
    assert same == [False, False, False, True, False, False]


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_all_but_the_tail_is_trained(name: str, tiny_folder: Folder) -> None:
    """Every trainable parameter gets a gradient; the layers behind the last head are frozen."""
    model, critic = of_unet(tiny_folder(name))
    x, about = given(model)
    mean_logit(critic(x, about)).sum().backward()
    for path, parameter in critic.named_parameters():
        frozen = "conv_norm_out" in path or "conv_out" in path.split("denoiser.model.")[-1][:8]
        assert parameter.requires_grad != frozen, path
        assert (parameter.grad is None) == frozen, path
    assert all(p.grad is None for p in model.denoiser.parameters())


def test_checkpointed_activations_give_the_same_gradients(tiny_sd: Path) -> None:
    """Features are read inside of what is computed again."""
    model, critic = of_unet(tiny_sd)
    x, about = given(model)
    critic.denoiser.model.train()
    found = []
    for _ in range(2):
        critic.zero_grad()
        mean_logit(critic(x, about)).sum().backward()
        found.append([p.grad.clone() for p in critic.parameters() if p.grad is not None])
        critic.denoiser.model.enable_gradient_checkpointing()  # type: ignore[operator]
    torch.testing.assert_close(*found)


def test_prompts_are_read(tiny_sd: Path) -> None:
    model, critic = of_unet(tiny_sd)
    x, about = given(model)
    swapped = Given(about.cond.select(torch.tensor([1, 0])), about.noise)
    pairs = zip(critic(x, about), critic(x, swapped), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "pixart-alpha", "dit"])
def test_heads_on_frozen_features(name: str, tiny_folder: Folder) -> None:
    """One head a block, gradients in the heads alone and in the latents."""
    model = LatentDiffusion.load(tiny_folder(name))
    cond = model.conditioner.encode([model.conditioner.example] * 2, (32, 32))
    shape = (2, model.codec.channels, 16, 16)
    about = noised(Given(cond, normal(shape, "z")))
    guidance = 3.5 if model.family.takes_guidance else None
    critic = feature_discriminator(model.denoiser, about.select(slice(1)), guidance=guidance)
    x = normal(shape, "x").requires_grad_()
    found = critic(x, about)
    assert len(found) == len([n for n in model.denoiser.tap_names if ":" not in n])
    if model.family.denoiser == "transformer":
        assert {m.shape for m in found} == {(2, 1, 8, 8)}
    mean_logit(found).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    for path, parameter in critic.named_parameters():
        assert (parameter.grad is not None) == path.startswith("heads."), path


def test_the_copy_has_no_adapters(tiny_sd: Path) -> None:
    model = LatentDiffusion.load(tiny_sd)
    plain = {k: v.clone() for k, v in model.denoiser.model.state_dict().items()}
    add_lora(model, 2)
    _, about = given(model, 1)
    critic = unet_discriminator(model.denoiser.to(torch.bfloat16), about)
    copied = critic.denoiser.model.state_dict()
    assert copied.keys() == plain.keys()
    assert all(copied[k].dtype == torch.float32 for k in plain)
    assert any("lora" in k for k in model.denoiser.model.state_dict())


def test_a_transformer_has_no_scales(tiny_sd3: Path) -> None:
    model = LatentDiffusion.load(tiny_sd3)
    with pytest.raises(UserError, match="no scales"):
        unet_discriminator(model.denoiser, given(model, 1)[1])


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_r1_through_attention(name: str, tiny_folder: Folder) -> None:
    """The loss's backward pass is run outside the block, and with gradient checkpointing on; the
    gradient is that of finite differences along it."""
    model = LatentDiffusion.load(tiny_folder(name))
    x, about = given(model, 1)
    if name == "sd":
        critic = unet_discriminator(model.denoiser, about)
    else:
        about = noised(about)
        guidance = 3.5 if model.family.takes_guidance else None
        critic = feature_discriminator(model.denoiser, about, guidance=guidance)
    critic.denoiser.model.train()
    critic.denoiser.model.enable_gradient_checkpointing()  # type: ignore[operator]
    critic.double()
    about = Given(about.cond.to(dtype=torch.float64), about.noise.double(), about.t, about.eps)

    def penalty() -> Tensor:
        with twice_differentiable(critic):
            return r1_penalty(lambda a: mean_logit(critic(a, about)), x.double()).sum()

    parameters = [p for p in critic.parameters() if p.requires_grad]
    start = penalty()
    start.backward()
    assert critic.denoiser.model.is_gradient_checkpointing
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    square = sum(float(g.square().sum()) for g in grads)
    assert square > 0
    step = 1e-5 / square**0.5
    with torch.no_grad():
        for sign, found in ((1, []), (-2, [])):
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter += sign * step * grad
            found.append(penalty_value(penalty))
            if sign == 1:
                above = found[0]
    slope = (above - found[0]) / (2 * step)
    assert slope == pytest.approx(square, rel=1e-4)


def penalty_value(penalty: Callable[[], Tensor]) -> float:
    with torch.enable_grad():
        return float(penalty().detach())
