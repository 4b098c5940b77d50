"""The mathematics of consistency models: grids, boundary, guidance, and a teacher known exactly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

from diffkit.models.consistency import (
    SolverGrid,
    boundary_scalings,
    consistency_function,
    ddpm_grid,
    flow_grid,
    lcm_guidance,
    pseudo_huber,
)
from diffkit.models.schedule import Prediction, Schedule

MU, STD = 0.3, 0.5
"""The data of the exact teacher: every element is N(MU, STD^2)."""


def sd_schedule(prediction_type: str = "epsilon") -> Schedule:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return Schedule.from_scheduler(
        DDIMScheduler(**betas, prediction_type=prediction_type, clip_sample=False)
    )


def flow_schedule(shift: float = 3.0) -> Schedule:
    return Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=shift))


# -- grid ---------------------------------------------------------------------------------------


def test_the_grid_of_fifty_steps() -> None:
    grid = ddpm_grid(1000, 50)
    assert grid.start.tolist() == list(range(19, 1000, 20)) and len(grid) == 50
    assert grid.end.tolist() == [0, *range(19, 980, 20)]
    assert not grid.edge.any()
    schedule = sd_schedule()
    abar = schedule.alpha_sigma(grid.end, torch.float64)[0].square()
    table = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod.double()
    torch.testing.assert_close(abar[0], table[0])  # 0.99915, not 1
    torch.testing.assert_close(abar[1:], table[grid.start[:-1]])


def test_a_grid_that_does_not_divide_the_times_ends_before_the_last() -> None:
    grid = ddpm_grid(1000, 30)
    assert grid.start[-1].item() == 989 and grid.end[:2].tolist() == [0, 32]


def test_edges_of_segments() -> None:
    grid = ddpm_grid(1000, 50, 2)
    assert grid.edge[:25].unique().tolist() == [0] and grid.edge[25:].unique().tolist() == [499]
    assert (grid.end >= grid.edge).all() and grid.end[25].item() == 499
    # DDIM with "trailing" spacing stops where the segments end.
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [999, 499]
    flow = flow_grid(1000, 50, 3.0, 5)
    assert flow.edge.unique().tolist() == pytest.approx([0, 3e3 / 7, 2e3 / 3, 9e3 / 11, 12e3 / 13])


def test_the_grid_of_a_flow() -> None:
    grid = flow_grid(1000, 50, 3.0)
    assert grid.start[-1].item() == 1000 and grid.end[0].item() == 0
    assert torch.equal(grid.end[1:], grid.start[:-1])
    u = 25 / 50
    assert grid.start[24].item() == pytest.approx(1000 * 3 * u / (1 + 2 * u))
    assert torch.allclose(flow_grid(1000, 4, 1.0).start, torch.tensor([250.0, 500, 750, 1000]))


# -- consistency function -----------------------------------------------------------------------


def test_boundary_scalings() -> None:
    skip, out = boundary_scalings(torch.tensor([0.0, 19.0, 999.0], dtype=torch.float64))
    assert (skip[0].item(), out[0].item()) == (1, 0)
    assert skip[1].item() == pytest.approx(6.925e-6, rel=1e-3)
    assert out[1].item() == pytest.approx(0.99999654, abs=1e-8)
    assert skip[2].item() == pytest.approx(2.5e-9, rel=1e-2)
    for t in (0, 19, 999):
        theirs = LCMScheduler().get_scalings_for_boundary_condition_discrete(t)
        ours = boundary_scalings(torch.tensor(float(t), dtype=torch.float64))
        assert [x.item() for x in ours] == pytest.approx([float(x) for x in theirs], rel=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_x0_and_eps_make_up_z(kind: str) -> None:
    """Also after guidance; and the solver's step is Euler's on a flow."""
    schedule = flow_schedule() if kind == "flow" else sd_schedule(kind)
    draw = torch.Generator().manual_seed(0)
    z, given, without = (
        torch.randn(5, 4, 3, generator=draw, dtype=torch.float64) for _ in range(3)
    )
    t = torch.tensor([19, 199, 499, 799, 999])
    w = torch.tensor([0.0, 0.5, 1.0, 7.5, 14.0], dtype=torch.float64)
    found = schedule.prediction(lcm_guidance(given, without, w), z, t)
    alpha, sigma = (x[:, None, None] for x in schedule.alpha_sigma(t, torch.float64))
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, z, rtol=0, atol=1e-10)
    # Guiding outputs guides x0 and eps: both are linear in the output.
    parts = [schedule.prediction(output, z, t) for output in (given, without)]
    for name in ("x0", "eps"):
        a, b = (getattr(part, name) for part in parts)
        torch.testing.assert_close(getattr(found, name), lcm_guidance(a, b, w))
    if kind == "flow":
        end = flow_grid(1000, 50, 3.0).end[torch.tensor([0, 9, 19, 29, 39])].double()
        euler = z + ((end - t) / 1000)[:, None, None] * found.velocity
        torch.testing.assert_close(schedule.step(found, end), euler)


def test_guidance_is_that_of_diffusers_with_one_more() -> None:
    c, u = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    w = torch.tensor([0.5, 7.0])
    usual = u + (w + 1)[:, None, None] * (c - u)
    torch.testing.assert_close(lcm_guidance(c, u, w), usual, rtol=0, atol=1e-5)


def test_at_the_edge_it_is_z_bit_for_bit() -> None:
    z = torch.randn(3, 2, 2)
    said = sd_schedule().prediction(torch.randn(3, 2, 2) * 1e30, z, torch.zeros(3).long())
    edges = torch.tensor([0, 0, 0])
    assert torch.equal(consistency_function(sd_schedule(), said, edges, edges), z)
    t = torch.tensor([499] * 3)
    said = sd_schedule().prediction(torch.randn(3, 2, 2), z, t)
    assert torch.equal(consistency_function(sd_schedule(), said, t, t), z)
    flow = flow_schedule()
    t = torch.tensor([428.5] * 3)
    said = flow.prediction(torch.randn(3, 2, 2), z, t)
    assert torch.equal(consistency_function(flow, said, t, t), z)


def test_a_segment_ends_on_the_line_of_the_prediction() -> None:
    schedule, t = sd_schedule(), torch.tensor([999, 519])
    z, output = torch.randn(2, 3, 3), torch.randn(2, 3, 3)
    said = schedule.prediction(output, z, t)
    ends = consistency_function(schedule, said, t, torch.tensor([499, 0]))
    alpha, sigma = schedule.alpha_sigma(torch.tensor(499))
    torch.testing.assert_close(ends[0], alpha * said.x0[0] + sigma * said.eps[0])
    torch.testing.assert_close(ends[1], said.x0[1])


def test_pseudo_huber_by_hand() -> None:
    d = torch.tensor([[0.0], [1e-3], [0.1], [1.0]], dtype=torch.float64, requires_grad=True)
    found = pseudo_huber(d, torch.zeros(4, 1, dtype=torch.float64), 1e-3)
    want = [0.0, 1e-3 * (math.sqrt(2) - 1), 0.09900500, 0.99900050]
    assert found.tolist() == pytest.approx(want, rel=1e-6)
    (grad,) = torch.autograd.grad(found.sum(), d)
    torch.testing.assert_close(grad, d.detach() / (d.detach() ** 2 + 1e-6).sqrt())
    assert pseudo_huber(torch.ones(2, 8).bfloat16(), torch.zeros(2, 8), 1e-3).dtype == torch.float32


# -- a teacher known exactly --------------------------------------------------------------------


def exact_end(schedule: Schedule, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The end of the probability-flow ODE through z at t: MU + STD (z - a MU) / deviation of z."""
    a, s = (x[:, None] for x in schedule.alpha_sigma(t, torch.float64))
    return MU + STD * (z - a * MU) / (a**2 * STD**2 + s**2).sqrt()


