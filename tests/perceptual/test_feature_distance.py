"""The distance of one layer's features: hand arithmetic, invariances, and its lean gradient."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from diffkit.errors import UserError
from diffkit.kernels import channel_distance, masked_distance
from diffkit.perceptual.feature_distance import (
    feature_distance,
    feature_terms,
    reference_distance,
)

SETTINGS = [
    *({"stats": stats} for stats in ("prediction", "prediction_detached", "target", "own")),
    {"norm": "channel_norm_target"},
]


def maps(shape=(2, 3, 7, 5), dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """A prediction, a target near it, and a mask of which one row is empty."""
    draws = torch.Generator().manual_seed(seed)
    target = torch.randn(shape, generator=draws, dtype=torch.float64) * 2 + 1
    predicted = target + 0.5 * torch.randn(shape, generator=draws, dtype=torch.float64)
    keep = torch.rand(shape, generator=draws) > 0.3
    keep[0, 1] = False
    return predicted.to(dtype), target.to(dtype), keep


def with_gradient(function, predicted, target, keep, **setting) -> tuple[Tensor, Tensor]:
    leaf = predicted.clone().requires_grad_()
    value = function(leaf, target, keep, **setting)
    (value * torch.arange(1, len(value) + 1)).sum().backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def test_hand_arithmetic() -> None:
    """Prediction 0, 2 (mean 1, variance 1) against 1, 1: squared differences 1, 1. Of 2, 2, 6, 6
    against 0 only the last two are kept: mean 6, variance 0; and 36 over eps."""
    predicted = torch.tensor([0.0, 2.0], dtype=torch.float64).view(1, 1, 1, 2)
    value = feature_distance(predicted, torch.ones_like(predicted))
    assert value.item() == pytest.approx(1 / (1 + 1e-6), rel=1e-12)
    predicted = torch.tensor([2.0, 2.0, 6.0, 6.0], dtype=torch.float64).view(1, 1, 2, 2)
    keep = torch.tensor([False, False, True, True]).view(1, 1, 2, 2)
    value = feature_distance(predicted, torch.zeros_like(predicted), keep)
    assert value.item() == pytest.approx(36 / 1e-6, rel=1e-12)


def test_hand_arithmetic_of_the_channel_norm() -> None:
    """One pixel, channels (3, 4) of norm 5, the prediction off by (1, 2): (1 + 4) / 25 / 2."""
    target = torch.tensor([3.0, 4.0], dtype=torch.float64).view(1, 2, 1, 1)
    predicted = target + torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    value = feature_distance(predicted, target, norm="channel_norm_target")
    assert value.item() == pytest.approx(0.1 * (5 / (5 + 1e-6)) ** 2, rel=1e-12)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(setting.values()))
@pytest.mark.parametrize("masked", [False, True])
def test_the_closed_form_is_autograd_of_the_formula(setting, masked) -> None:
    predicted, target, keep = maps()
    mask = keep if masked else None
    exact = with_gradient(reference_distance, predicted, target, mask, **setting)
    lean = with_gradient(feature_distance, predicted, target, mask, **setting)
    for ours, theirs in zip(lean, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(setting.values()))
def test_finite_differences(setting) -> None:
    if setting.get("stats") == "prediction_detached":
        pytest.skip("the value's derivative has the part through sd, which is left out by design")
    predicted, target, keep = maps((1, 2, 3, 3))
    torch.autograd.gradcheck(
        lambda x: feature_distance(x, target, keep, **setting), predicted.requires_grad_()
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(setting.values()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_pieces_and_low_precision(setting, dtype, monkeypatch) -> None:
    """Pieces of a few rows; the arithmetic is float32, so only the gradient is rounded to dtype."""
    for module in (masked_distance, channel_distance):
        monkeypatch.setattr(module, "piece_size", lambda device: 40)
    predicted, target, keep = maps(dtype=dtype)
    exact = with_gradient(reference_distance, predicted.double(), target.double(), keep, **setting)
    value, grad = with_gradient(feature_distance, predicted, target, keep, **setting)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(value.double(), exact[0], rtol=1e-5, atol=0)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    assert (grad.double() - exact[1]).norm() <= rounding * exact[1].norm()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(setting.values()))
def test_equal_maps_and_empty_masks_give_exactly_zero(setting) -> None:
    predicted, target, keep = maps(dtype=torch.float32)
    empty = torch.zeros_like(keep)
    for ours, mask in ((target, None), (target, keep), (predicted, empty)):
        value, grad = with_gradient(feature_distance, ours, target, mask, **setting)
        assert torch.equal(value, torch.zeros(2))
        assert torch.equal(grad, torch.zeros_like(grad))


def test_samples_know_nothing_of_each_other() -> None:
    predicted, target, keep = maps((3, 4, 6, 6))
    value = feature_distance(predicted, target, keep)
    order = [2, 0, 1, 0]
    mixed = feature_distance(predicted[order], target[order], keep[order])
    torch.testing.assert_close(mixed, value[order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("stats", ["prediction", "target"])
def test_scale_and_offset_of_both_maps_do_not_count(stats) -> None:
    predicted, target, keep = maps((1, 3, 16, 16))
    value = feature_distance(predicted, target, keep, stats=stats)
    for gain, offset in ((7.0, 0.0), (1.0, 5.0)):
        changed = [gain * x + offset for x in (predicted, target)]
        torch.testing.assert_close(
            feature_distance(*changed, keep, stats=stats), value, rtol=1e-5, atol=0
        )


def test_own_statistics_see_correlation_alone() -> None:
    """It is 2 (1 - correlation), whatever the gain and the offset."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 64, 64, generator=draws, dtype=torch.float64)
    y = 0.8 * x + 0.6 * torch.randn(x.shape, generator=draws, dtype=torch.float64)
    correlation = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]
    for gain, offset in ((1.0, 0.0), (3.0, 10.0)):
        value = feature_distance(gain * y + offset, x, stats="own")
        torch.testing.assert_close(value[0], 2 * (1 - correlation), rtol=1e-5, atol=0)


