"""Latent consistency models: the solver's grid, the consistency function, guidance, the distance.

Luo et al. 2023 (arXiv:2310.04378). The teacher's ODE is cut into N intervals, each from a time t to
a time t' nearer to the data. The consistency function maps any point of a trajectory to its clean
end; a student of it is asked to say the same at t and, where the teacher's step leads, at t':

    f(z, t) = c_skip(t) z + c_out(t) x0_hat(z, t),    f(z_t, t) = f(z_t', t')

With S segments (phased consistency; Wang et al. 2024, arXiv:2405.18407) the end of a trajectory is
the edge e of the segment that t lies in, and t' never passes it:

    f(z, t) = alpha_e x0_hat + sigma_e eps_hat    for e > 0,    f(z, e) = z

Steps of the solver are `Schedule.step`: DDIM with eta = 0, on a flow Euler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffkit.models.schedule import Prediction, Schedule

__all__ = [
    "TIME_SCALING",
    "Interval",
    "SolverGrid",
    "boundary_scalings",
    "consistency_function",
    "ddpm_grid",
    "flow_grid",
    "lcm_guidance",
    "pseudo_huber",
]

TIME_SCALING = 10.0
"""What times are multiplied by in `boundary_scalings`; `timestep_scaling` of `LCMScheduler`."""

SIGMA_DATA = 0.5


@dataclass(frozen=True)
class Interval:
    """One interval of each of B samples, times (B,) in the model's units.

    Attributes:
        start: t, where the sample is noised to.
        end: t', where the solver's step leads.
        edge: e, where the segment ends; 0 with one segment.
    """

    start: Tensor
    end: Tensor
    edge: Tensor


@dataclass(frozen=True)
class SolverGrid:
    """N intervals, from the clean end on: `start`, `end` and `edge` are (N,), see `Interval`."""

    start: Tensor
    end: Tensor
    edge: Tensor

    def __len__(self) -> int:
        return len(self.start)

    def at(self, index: Tensor) -> Interval:
        """The intervals of these numbers (B,)."""
        return Interval(self.start[index], self.end[index], self.edge[index])


def ddpm_grid(times: int, steps: int, segments: int = 1) -> SolverGrid:
    """T_i = (i + 1) k - 1 with k = times // steps, and t'_i = max(T_i - k, 0), int64.

    The first interval ends at 0, the cleanest time of the table, and not beyond it.

    Arguments:
        times: of training, 1000.
        steps: N, at most `times`; the grid ends at N k - 1.
        segments: S, a divisor of N.
    """
    k = times // steps
    start = (torch.arange(steps) + 1) * k - 1
    end = (start - k).clamp_min(0)
    return SolverGrid(start, end, _edges(end, segments))


def flow_grid(times: int, steps: int, shift: float, segments: int = 1) -> SolverGrid:
    """t_i = times s((i + 1) / N), t'_i = times s(i / N) with s(u) = m u / (1 + (m - 1) u), float32.

    Arguments:
        times: of training, 1000; sigma = t / times.
        steps: N.
        shift: m, the scheduler's.
        segments: S, a divisor of N.
    """
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    s = (times * shift * u / (1 + (shift - 1) * u)).float()
    return SolverGrid(s[1:], s[:-1], _edges(s[:-1], segments))


def _edges(end: Tensor, segments: int) -> Tensor:
    length = len(end) // segments
    return end[::length].repeat_interleave(length)


def boundary_scalings(t: Tensor, scaling: float = TIME_SCALING) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) at times t of any shape, at least float32; (1, 0) at t = 0.

    With s = scaling t and sigma_d = 0.5: c_skip = sigma_d^2 / (s^2 + sigma_d^2) and
    c_out = s / sqrt(s^2 + sigma_d^2), as in `LCMScheduler`.
    """
    s = scaling * t.to(torch.promote_types(t.dtype, torch.float32))
    square = s.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / square, s / square.sqrt()


def consistency_function(
    schedule: Schedule, prediction: Prediction, t: Tensor, edge: Tensor
) -> Tensor:
    """f(z, t), (B, ...) in at least float32; z itself, bit for bit, where t is the edge.

    On a flow z - sigma v is z at the clean end, so that no scalings are needed there.

    Arguments:
        prediction: what the network says of z at t; finite at the edge too.
        t, edge: (B,), times in the model's units.
    """
    z = prediction.z_t
    ends = schedule.step(prediction, edge)
    if schedule.kind == "ddpm":
        skip, out = (_match(c, z) for c in boundary_scalings(t))
        ends = torch.where(_match(edge, z) > 0, ends, skip * z + out * prediction.x0)
    return torch.where(_match(t == edge, z).bool(), z, ends)


def lcm_guidance(conditional: Tensor, unconditional: Tensor, weight: Tensor) -> Tensor:
    """c + w (c - u), the guidance of LCM: diffusers' with the scale w + 1.

    x0 and eps are linear in the network's output at a fixed z_t, so that guiding outputs guides
    both, whatever the parametrisation.

    Arguments:
        conditional, unconditional: (B, ...).
        weight: w, (B,).
    """
    return conditional + _match(weight, conditional) * (conditional - unconditional)


def pseudo_huber(a: Tensor, b: Tensor, h: float) -> Tensor:
    """mean(sqrt((a - b)^2 + h^2) - h), one value a sample, in at least float32.

    Written as d^2 / (sqrt(d^2 + h^2) + h), which loses no digits where d is small. Its gradient is
    about sign(d) for |d| far above h.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    square = (a.to(dtype) - b.to(dtype)).square()
    return (square / ((square + h**2).sqrt() + h)).flatten(1).mean(1)


def _match(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, ...) on the device and in the dtype of `like`."""
    return values.to(like).reshape(-1, *(1,) * (like.ndim - 1))