def exact_prediction(schedule: Schedule, z: torch.Tensor, t: torch.Tensor) -> Prediction:
    a, s = (x[:, None] for x in schedule.alpha_sigma(t, torch.float64))
    eps = s * (z - a * MU) / (a**2 * STD**2 + s**2)
    x0 = MU + a * STD**2 * (z - a * MU) / (a**2 * STD**2 + s**2)
    return Prediction(z, a, s, x0, eps)


def gaps(schedule: Schedule, grid: SolverGrid, draws: int = 40000) -> torch.Tensor:
    """mean |f(z_t, t) - f(z_t', t')| of each interval, with the exact end for both networks."""
    draw = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, draws, generator=draw, dtype=torch.float64)
    a, s = (x[:, None] for x in schedule.alpha_sigma(grid.start, torch.float64))
    z = a * (MU + STD * x0) + s * noise
    z_end = schedule.step(exact_prediction(schedule, z, grid.start), grid.end)

    def end(point: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        known = exact_end(schedule, point, t)
        said = replace(exact_prediction(schedule, point, t), x0=known)
        return consistency_function(schedule, said, t, grid.edge)

    return (end(z, grid.start) - end(z_end, grid.end)).abs().mean(1)


@pytest.mark.parametrize(("steps", "want"), [(50, 3.9e-4), (25, 1.5e-3), (10, 8.5e-3)])
def test_an_exact_teacher_leaves_the_solvers_error(steps: int, want: float) -> None:
    """The figures come from an independent computation; any step that is off by one is 17 times
    as far from 0 at 50 steps."""
    found = gaps(sd_schedule(), ddpm_grid(1000, steps))
    assert found.mean().item() == pytest.approx(want, rel=0.04)
    if steps == 50:
        assert found[0].item() == found.max().item() == pytest.approx(7.8e-3, rel=0.04)


def test_grids_that_are_off_by_one_are_noticed() -> None:
    grid = ddpm_grid(1000, 50)
    schedule = sd_schedule()
    late = replace(grid, end=(grid.end - 20).clamp_min(0))
    draw = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 4000, generator=draw, dtype=torch.float64)
    a, s = (x[:, None] for x in schedule.alpha_sigma(grid.start, torch.float64))
    z = a * (MU + STD * x0) + s * noise
    z_end = schedule.step(exact_prediction(schedule, z, grid.start), grid.end)
    gap = exact_end(schedule, z, grid.start) - exact_end(schedule, z_end, late.end)
    assert gap.abs().mean().item() > 5e-3