def test_the_gain_that_each_gradient_asks_for() -> None:
    """Of phi_hat = g y, y of variance 1 and correlation r with phi: std(phi) / r with the gradient
    through sd, r std(phi) without. The full form inflates variance, the detached one shrinks it."""
    draws = torch.Generator().manual_seed(1)
    phi, y = torch.randn(2, 1, 1, 128, 128, generator=draws, dtype=torch.float64)
    y = 0.7 * phi + y
    phi, y = (x - x.mean() for x in (phi, y))
    y = y / y.std(correction=0)
    r, std = (y * phi).mean() / phi.std(correction=0), phi.std(correction=0)
    for stats, optimum in (("prediction", std / r), ("prediction_detached", r * std)):
        gain = optimum.clone().requires_grad_()
        feature_distance(gain * y, phi, stats=stats).sum().backward()
        slope = gain.grad
        assert slope is not None and abs(slope) < 1e-4
        values = [
            feature_distance(optimum * y * factor, phi, stats=stats).item()
            for factor in (0.9, 1.0, 1.1)
        ]
        assert stats != "prediction" or values[1] == min(values)


def test_detached_statistics_change_the_gradient_only() -> None:
    predicted, target, keep = maps()
    full = with_gradient(feature_distance, predicted, target, keep)
    detached = with_gradient(feature_distance, predicted, target, keep, stats="prediction_detached")
    assert torch.equal(full[0], detached[0])
    assert not torch.allclose(full[1], detached[1])


def test_a_mask_hides_no_overflow() -> None:
    """With an infinite entry the deviation of its map is NaN and all of it is masked: a mask that
    hid it would give a distance of 0 for features that have none."""
    predicted, target, keep = maps(dtype=torch.float32)
    predicted[0, 0, 2, 3], keep[0, 0, 2, 3] = torch.inf, False
    for setting in SETTINGS:
        value = feature_distance(predicted, target, keep, **setting)
        assert value[0].isnan() and value[1].isfinite()


def test_only_maps_and_small_numbers_wait_for_the_backward_pass() -> None:
    predicted, target, keep = maps((1, 8, 32, 32), torch.bfloat16)
    predicted.requires_grad_()
    for setting, extra in (({}, 5 * 8 * 4), ({"norm": "channel_norm_target"}, 1024 * 4 + 8 * 4)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x), id):
            feature_distance(predicted, target, keep, **setting)
        known = {x.untyped_storage().data_ptr() for x in (predicted, target, keep)}
        others = [x for x in kept if x.untyped_storage().data_ptr() not in known]
        assert len(kept) - len(others) == 3
        assert sum(x.numel() * x.element_size() for x in others) <= extra


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(setting.values()))
def test_the_terms_are_the_distance_and_its_statistics(setting) -> None:
    predicted, target, keep = maps((2, 3, 8, 8))
    leaf = predicted.clone().requires_grad_()
    terms = feature_terms(leaf, target, keep, **setting)
    (grad,) = torch.autograd.grad(terms.value.sum(), leaf)
    plain = predicted.clone().requires_grad_()
    value = feature_distance(plain, target, keep, **setting)
    (expected,) = torch.autograd.grad(value.sum(), plain)
    torch.testing.assert_close((terms.value, grad), (value, expected), rtol=1e-12, atol=1e-15)
    assert not any(term.requires_grad for term in terms[1:])
    kept = [[x[b, c][keep[b, c]] for c in range(3)] for x in (predicted, target) for b in range(2)]
    spread = [[row.var(correction=0) if len(row) else 0.0 for row in rows] for rows in kept]
    variances = torch.tensor(spread, dtype=torch.float64).sum(1)
    torch.testing.assert_close(terms.predicted_variance, variances[:2])
    torch.testing.assert_close(terms.target_variance, variances[2:])
    errors = [
        max(
            float((p - t).square().mean() / (p.var(correction=0) + 1e-6)) if len(p) else 0.0
            for p, t in zip(kept[b], kept[2 + b])
        )
        for b in range(2)
    ]
    assert terms.largest.tolist() == pytest.approx(errors)


def test_no_gradient_reaches_the_target() -> None:
    predicted, target, _ = maps()
    target.requires_grad_()
    value = feature_distance(predicted.requires_grad_(), target).sum()
    (grad,) = torch.autograd.grad(value, target, allow_unused=True)
    assert grad is None


def test_wrong_words_are_refused() -> None:
    predicted, target, _ = maps()
    for words, remedy in (
        ({"norm": "batch"}, "use 'spatial'"),
        ({"stats": "mean"}, "use one of prediction"),
        ({"norm": "channel_norm_target", "stats": "own"}, "leave it out"),
    ):
        with pytest.raises(UserError, match=remedy):
            feature_distance(predicted, target, **words)


def test_every_piece_size_gives_the_same() -> None:
    predicted, target, keep = maps((2, 5, 9, 4))
    expected = masked_distance.moments(predicted, target, keep, "joint")
    pieces = []
    for b, c in product(range(2), range(5)):
        one = [x[b : b + 1, c : c + 1] for x in (predicted, target, keep)]
        pieces.append(masked_distance.moments(*one, "joint"))
    joined = [torch.cat([getattr(p, n) for p in pieces]) for n in expected._fields]
    for name, values in zip(expected._fields, joined, strict=True):
        torch.testing.assert_close(getattr(expected, name), values.view(2, 5))
