"""Maps of latents: exact moves, linearity, the published maps' numbers, draws by address."""

from __future__ import annotations

import pytest
import torch

from diffkit.errors import UserError
from diffkit.perceptual.latent_augment import (
    COLUMNS,
    Augmentation,
    _drawn,
    check_kinds,
    draw,
    identity,
)
from diffkit.randomness import SampleKeys

UNIFORM = torch.tensor(
    [
        [0.7, 0.3, 0.9, 0.2, 0.35, 0.81, 0.1, 0.9, 0.4, 0.3, 0.6],
        [0.2, 0.8, 0.4, 0.75, 0.05, 0.6, 0.8, 0.3, 0.2, 0.7, 0.45],
    ],
    dtype=torch.float64,
)
NORMAL = torch.tensor([[0.5, -0.8, 0.3, -0.4], [-1.2, 0.6, -0.7, 0.2]], dtype=torch.float64)


def latents(height: int = 16, width: int = 16, phase: float = 0.0) -> torch.Tensor:
    """(2, 4, h, w), what the numbers of the package were computed on."""
    k = torch.arange(2 * 4 * height * width, dtype=torch.float64)
    return torch.sin(0.37 * k + phase + 0.011 * k * k % 3).float().view(2, 4, height, width)


def fixed(kinds: str = "b", count: int = 1, **columns: float) -> Augmentation:
    """The identity but for some columns."""
    parameters = identity(count, kinds.replace("o", "")).parameters
    for name, value in columns.items():
        parameters[:, COLUMNS.index(name)] = value
    return Augmentation(kinds, parameters)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flip", [0, 1])
def test_whole_moves_only_move(flip: int, turns: int) -> None:
    """Mirrored, then turned, then shifted, to the last bit; what comes in is the mirror image."""
    x = latents()[:1]
    moved = x.flip(3) if flip else x
    moved = torch.rot90(moved, turns, (2, 3))
    found, _ = fixed(flip=flip, turns=turns, right=2, down=-1).apply(x, x)
    assert torch.equal(found[..., :-1, 2:], moved[..., 1:, :-2])
    assert torch.equal(found[..., :-1, :2], moved[..., 1:, 1:3].flip(3))
    assert torch.equal(found[..., -1, 2:], moved[..., -2, :-2])


def test_half_turns_of_other_shapes() -> None:
    x = latents(6, 10)[:1]
    found, _ = fixed(turns=2).apply(x, x)
    assert torch.equal(found, x.flip((2, 3)))
    drawn = draw(torch.Generator().manual_seed(0), (64, 4, 6, 10), "b").parameters
    assert set(drawn[:, COLUMNS.index("turns")].tolist()) == {0, 2}


def test_the_affine_path_agrees_where_it_can() -> None:
    """Identity and whole shifts to 1e-5; sym6 is not symmetric, so mirrors come back near only."""
    k = torch.linspace(0, 3, 16)
    smooth = (torch.sin(k)[:, None] * torch.cos(0.7 * k)).expand(1, 4, 16, 16)
    for x in (latents()[:1], smooth):
        torch.testing.assert_close(identity(1).apply(x, x)[0], x, atol=1e-5, rtol=0)
        still = Augmentation("bg", identity(1).parameters.clone())
        still.parameters[:, COLUMNS.index("x")] = -2
        whole, _ = fixed(right=2).apply(x, x)
        torch.testing.assert_close(still.apply(x, x)[0], whole, atol=1e-5, rtol=0)
    mirror = fixed("bg", xx=-1).apply(smooth, smooth)[0]
    error = (mirror - smooth.flip(3)).square().mean().sqrt().item()
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize(
    ("kinds", "sides", "corner", "power"),
    [
        (
            "g",
            (16, 16),
            [[-0.61443, -0.78394, -0.7138, -0.77302], [-0.10041, 0.06899, 0.30603, 0.49817]],
            [0.40066, 0.3528],
        ),
        (
            "bg",
            (16, 16),
            [[0.74582, 0.89248, 0.79076, 0.67739], [-0.73989, 0.98195, 1.0355, 0.78636]],
            [0.40867, 0.36373],
        ),
        (
            "g",
            (12, 20),
            [[-0.72601, 0.20858, 0.85693, 0.56397], [0.52132, 0.10194, 0.36187, -0.96014]],
            [0.37384, 0.34255],
        ),
    ],
)
def test_the_numbers_of_the_package(kinds, sides, corner, power) -> None:
    """elatentlpips 0.2's AdaAugment on these latents with its draws replaced by these numbers.

    The package pads by what the whole batch needs, we by a constant: so its maps agree up to
    rounding.
    """
    found, other = _drawn(UNIFORM, NORMAL, sides, kinds).apply(
        latents(*sides), latents(*sides, 1.3)
    )
    torch.testing.assert_close(found[:, 1, 3, 5:9], torch.tensor(corner), atol=3e-5, rtol=0)
    torch.testing.assert_close(
        other.square().mean((1, 2, 3)), torch.tensor(power), atol=3e-5, rtol=0
    )


