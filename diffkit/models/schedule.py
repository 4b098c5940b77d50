"""The noise schedule: z_t = alpha_t z_0 + sigma_t eps, for DDPM tables, flow matching and EDM.

Every parametrisation of a denoiser is one linear function of (x0, eps), so that a single 2x2
system turns any of them into any other:

    epsilon     (0, 1)               eps
    sample      (1, 0)               x0
    v           (-sigma_t, alpha_t)  alpha_t eps - sigma_t x0     (Salimans & Ho 2022)
    velocity    (-1, 1)              eps - x0                     (flow matching)
    edm         (sigma_t / (s r), -s alpha_t / r)                 (Karras et al. 2022)
    edm_v       the same with the other sign

where s = sigma_data, the standard deviation of the data, and r^2 = sigma_t^2 + s^2 alpha_t^2. "edm"
is the inner network F of D(z; sigma) = c_skip z + c_out F(c_in z; ln(sigma) / 4): it follows from
D = x0, z = x0 + sigma eps, c_skip = s^2 / r^2 and c_out = sigma s / r, and it says the same of any
z / alpha. With s = 1 and alpha^2 + sigma^2 = 1, "edm_v" is v.

Given z_t = alpha_t x0 + sigma_t eps and y = a x0 + b eps, with det = alpha_t b - sigma_t a,

    x0 = (b z_t - sigma_t y) / det,    eps = (alpha_t y - a z_t) / det.

For EDM's two, det = -+ r / s. det vanishes only where y says nothing about one of the two:
eps-prediction at alpha_t = 0 (x0 is unknown) and x0-prediction at sigma_t = 0 (eps is unknown). The
unknown one is then its prior mean, zero; nothing is ever inf.
"""

from __future__ import annotations

import copy
import inspect
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffkit.errors import UserError

__all__ = ["Density", "FlowSpacing", "Parametrization", "Prediction", "Schedule", "convert"]

Parametrization = Literal["epsilon", "sample", "v_prediction", "velocity", "edm", "edm_v"]
Density = Literal["uniform", "logit_normal", "log_normal"]
FlowSpacing = Literal["scheduler", "fractions"]
Kind = Literal["ddpm", "flow", "edm"]

_MOST = {False: "num_train_timesteps", True: "original_inference_steps"}
_CONSISTENCY = ("LCMScheduler", "FlowMatchLCMScheduler")
_FLOW_NAMES = {"flow_prediction": "velocity"}  # diffusers' name for it in some schedulers
# What EDM schedulers call the two signs of F.
_EDM_NAMES: dict[str, Parametrization] = {"epsilon": "edm", "v_prediction": "edm_v"}
_DENSITIES: dict[str, tuple[Density, ...]] = {
    "ddpm": ("uniform",),
    "flow": ("uniform", "logit_normal"),
    "edm": ("log_normal",),
}
# (mean, standard deviation) of the normal variable; Karras et al. 2022, table 1.
_NORMALS = {"logit_normal": (0.0, 1.0), "log_normal": (-1.2, 1.2)}


