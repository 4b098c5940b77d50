import pytest
import torch

from diffkit.errors import UserError
from diffkit.models.conditioner import Sizes
from diffkit.protection.views import View, ViewPlan, plan_views

R, M = 32, 8


def picture(height: int, width: int) -> torch.Tensor:
    return torch.randn((1, 3, height, width), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("aspect", [1, 1.7, 3])
@pytest.mark.parametrize("scale", [0.5, 1, 1.3, 3])
def test_every_pixel_has_a_gradient_after_one_step(
    scale: float, aspect: float, square: bool
) -> None:
    short = round(scale * R)
    long = round(short * aspect)
    for height, width in ((short, long), (long, short)):
        x = picture(height, width).requires_grad_()
        plan = plan_views(height, width, R, M, square, views=1)
        total = torch.zeros(())
        for i, view in enumerate(plan.at(0, 7)):
            y = view.apply(x)
            assert y.shape[-2:] == view.size == plan.shapes[i]
            assert all(side % M == 0 for side in view.size)
            assert not square or view.size == (R, R)
            kernel = torch.randn((4, 3, 3, 3), generator=torch.Generator().manual_seed(i))
            total = total + torch.nn.functional.conv2d(y, kernel, padding=1).sin().sum()
        total.backward()
        assert x.grad is not None
        assert (x.grad != 0).all()


def test_at_its_own_size_the_view_is_the_picture_itself() -> None:
    x = picture(R, 2 * R)
    (view,) = plan_views(R, 2 * R, R, M, encoder_only=True).at(0, 0)
    assert view.apply(x) is x
    windows = plan_views(R, 3 * R, R, M).whole
    wide = picture(R, 3 * R)
    assert [view.size for view in windows] == [(R, 2 * R)] * 2
    assert torch.equal(windows[0].apply(wide), wide[..., : 2 * R])
    assert torch.equal(windows[1].apply(wide), wide[..., R:])


@pytest.mark.parametrize(
    ("height", "width", "square", "sizes"),
    [
        (100, 150, False, [(32, 48)]),
        (100, 170, False, [(32, 56)]),  # 54.4, to a multiple of 8
        (200, 100, False, [(64, 32)]),
        (100, 260, False, [(32, 64)] * 2),  # 83.2 -> 80, in windows of 64
        (100, 101, True, [(32, 32)]),
        (100, 150, True, [(32, 32)] * 2),
        (7, 5, False, [(48, 32)]),  # 44.8
    ],
)
def test_sizes_of_the_whole_view(
    height: int, width: int, square: bool, sizes: list[tuple[int, int]]
) -> None:
    plan = plan_views(height, width, R, M, square, views=1)
    assert [view.size for view in plan.whole] == sizes
    for view in plan.whole:
        limit = M / (2 * R) + 1 / min(height, width)
        stretch = (view.size[1] / view.width) / (view.size[0] / view.height)
        assert 1 - limit <= stretch <= 1 + limit


def test_count_of_views() -> None:
    def count(scale: float, **options: object) -> int:
        side = round(scale * R)
        return plan_views(side, side, R, M, **options).count  # type: ignore[arg-type]

    assert count(2) == 2
    assert count(2, encoder_only=True) == 1
    assert count(2, encoder_only=True, on_cpu=False) == 2
    assert count(2, views=4) == 4
    assert count(1.25, views=4) == 1
    assert count(2, tiles=True, encoder_only=True) == 1
    assert count(3, tiles=True, encoder_only=True) == 1 + 16


def test_refused_choices() -> None:
    with pytest.raises(UserError, match="at least 1"):
        plan_views(64, 64, R, M, views=0)
    with pytest.raises(UserError, match="encoder"):
        plan_views(64, 64, R, M, tiles=True)
    with pytest.raises(UserError, match="take the place"):
        plan_views(64, 64, R, M, tiles=True, encoder_only=True, views=2)


def test_a_view_depends_on_step_and_seed_alone() -> None:
    plan = plan_views(96, 160, R, M)
    again = plan_views(96, 160, R, M)
    later = [again.at(step, 3) for step in (9, 2, 5)]
    assert later == [plan.at(step, 3) for step in (9, 2, 5)]
    assert len({plan.at(step, 3)[-1] for step in range(20)}) > 15
    assert plan.at(4, 3) != plan.at(4, 4)


def visits(plan: ViewPlan, steps: range, seed: int) -> torch.Tensor:
    seen = torch.zeros((plan.height, plan.width))
    for step in steps:
        view = plan.at(step, seed)[-1]
        seen[view.top : view.top + view.height, view.left : view.left + view.width] += 1
    return seen


def test_details_visit_every_pixel_in_one_turn_and_evenly_in_many() -> None:
    plan = plan_views(96, 150, R, M)
    rows, columns = plan.grid
    turn = rows * columns
    assert (rows, columns) == (4, 6)
    for start in (0, turn):
        assert visits(plan, range(start, start + turn), 11).min() >= 1
    seen = visits(plan, range(20 * turn), 5)
    assert seen.max() / seen.min() < 4.5  # 2 along each axis, and chance
    for step in range(turn):
        view = plan.at(step, 11)[-1]
        assert R <= view.height == view.width <= 96


def test_tiles_cover_the_picture_with_weights_that_sum_to_one() -> None:
    plan = plan_views(70, 101, R, M, tiles=True, encoder_only=True)
    total = torch.zeros((70, 101))
    x = picture(70, 101)
    for tile in plan.tiling:
        assert tile.windowed and tile.size == (R, R)
        rows, columns = slice(tile.top, tile.top + R), slice(tile.left, tile.left + R)
        assert torch.equal(tile.apply(x), x[..., rows, columns])
        window = tile.window()
        assert window.shape == (R, R) and window.min() > 0 and window.max() <= 1
        total[rows, columns] += window
    torch.testing.assert_close(total, torch.ones_like(total), atol=0.01, rtol=0)
    starts = sorted({tile.left for tile in plan.tiling})
    assert max(b - a for a, b in zip(starts, starts[1:], strict=False)) <= 0.75 * R


def test_a_resize_is_the_mean_where_it_must_be() -> None:
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    small = View("whole", 0, 0, 64, 64, (16, 16)).apply(ramp)
    torch.testing.assert_close(small[0, 0, 5, 2:-2], torch.arange(16.0)[2:-2] * 4 + 1.5)
    constant = View("whole", 0, 0, 60, 64, (16, 24)).apply(torch.full((2, 3, 64, 64), 0.25))
    torch.testing.assert_close(constant, torch.full((2, 3, 16, 24), 0.25))


def test_mask_goes_through_the_same_rectangle() -> None:
    mask = torch.zeros((1, 1, 64, 64))
    mask[..., 32:, :] = 1
    view = View("detail 0", 16, 0, 32, 32, (16, 16))
    small = view.mask(mask)
    assert torch.equal(small[0, 0, :, 0], torch.tensor([0.0] * 8 + [1.0] * 8))
    whole = View("whole", 0, 0, 64, 64, (64, 64))
    assert whole.mask(mask) is mask


def test_sizes_in_pixels_of_the_resized_picture() -> None:
    assert View("detail 0", 30, 60, 50, 50, (25, 25)).sizes(100, 200) == Sizes(
        (100, 200), (15, 30), (25, 25)
    )
    with pytest.raises(ValueError, match="not inside"):
        View("detail 0", 30, 60, 50, 50, (25, 25)).apply(picture(60, 200))