def test_the_numbers_of_the_packages_colours_and_cutout() -> None:
    """On equal sides: on others the package takes each side's own mean, and T is not one map."""
    x = latents()
    found, other = _drawn(UNIFORM, NORMAL, (16, 16), "co").apply(x, x)
    corner = [[0.81865, -0.01182, -1.29589, -1.61571], [-0.13384, 0.13871, 0.0, 0.0]]
    torch.testing.assert_close(found[:, 1, 3, 5:9], torch.tensor(corner), atol=2e-5, rtol=0)
    power = found.square().mean((1, 2, 3))
    torch.testing.assert_close(power, torch.tensor([0.75786, 0.21495]), atol=2e-5, rtol=0)
    assert torch.equal(found, other)


@pytest.mark.parametrize("kinds", ["b", "g", "o", "bg", "bgo"])
def test_maps_without_colour_are_linear(kinds: str) -> None:
    a, b = latents().double(), latents(phase=1.0).double()
    augmentation = draw(torch.Generator().manual_seed(3), a.shape, kinds)
    (ta, tb), (both, twice) = augmentation.apply(a, b), augmentation.apply(a + b, 2 * a)
    torch.testing.assert_close(both, ta + tb)
    torch.testing.assert_close(twice, 2 * ta)


@pytest.mark.parametrize("kinds", ["", "b", "g", "c", "o", "bgco"])
def test_both_sides_get_the_same_map(kinds: str) -> None:
    x = latents()
    augmentation = draw(torch.Generator().manual_seed(1), x.shape, kinds)
    ta, tb = augmentation.apply(x, x.clone())
    assert torch.equal(ta, tb)
    if not kinds:
        assert torch.equal(ta, x)
    mixed, again = (
        augmentation.apply(x, latents(phase=1.0)),
        augmentation.apply(latents(phase=1.0), x),
    )
    torch.testing.assert_close(mixed[0], again[1])


def test_a_sample_does_not_see_the_batch() -> None:
    """Draws and maps of a row are those of the row alone, so batches may be split anywhere."""
    keys = SampleKeys(5, (0, 0, 1), (4, 9, 4))
    x = latents()[[0, 1, 0]]
    whole = draw(keys, x.shape, "bgco")
    alone = draw(keys.select(slice(1, 2)), x[1:2].shape, "bgco")
    assert torch.equal(whole.parameters[1:2], alone.parameters)
    found = whole.apply(x, -x)[0][1:2]
    torch.testing.assert_close(alone.apply(x[1:2], -x[1:2])[0], found, atol=1e-6, rtol=0)
    assert torch.equal(whole.select(slice(1, 2)).parameters, alone.parameters)
    assert not torch.equal(whole.parameters[0], whole.parameters[2])
    other = draw(keys, x.shape, "bgco", "another")
    assert not torch.equal(whole.parameters, other.parameters)


def test_ranges_of_the_draws() -> None:
    drawn = draw(torch.Generator().manual_seed(0), (4000, 4, 16, 24), "bgco").parameters
    column = {name: drawn[:, i] for i, name in enumerate(COLUMNS)}
    assert column["flip"].mean().item() == pytest.approx(0.5, abs=0.03)
    assert column["right"].abs().max() == 3 and column["down"].abs().max() == 2
    for name, low, high in (
        ("brightness", -0.5, 0.5),
        ("contrast", 0.5, 1.5),
        ("saturation", 0, 2),
    ):
        assert low <= column[name].min() and column[name].max() <= high
        assert column[name].mean().item() == pytest.approx((low + high) / 2, abs=0.03)
    # |det| = scale^-2, whatever the rotations and the anisotropy: log2 of it is N(0, (2 0.2)^2)
    det = column["xx"] * column["yy"] - column["xy"] * column["yx"]
    assert det.abs().log2().std().item() == pytest.approx(0.4, abs=0.02)


def test_gradients_flow_to_both_sides() -> None:
    a, b = latents().requires_grad_(), latents(phase=1.0).requires_grad_()
    ta, tb = draw(torch.Generator().manual_seed(1), a.shape, "bgco").apply(a, b)
    only, none = torch.autograd.grad(ta.sum(), (a, b), retain_graph=True, allow_unused=True)
    assert only is not None and none is None
    (other,) = torch.autograd.grad(tb.sum(), b)
    assert other.abs().sum() > 0


def test_tiny_latents() -> None:
    x = latents()[..., :4, :4].contiguous()
    found, _ = draw(torch.Generator().manual_seed(1), x.shape, "bg").apply(x, x)
    assert found.shape == x.shape and found.isfinite().all()


@pytest.mark.parametrize("kinds", ["x", "bb", "b g"])
def test_unknown_kinds_are_refused(kinds: str) -> None:
    with pytest.raises(UserError, match="give some of the letters"):
        check_kinds(kinds)
    with pytest.raises(UserError, match="a cutout always changes"):
        identity(1, "bo")
