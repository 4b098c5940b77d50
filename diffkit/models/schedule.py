"""The noise schedule: z_t = alpha_t z_0 + sigma_t eps, for DDPM tables and for flow matching.

Every parametrisation of a denoiser is one linear function of (x0, eps), so that a single 2x2
system turns any of them into any other:

    epsilon     (0, 1)               eps
    sample      (1, 0)               x0
    v           (-sigma_t, alpha_t)  alpha_t eps - sigma_t x0     (Salimans & Ho 2022)
    velocity    (-1, 1)              eps - x0                     (flow matching)

Given z_t = alpha_t x0 + sigma_t eps and y = a x0 + b eps, with det = alpha_t b - sigma_t a,

    x0 = (b z_t - sigma_t y) / det,    eps = (alpha_t y - a z_t) / det.

det vanishes only where y says nothing about one of the two: eps-prediction at alpha_t = 0 (x0 is
unknown) and x0-prediction at sigma_t = 0 (eps is unknown). The unknown one is then its prior mean,
zero; nothing is ever inf.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffkit.errors import UserError

__all__ = ["Density", "FlowSpacing", "Parametrization", "Prediction", "Schedule", "convert"]

Parametrization = Literal["epsilon", "sample", "v_prediction", "velocity"]
Density = Literal["uniform", "logit_normal"]
FlowSpacing = Literal["scheduler", "fractions"]

_FLOW_NAMES = {"flow_prediction": "velocity"}  # diffusers' name for it in some schedulers


def _coefficients(kind: Parametrization, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) with output = a x0 + b eps."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    table = {
        "epsilon": (zero, one),
        "sample": (one, zero),
        "v_prediction": (-sigma, alpha),
        "velocity": (-one, one),
    }
    if kind not in table:
        raise UserError(f"prediction type {kind!r} is unknown; known are {', '.join(table)}.")
    return table[kind]


def _match(values: Tensor, like: Tensor) -> Tensor:
    """(B,) or () -> (B, 1, 1, ...) on the device and in the dtype of `like`."""
    values = values.to(like)
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The same tensors in at least float32; a wider dtype is kept."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


@dataclass(frozen=True)
class Prediction:
    """What a denoiser says of z_t, in every parametrisation at once.

    Attributes:
        z_t: the noisy latents (B, ...), at least float32 like all the others.
        alpha_t, sigma_t: (B, 1, ...) coefficients of z_t = alpha_t x0 + sigma_t eps.
        x0, eps: (B, ...) the predicted data and noise.
    """

    z_t: Tensor
    alpha_t: Tensor
    sigma_t: Tensor
    x0: Tensor
    eps: Tensor

    @property
    def v(self) -> Tensor:
        """alpha_t eps - sigma_t x0 (Salimans & Ho 2022)."""
        return self.alpha_t * self.eps - self.sigma_t * self.x0

    @property
    def velocity(self) -> Tensor:
        """eps - x0, on every schedule."""
        return self.eps - self.x0

    def as_output(self, kind: Parametrization) -> Tensor:
        """The network output that would say the same in parametrisation `kind`."""
        a, b = _coefficients(kind, self.alpha_t, self.sigma_t)
        return a * self.x0 + b * self.eps

    @classmethod
    def from_output(
        cls, kind: Parametrization, output: Tensor, z_t: Tensor, alpha_t: Tensor, sigma_t: Tensor
    ) -> Prediction:
        """Solve the 2x2 system of the module's head for (x0, eps).

        Args:
            kind: the parametrisation of `output`.
            output, z_t: (B, ...) of any floating dtype; computed in at least float32.
            alpha_t, sigma_t: (B,) or ().
        """
        output, z_t = _wide(output, z_t)
        dtype = torch.promote_types(output.dtype, z_t.dtype)
        output, z_t = output.to(dtype), z_t.to(dtype)
        alpha, sigma = _match(alpha_t, z_t), _match(sigma_t, z_t)
        a, b = _coefficients(kind, alpha, sigma)
        det = alpha * b - sigma * a
        known = det != 0
        inverse = torch.where(known, 1 / torch.where(known, det, torch.ones_like(det)), 0)
        x0 = inverse * (b * z_t - sigma * output)
        eps = inverse * (alpha * output - a * z_t)
        # Where det = 0 the output is the one thing that is known.
        if kind == "epsilon":
            eps = output
        elif kind == "sample":
            x0 = output
        return cls(z_t, alpha, sigma, x0, eps)


def convert(
    output: Tensor,
    source: Parametrization,
    target: Parametrization,
    z_t: Tensor,
    alpha_t: Tensor,
    sigma_t: Tensor,
) -> Tensor:
    """A network output in parametrisation `source`, said in parametrisation `target`.

    Exact up to rounding for every ordered pair where `source` determines both x0 and eps; at the
    singular ends the undetermined one is taken as zero (see the head of this module).
    """
    prediction = Prediction.from_output(source, output, z_t, alpha_t, sigma_t)
    return prediction.as_output(target)


class Schedule:
    """alpha_t and sigma_t of one model, its parametrisation, and its sampling times.

    Times are in the model's own units: integers 0..T-1 for DDPM tables (Ho et al. 2020), with -1
    for the end of sampling, and real numbers in [0, T] for flow matching (Lipman et al. 2023),
    where sigma_t = t / T and alpha_t = 1 - sigma_t.

    Attributes:
        kind: "ddpm" or "flow".
        prediction_type: what the network puts out.
        num_train_timesteps: T.
    """

    def __init__(
        self,
        kind: Literal["ddpm", "flow"],
        prediction_type: Parametrization,
        num_train_timesteps: int,
        scheduler: Any,
        alphas_cumprod: Tensor | None = None,
        spacing: FlowSpacing = "scheduler",
    ) -> None:
        """Use `from_scheduler`; `alphas_cumprod` (T+1,) ends with the value at t = -1."""
        _coefficients(prediction_type, torch.ones(()), torch.ones(()))  # refuses unknown names
        self.kind = kind
        self.prediction_type: Parametrization = prediction_type
        self.num_train_timesteps = num_train_timesteps
        self._scheduler = scheduler
        self._spacing = spacing
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
        if alphas_cumprod is not None:
            table = alphas_cumprod.double()
            self._base = table.sqrt(), (1 - table).sqrt()

    @classmethod
    def from_scheduler(cls, scheduler: Any, spacing: FlowSpacing = "scheduler") -> Schedule:
        """Read the schedule out of any diffusers scheduler of the DDPM or flow-matching kind.

        Args:
            scheduler: any of them; it is not changed.
            spacing: the n sampling times of a flow before they are shifted: the scheduler's own,
                equally spaced from T to its last training time, or the "fractions" T (n - i) / n
                that Flux's pipelines hand to it.

        Raises:
            UserError: the scheduler is of another kind.
        """
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

        config = scheduler.config
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            own = copy.deepcopy(scheduler)
            return cls("flow", "velocity", config.num_train_timesteps, own, spacing=spacing)
        if not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(
                f"{type(scheduler).__name__} is neither a DDPM-type nor a flow-matching scheduler; "
                "diffkit reads those with alphas_cumprod and FlowMatchEulerDiscreteScheduler."
            )
        # DDIM's own table: other schedulers of the same config nudge the last entry off zero.
        ddim = DDIMScheduler.from_config(config)
        table = torch.cat([ddim.alphas_cumprod, ddim.final_alpha_cumprod.reshape(1)])
        kind = _FLOW_NAMES.get(config.prediction_type, config.prediction_type)
        return cls("ddpm", kind, config.num_train_timesteps, ddim, table)

    @property
    def zero_terminal_snr(self) -> bool:
        """True when the last training time is pure noise (alpha = 0; Lin et al. 2023)."""
        return self.kind == "flow" or bool(self._base[0][self.num_train_timesteps - 1] < 1e-4)

    @property
    def shifts_by_resolution(self) -> bool:
        """True for a flow whose sampling times depend on the picture's size, see `mu`."""
        return self.kind == "flow" and bool(self._scheduler.config.use_dynamic_shifting)

    def mu(self, tokens: int) -> float:
        """The resolution shift of a picture of that many tokens, as the stock pipelines find it.

        mu is linear in the number of tokens, through (base_image_seq_len, base_shift) and
        (max_image_seq_len, max_shift) of the scheduler's config. With "exponential" shifting the
        times become exp(mu) s / (1 + (exp(mu) - 1) s) (Esser et al. 2024, section 5.3.2).
        """
        config = self._scheduler.config
        slope = (config.max_shift - config.base_shift) / (
            config.max_image_seq_len - config.base_image_seq_len
        )
        return float(config.base_shift + slope * (tokens - config.base_image_seq_len))

    def alpha_sigma(self, t: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), each of t's shape, in `dtype`, on t's device."""
        if self.kind == "flow":
            sigma = t.to(dtype) / self.num_train_timesteps
            return 1 - sigma, sigma
        key = (t.device, dtype)
        if key not in self._tables:
            alphas, sigmas = self._base
            self._tables[key] = alphas.to(t.device, dtype), sigmas.to(t.device, dtype)
        alphas, sigmas = self._tables[key]
        return alphas[t.long()], sigmas[t.long()]

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2, of t's shape, float32; t must not be the clean end."""
        alpha, sigma = self.alpha_sigma(t)
        return (alpha / sigma) ** 2

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t = alpha_t z0 + sigma_t eps, in at least float32; t is (B,)."""
        z0, eps = _wide(z0, eps)
        alpha, sigma = self.alpha_sigma(t, z0.dtype)
        return _match(alpha, z0) * z0 + _match(sigma, z0) * eps

    def target(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should put out for z_t, in at least float32; t is (B,)."""
        z0, eps = _wide(z0, eps)
        alpha, sigma = self.alpha_sigma(t, z0.dtype)
        a, b = _coefficients(self.prediction_type, _match(alpha, z0), _match(sigma, z0))
        return a * z0 + b * eps

    def prediction(self, output: Tensor, z_t: Tensor, t: Tensor) -> Prediction:
        """Read a network output (B, ...) at z_t and times t (B,) or ()."""
        output, z_t = _wide(output, z_t)
        alpha, sigma = self.alpha_sigma(t, z_t.dtype)
        return Prediction.from_output(self.prediction_type, output, z_t, alpha, sigma)

    def train_timesteps(
        self, u: Tensor, density: Density = "uniform", mean: float = 0.0, std: float = 1.0
    ) -> Tensor:
        """Training times (B,) from uniform draws u (B,) in [0, 1), by inverting the density.

        DDPM: floor(u T), int64. Flow: t = T shift(s), where s = 1 - u, or for "logit_normal"
        s = sigmoid(mean + std Phi^-1(u)) (Esser et al. 2024, equation 19), and
        shift(s) = k s / (1 + (k - 1) s) with the scheduler's own k; float32 in (0, T]. A scheduler
        that shifts by resolution leaves its training times unshifted, k = 1.
        """
        if self.kind == "ddpm":
            if density != "uniform":
                raise UserError(f"timestep density {density!r} is for flow models; use 'uniform'.")
            return (u * self.num_train_timesteps).long().clamp_max(self.num_train_timesteps - 1)
        if density == "logit_normal":
            normal = torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
            s = torch.sigmoid(mean + std * normal)
        else:
            s = 1 - u
        shift = 1.0 if self.shifts_by_resolution else float(self._scheduler.shift)
        return self.num_train_timesteps * (shift * s / (1 + (shift - 1) * s))

    def sampling_timesteps(self, steps: int, mu: float | None = None) -> Tensor:
        """The times of an n-step sampler, (steps + 1,), from noise to the clean end.

        The first `steps` are those of the stock DDIM or flow-matching scheduler; the last is -1
        (DDPM) or 0 (flow). `mu` is the resolution shift of schedulers with dynamic shifting.
        """
        scheduler = copy.deepcopy(self._scheduler)
        if self.kind == "flow":
            if self.shifts_by_resolution and mu is None:
                raise UserError("this scheduler shifts its times by resolution: give mu.")
            extra: dict[str, Any] = {} if mu is None else {"mu": mu}
            if self._spacing == "fractions":
                extra["sigmas"] = [(steps - i) / steps for i in range(steps)]
            scheduler.set_timesteps(steps, **extra)
            return torch.cat([scheduler.sigmas[:-1] * self.num_train_timesteps, torch.zeros(1)])
        if not 1 <= steps <= self.num_train_timesteps:
            raise UserError(f"{steps} steps; this model has 1 to {self.num_train_timesteps}.")
        scheduler.set_timesteps(steps)
        return torch.cat([scheduler.timesteps.cpu(), torch.tensor([-1])])

    def step(self, prediction: Prediction, s: Tensor) -> Tensor:
        """z_s = alpha_s x0 + sigma_s eps: DDIM with eta = 0 (Song et al. 2021, equation 12).

        On a flow schedule this is the Euler step z_t + (sigma_s - sigma_t) velocity.
        """
        alpha, sigma = self.alpha_sigma(s, prediction.z_t.dtype)
        z_t = prediction.z_t
        return _match(alpha, z_t) * prediction.x0 + _match(sigma, z_t) * prediction.eps