def _coefficients(
    kind: Parametrization, alpha: Tensor, sigma: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """(a, b) with output = a x0 + b eps."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    r = torch.hypot(sigma, sigma_data * alpha)
    edm = (sigma / (sigma_data * r), -sigma_data * alpha / r)
    table = {
        "epsilon": (zero, one),
        "sample": (one, zero),
        "v_prediction": (-sigma, alpha),
        "velocity": (-one, one),
        "edm": edm,
        "edm_v": (-edm[0], -edm[1]),
    }
    if kind not in table:
        raise UserError(f"prediction type {kind!r} is unknown; known are {', '.join(table)}.")
    return table[kind]


def _noise_gain(kind: Parametrization, alpha: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """alpha sigma / det, by which sigma_t eps changes with the output at a fixed z_t.

    det is never divided by: where it vanishes it cancels against alpha or sigma.
    """
    table = {
        "epsilon": sigma,
        "sample": -alpha,
        "v_prediction": alpha * sigma / (alpha.square() + sigma.square()),
        "velocity": alpha * sigma / (alpha + sigma),
    }
    if kind in table:
        return table[kind]
    edm = alpha * sigma * sigma_data / torch.hypot(sigma, sigma_data * alpha)
    return -edm if kind == "edm" else edm


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
        sigma_data: standard deviation of the data, of which only EDM's parametrisations speak.
    """

    z_t: Tensor
    alpha_t: Tensor
    sigma_t: Tensor
    x0: Tensor
    eps: Tensor
    sigma_data: float = 0.5

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
        a, b = _coefficients(kind, self.alpha_t, self.sigma_t, self.sigma_data)
        return a * self.x0 + b * self.eps

    @classmethod
    def from_output(
        cls,
        kind: Parametrization,
        output: Tensor,
        z_t: Tensor,
        alpha_t: Tensor,
        sigma_t: Tensor,
        sigma_data: float = 0.5,
    ) -> Prediction:
        """Solve the 2x2 system of the module's head for (x0, eps).

        Args:
            kind: the parametrisation of `output`.
            output, z_t: (B, ...) of any floating dtype; computed in at least float32.
            alpha_t, sigma_t: (B,) or ().
            sigma_data: standard deviation of the data, for EDM's parametrisations.
        """
        output, z_t = _wide(output, z_t)
        dtype = torch.promote_types(output.dtype, z_t.dtype)
        output, z_t = output.to(dtype), z_t.to(dtype)
        alpha, sigma = _match(alpha_t, z_t), _match(sigma_t, z_t)
        a, b = _coefficients(kind, alpha, sigma, sigma_data)
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
        return cls(z_t, alpha, sigma, x0, eps, sigma_data)


def convert(
    output: Tensor,
    source: Parametrization,
    target: Parametrization,
    z_t: Tensor,
    alpha_t: Tensor,
    sigma_t: Tensor,
    sigma_data: float = 0.5,
) -> Tensor:
    """A network output in parametrisation `source`, said in parametrisation `target`.

    Exact up to rounding for every ordered pair where `source` determines both x0 and eps; at the
    singular ends the undetermined one is taken as zero (see the head of this module).
    """
    prediction = Prediction.from_output(source, output, z_t, alpha_t, sigma_t, sigma_data)
    return prediction.as_output(target)


class Schedule:
    """alpha_t and sigma_t of one model, its parametrisation, and its sampling times.

    Times are in the model's own units: integers 0..T-1 for DDPM tables (Ho et al. 2020), with -1
    for the end of sampling, and real numbers in [0, T] for flow matching (Lipman et al. 2023),
    where sigma_t = t / T and alpha_t = 1 - sigma_t. For EDM (Karras et al. 2022) alpha_t = 1 and
    t = ln(sigma_t) / 4, with -inf for the clean end.

    Attributes:
        kind: "ddpm", "flow" or "edm".
        prediction_type: what the network puts out.
        num_train_timesteps: T.
        sigma_data: standard deviation of the data; of meaning for EDM only.
        clip: x0 is limited to [-clip, clip] in sampling, as pixel models' schedulers do; or None.
        consistency: each step goes to the clean end and adds fresh noise, as with `LCMScheduler`.
    """

    def __init__(
        self,
        kind: Kind,
        prediction_type: Parametrization,
        num_train_timesteps: int,
        scheduler: Any,
        alphas_cumprod: Tensor | None = None,
        spacing: FlowSpacing = "scheduler",
    ) -> None:
        """Use `from_scheduler`; `alphas_cumprod` (T+1,) ends with the value at t = -1."""
        one = torch.ones(())
        _coefficients(prediction_type, one, one, 0.5)  # refuses unknown names
        self.kind: Kind = kind
        self.sigma_data = float(scheduler.config.sigma_data) if kind == "edm" else 0.5
        self.clip: float | None = None
        self.consistency = type(scheduler).__name__ in _CONSISTENCY
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
        """Read the schedule out of any diffusers scheduler of the DDPM, flow or EDM kind.

        Args:
            scheduler: any of them; it is not changed.
            spacing: the n sampling times of a flow before they are shifted: the scheduler's own,
                equally spaced from T to its last training time, or the "fractions" T (n - i) / n
                that Flux's pipelines hand to it.

        Raises:
            UserError: the scheduler is of another kind.
        """
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

        config = scheduler.config
        if hasattr(scheduler, "precondition_outputs"):
            return cls._from_edm(scheduler)
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchLCMScheduler):
            if isinstance(scheduler, FlowMatchLCMScheduler):
                spacing = "fractions"  # its own times are shifted twice; the last has hardly noise
            own = copy.deepcopy(scheduler)
            return cls("flow", "velocity", config.num_train_timesteps, own, spacing=spacing)
        if not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(
                f"{type(scheduler).__name__} is no DDPM-type, flow-matching or EDM scheduler; "
                "diffkit reads those with alphas_cumprod, FlowMatchEulerDiscreteScheduler, "
                "EDMEulerScheduler and EDMDPMSolverMultistepScheduler."
            )
        # DDIM's own table: other schedulers of the same config nudge the last entry off zero.
        known = {"_class_name", *inspect.signature(DDIMScheduler.__init__).parameters}
        ddim = DDIMScheduler.from_config({k: v for k, v in config.items() if k in known})
        table = torch.cat([ddim.alphas_cumprod, ddim.final_alpha_cumprod.reshape(1)])
        kind = _FLOW_NAMES.get(config.prediction_type, config.prediction_type)
        own = scheduler if type(scheduler).__name__ in _CONSISTENCY else ddim
        schedule = cls("ddpm", kind, config.num_train_timesteps, copy.deepcopy(own), table)
        # DDIM and DDPM clip unless told; a config of another class without the word does not.
        if config.get("clip_sample"):
            # Schedulers without the range of their own (PNDM) carry old configs that lack it.
            schedule.clip = float(config.get("clip_sample_range", 1.0))
        return schedule

    @classmethod
    def _from_edm(cls, scheduler: Any) -> Schedule:
        config = scheduler.config
        if config.prediction_type not in _EDM_NAMES:
            raise UserError(
                f"{type(scheduler).__name__}: has no {config.prediction_type!r} prediction, only "
                f"{' and '.join(_EDM_NAMES)}."
            )
        kind = _EDM_NAMES[config.prediction_type]
        return cls("edm", kind, config.num_train_timesteps, copy.deepcopy(scheduler))

    @property
    def zero_terminal_snr(self) -> bool:
        """True when the last training time is pure noise (alpha = 0; Lin et al. 2023)."""
        if self.kind == "edm":
            return False
        return self.kind == "flow" or bool(self._base[0][self.num_train_timesteps - 1] < 1e-4)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of z at the first sampling time: 1 but for EDM.

        EDM: sqrt(sigma_max^2 + 1), sigma_max and data of unit variance, as in diffusers.
        """
        return float(self._scheduler.init_noise_sigma) if self.kind == "edm" else 1.0

    @property
    def density(self) -> Density:
        """The usual density of training times: "log_normal" for EDM, "uniform" for the others."""
        return "log_normal" if self.kind == "edm" else "uniform"

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
        if self.kind == "edm":
            sigma = torch.exp(4 * t.to(dtype))
            return torch.ones_like(sigma), sigma
        key = (t.device, dtype)
        if key not in self._tables:
            alphas, sigmas = self._base
            self._tables[key] = alphas.to(t.device, dtype), sigmas.to(t.device, dtype)
        alphas, sigmas = self._tables[key]
        return alphas[t.long()], sigmas[t.long()]

    def scale_input(self, z_t: Tensor, t: Tensor) -> Tensor:
        """What the network is given for z_t at times t (B,): c_in z_t for EDM, z_t for the others.

        c_in = 1 / sqrt(sigma_t^2 + sigma_data^2), computed in at least float32.
        """
        if self.kind != "edm":
            return z_t
        (z_t,) = _wide(z_t)
        _, sigma = self.alpha_sigma(t, z_t.dtype)
        return z_t / _match(torch.hypot(sigma, torch.full_like(sigma, self.sigma_data)), z_t)

    def place(self, t: Tensor) -> Tensor:
        """Where t lies on the noise schedule, of t's shape, float32 in [0, 1], 1 being noise.

        t / T; for EDM ln(sigma) between those of the scheduler's sigma_min and sigma_max.
        """
        if self.kind != "edm":
            return t.float() / self.num_train_timesteps
        config = self._scheduler.config
        low, high = math.log(config.sigma_min), math.log(config.sigma_max)
        return ((4 * t.float() - low) / (high - low)).clamp(0, 1)

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
        alpha, sigma = _match(alpha, z0), _match(sigma, z0)
        a, b = _coefficients(self.prediction_type, alpha, sigma, self.sigma_data)
        return a * z0 + b * eps

    def noise_gain(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """g(t) with sigma_t (eps_theta - eps) = g(t) (output - target), of t's shape, in `dtype`.

        At a fixed z_t every prediction is linear in the output, so the error of the predicted noise
        is that of the output times a number: sigma_t for eps-prediction, -alpha_t for x0,
        alpha_t sigma_t for v and for flow's velocity. It is finite everywhere, pure noise included.
        """
        alpha, sigma = self.alpha_sigma(t, dtype)
        return _noise_gain(self.prediction_type, alpha, sigma, self.sigma_data)

    def noise_delta(self, output: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """sigma_t (eps_theta - eps), by which z_t would change with the predicted noise in it.

        Computed as g(t) (output - target) in at least float32, so that it is exactly zero for a
        perfect output. z_t plus this is alpha_t z_0 + sigma_t eps_theta: the data stay the true
        ones. With the predicted data as well it would be z_t itself, whatever the network says.

        Args:
            output, target: (B, ...) in this model's parametrisation.
            t: (B,).
        """
        output, target = _wide(output, target)
        return _match(self.noise_gain(t, target.dtype), target) * (output - target)

    def prediction(self, output: Tensor, z_t: Tensor, t: Tensor) -> Prediction:
        """Read a network output (B, ...) at z_t and times t (B,) or ()."""
        output, z_t = _wide(output, z_t)
        alpha, sigma = self.alpha_sigma(t, z_t.dtype)
        kind, sigma_data = self.prediction_type, self.sigma_data
        return Prediction.from_output(kind, output, z_t, alpha, sigma, sigma_data)

    def train_timesteps(
        self,
        u: Tensor,
        density: Density | None = None,
        mean: float | None = None,
        std: float | None = None,
    ) -> Tensor:
        """Training times (B,) from uniform draws u (B,) in [0, 1), by inverting the density.

        DDPM: floor(u T), int64. Flow: t = T shift(s), where s = 1 - u, or for "logit_normal"
        s = sigmoid(mean + std Phi^-1(u)) (Esser et al. 2024, equation 19), and
        shift(s) = k s / (1 + (k - 1) s) with the scheduler's own k; float32 in (0, T]. A scheduler
        that shifts by resolution leaves its training times unshifted, k = 1. EDM: "log_normal",
        ln sigma = mean + std Phi^-1(u) (Karras et al. 2022, table 1), t = ln(sigma) / 4.

        Args:
            u: uniform draws.
            density: `self.density` by default; `UserError` for one that this kind does not have.
            mean, std: of the normal variable; (0, 1) by default, for "log_normal" (-1.2, 1.2).
        """
        density = density or self.density
        if density not in _DENSITIES[self.kind]:
            raise UserError(
                f"timestep density {density!r} is not for {self.kind} models; use "
                f"{' or '.join(map(repr, _DENSITIES[self.kind]))}."
            )
        if density == "uniform":
            if self.kind == "ddpm":
                return (u * self.num_train_timesteps).long().clamp_max(self.num_train_timesteps - 1)
            return self._flow_times(1 - u)
        usual = _NORMALS[density]
        mean, std = usual[0] if mean is None else mean, usual[1] if std is None else std
        normal = mean + std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
        return normal / 4 if self.kind == "edm" else self._flow_times(torch.sigmoid(normal))

    def sampling_shift(self, tokens: int) -> float:
        """k of shift(s) = k s / (1 + (k - 1) s), for a flow's sampling times; see `mu`."""
        if not self.shifts_by_resolution:
            return float(self._scheduler.shift)
        mu = self.mu(tokens)
        return mu if self._scheduler.config.time_shift_type == "linear" else math.exp(mu)

    def _flow_times(self, s: Tensor) -> Tensor:
        shift = 1.0 if self.shifts_by_resolution else float(self._scheduler.shift)
        return self.num_train_timesteps * (shift * s / (1 + (shift - 1) * s))

    def sampling_timesteps(self, steps: int, mu: float | None = None) -> Tensor:
        """The times of an n-step sampler, (steps + 1,), from noise to the clean end.

        The first `steps` are those of the stock DDIM, LCM, flow-matching or EDM scheduler; the last
        is -1 (DDPM), 0 (flow) or -inf (EDM; but its scheduler may end at sigma_min). `mu` is the
        resolution shift of schedulers with dynamic shifting.
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
        if self.kind == "edm":
            scheduler.set_timesteps(steps)
            return torch.log(scheduler.sigmas) / 4
        most = scheduler.config[_MOST[self.consistency]]
        if not 1 <= steps <= most:
            raise UserError(f"{steps} steps; this model has 1 to {most}.")
        scheduler.set_timesteps(steps)
        return torch.cat([scheduler.timesteps.cpu(), torch.tensor([-1])])

    def step(self, prediction: Prediction, s: Tensor) -> Tensor:
        """z_s = alpha_s x0 + sigma_s eps: DDIM with eta = 0 (Song et al. 2021, equation 12).

        On a flow schedule this is the Euler step z_t + (sigma_s - sigma_t) velocity, on EDM's the
        one along eps. x0 is limited to `clip` where the model's scheduler does that.
        """
        alpha, sigma = self.alpha_sigma(s, prediction.z_t.dtype)
        z_t, x0 = prediction.z_t, prediction.x0
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        return _match(alpha, z_t) * x0 + _match(sigma, z_t) * prediction.eps
