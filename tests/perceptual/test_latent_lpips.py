"""LatentLPIPS: sizes, a distance, where gradients go, that nothing moves it, and the overfit."""

from __future__ import annotations

import pytest
import torch
from latent_lpips import overfit
from torch import nn

from diffkit.errors import UserError
from diffkit.models.eager import eager
from diffkit.perceptual.latent_augment import Augmentation, draw
from diffkit.perceptual.latent_classifier import LatentClassifier, shared_label_loss
from diffkit.perceptual.latent_lpips import (
    ELatentLpips,
    LatentLpips,
    LatentLpipsConfig,
    LatentTrunk,
    e_latentlpips,
    unit_features,
)
from diffkit.perceptual.latent_lpips_io import load_latent_lpips

SIDES = {16: (16, 16, 16, 8, 4), 64: (64, 64, 64, 32, 16)}


def network(
    layout="official", norm="bn", width: int = 6, channels: int = 4, seed: int = 0
) -> LatentLpips:
    """A random trunk; statistics as after no batch at all, where bn does nothing."""
    torch.manual_seed(seed)
    return LatentLpips(LatentLpipsConfig(channels, width, layout, norm))


def pair(count: int = 3, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn((2, count, 4, side, side), generator=g)
    return a, b


@pytest.mark.parametrize("layout", ["official", "pre_pool"])
@pytest.mark.parametrize("norm", ["bn", "gn", "none"])
def test_shapes_of_the_features(layout, norm) -> None:
    trunk = LatentTrunk(LatentLpipsConfig(4, 2, layout, norm))
    for side, sides in SIDES.items():
        found = trunk(torch.zeros(1, 4, side, side))
        expected = zip((2, 4, 8, 16, 16), sides, strict=True)
        assert [tuple(f.shape[1:]) for f in found] == [(c, n, n) for c, n in expected]


def test_parameters_at_full_size() -> None:
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        assert count(LatentTrunk(LatentLpipsConfig(4))) == 14_723_712
        assert count(LatentTrunk(LatentLpipsConfig(16))) == 14_730_624
        assert count(LatentClassifier(LatentLpipsConfig(4), 1000)) == 138_366_568


def test_hand_arithmetic_of_one_stage() -> None:
    """(3, 4) / 5 against (0, 1): 0.36 + 0.04, each times its head."""
    x = unit_features(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1))
    y = unit_features(torch.tensor([0.0, 7.0]).view(1, 2, 1, 1))
    torch.testing.assert_close((x - y).square().flatten(), torch.tensor([0.36, 0.04]))


@pytest.mark.parametrize("kinds", ["", "b", "bg", "bgco"])
def test_it_is_a_distance(kinds: str) -> None:
    net, (a, b) = network(), pair()
    augmentation = draw(torch.Generator().manual_seed(0), a.shape, kinds)
    value = e_latentlpips(net, a, b, augmentation)
    assert value.shape == (3,) and (value > 0).all()
    assert torch.equal(e_latentlpips(net, a, a.clone(), augmentation), torch.zeros(3))
    torch.testing.assert_close(e_latentlpips(net, b, a, augmentation), value)
    l1 = (a - b).abs().mean((1, 2, 3))
    torch.testing.assert_close(e_latentlpips(net, a, b, augmentation, 1.0), value + l1)
    metric = ELatentLpips(net, kinds)
    assert metric(a, b, augmentation).shape == (3, 1, 1, 1)
    torch.testing.assert_close(metric.rows(a, b, augmentation.parameters), value)


def test_without_augmentation_it_is_latent_lpips() -> None:
    net, (a, b) = network(), pair()
    assert torch.equal(e_latentlpips(net, a, b, None), net.distance(a, b))
    assert net(a, b).shape == (3, 1, 1, 1)