@pytest.mark.parametrize(
    ("shift", "steps", "want"),
    [
        *((3.0, 50, 4.7e-4), (3.0, 25, 1.9e-3), (3.0, 10, 1.13e-2)),
        *((1.0, 50, 2.4e-4), (1.0, 25, 9.5e-4), (1.0, 10, 5.9e-3)),
    ],
)
def test_an_exact_flow_teacher(shift: float, steps: int, want: float) -> None:
    found = gaps(flow_schedule(shift), flow_grid(1000, steps, shift))
    assert found.mean().item() == pytest.approx(want, rel=0.05)
    if (shift, steps) == (3.0, 50):
        assert found.max().item() == pytest.approx(3.1e-3, rel=0.05)


def test_the_fifty_step_endpoint_is_near_the_exact_one() -> None:
    """0.019 apart, and 0.025 the x0 of the last step: what teacher endpoints may differ by."""
    schedule, grid = sd_schedule(), ddpm_grid(1000, 50)
    z = torch.randn(1, 20000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = exact_end(schedule, z, grid.start[-1:])
    x0 = z
    for t, s in zip(grid.start.flip(0), grid.end.flip(0), strict=True):
        said = exact_prediction(schedule, z, t[None])
        z, x0 = schedule.step(said, s), said.x0
    assert (z - want).abs().mean().item() == pytest.approx(0.019, abs=1e-3)
    assert (x0 - want).abs().mean().item() == pytest.approx(0.025, abs=1e-3)


# -- oracle -------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_oracle_through_the_stock_scheduler(steps: int) -> None:
    """LCMScheduler with the exact end as the network gives back the data's distribution."""
    schedule = sd_schedule()
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = LCMScheduler(**betas, original_inference_steps=50, clip_sample=False)
    scheduler.set_timesteps(steps)
    draw = torch.Generator().manual_seed(3)
    z = torch.randn(1, 60000, generator=draw, dtype=torch.float64)
    for t in scheduler.timesteps:
        a, s = (x.item() for x in schedule.alpha_sigma(t, torch.float64))
        eps = (z - a * exact_end(schedule, z, t[None])) / s
        z = scheduler.step(eps, t, z, generator=draw).prev_sample
    assert z.std().item() == pytest.approx(STD, rel=0.02)
    if steps > 1:
        assert z.mean().item() == pytest.approx(MU, abs=0.01)