def test_gradients_reach_the_student_alone() -> None:
    net, (a, b) = network(), pair()
    a.requires_grad_()
    augmentation = draw(torch.Generator().manual_seed(0), a.shape, "bg")
    e_latentlpips(net, a, b, augmentation).sum().backward()
    assert a.grad is not None and a.grad.abs().sum() > 0
    assert b.grad is None and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_gradients_are_finite_at_equal_and_at_zero_latents(value: float) -> None:
    """The root of LPIPS's norms, epsilon outside, has no gradient at features that are all zero."""
    a = torch.full((2, 4, 16, 16), value, requires_grad=True)
    e_latentlpips(network(norm="none"), a, a.detach().clone(), None, 1.0).sum().backward()
    assert a.grad is not None and a.grad.isfinite().all()


def test_one_sample_at_a_time() -> None:
    """The gradient that `eager` takes in parts is the whole batch's."""
    metric, (a, b) = ELatentLpips(network(), "bgco"), pair()
    parameters = metric.draw(torch.Generator().manual_seed(0), a.shape).parameters
    a.requires_grad_()
    whole = metric.distance(a, b, Augmentation("bgco", parameters))
    (expected,) = torch.autograd.grad(whole.sum(), a)
    parts = eager(metric.rows, a, b, parameters)
    (found,) = torch.autograd.grad(parts.sum(), a)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(found, expected)


def test_nothing_moves_it() -> None:
    """train(), casts and autocast of what is around it change neither its modes nor its values."""
    net, (a, b) = network(), pair()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    expected = net.distance(a, b)
    parent = nn.ModuleDict({"metric": ELatentLpips(net), "other": nn.Linear(2, 2)})
    parent.train().to(torch.bfloat16)
    assert parent["other"].training and parent["other"].weight.dtype == torch.bfloat16
    assert not any(module.training for module in net.modules())
    for _ in range(10):
        with torch.autocast("cpu", torch.bfloat16):
            found = e_latentlpips(net, a, b, None)
    assert torch.equal(found, expected) and found.dtype == torch.float32
    after = net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in net.parameters())
    assert net.double().distance(a.double(), b.double()).dtype == torch.float64


def test_other_channels_are_refused() -> None:
    a = torch.zeros(1, 16, 8, 8)
    with pytest.raises(UserError, match=r"takes \(B, 4, h, w\)"):
        network().distance(a, a)
    with pytest.raises(UserError, match="no pairs"):  # one target for all was taken silently
        network().distance(torch.zeros(2, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    with pytest.raises(UserError, match="layout 'other'"):
        LatentLpipsConfig(4, layout="other")
    with pytest.raises(UserError, match="norm 'in'"):
        LatentLpipsConfig(4, norm="in")


@pytest.mark.parametrize("dense", [True, False])
def test_the_classifier_hands_over_its_trunk(dense: bool) -> None:
    torch.manual_seed(0)
    classifier = LatentClassifier(LatentLpipsConfig(4, 4, "pre_pool", "gn"), 7, dense)
    a, b = pair()
    assert classifier(a).shape == (3, 7)
    metric = classifier.metric()
    for found, expected in zip(metric.features(a), classifier.trunk(a), strict=True):
        torch.testing.assert_close(found, expected)


def test_labels_share_the_probability() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    log = torch.log_softmax(logits, 1)[0]
    two = shared_label_loss(logits, torch.tensor([[1, 0, 1]]))
    torch.testing.assert_close(two, -(log[0] + log[2])[None] / 2)
    one = shared_label_loss(logits, torch.tensor([[0, 1, 0]]))
    torch.testing.assert_close(one, -log[1:2])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["official", "pre_pool"])
def test_the_ensemble_closes_the_null_directions(layout) -> None:
    """A random trunk alone leaves latents as far from the target as noise; with the maps it pulls.

    The paper's experiment (figure 4) in small. The L1 term would hide it: it is off.
    """
    for seed in range(2):
        net = network(layout, seed=seed)
        plain, ensemble = (overfit(net, kinds, seed) for kinds in ("", "bg"))
        assert ensemble < 0.5 * plain and ensemble < 1


@pytest.mark.slow
def test_the_embedded_network_does_so_too() -> None:
    net = load_latent_lpips()
    plain, ensemble = (overfit(net, kinds, seed=0) for kinds in ("", net.config.augmentation))
    assert ensemble < 0.3 and ensemble < 0.5 * plain
