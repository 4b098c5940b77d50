"""The schedule: conversions, singular ends, and agreement with diffusers' own schedulers."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffkit.errors import UserError
from diffkit.models.schedule import Prediction, Schedule, _noise_gain, convert
from diffkit.randomness import normal

KINDS = ("epsilon", "sample", "v_prediction", "velocity", "edm", "edm_v")
# (alpha, sigma) of a DDPM table, a flow, and an EDM-like schedule with alpha = 1.
COEFFICIENTS = ((0.8, 0.6), (0.3, 0.7), (1.0, 14.6))


def ddim(prediction_type="epsilon", **config):
    options = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(prediction_type=prediction_type, **(options | config))


@pytest.mark.parametrize(("source", "target"), itertools.product(KINDS, KINDS))
@pytest.mark.parametrize(("alpha", "sigma"), COEFFICIENTS)
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_every_ordered_pair_of_parametrisations(source, target, alpha, sigma, sigma_data):
    """Converting equals computing the target from the known x0 and eps, to 1e-10 in float64."""
    x0, eps = normal((3, 2, 4, 4), 1, "x0").double(), normal((3, 2, 4, 4), 1, "eps").double()
    a, s = torch.full((3,), alpha).double(), torch.full((3,), sigma).double()
    alpha, sigma = a[0], s[0]
    z_t = alpha * x0 + sigma * eps
    # EDM's definition of F at the noise level sigma / alpha: D = x0 = c_skip z + c_out F.
    level = sigma / alpha
    c_skip = sigma_data**2 / (level**2 + sigma_data**2)
    c_out = level * sigma_data / (level**2 + sigma_data**2).sqrt()
    inner = (x0 - c_skip * z_t / alpha) / c_out
    known = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "velocity": eps - x0,
        "edm": inner,
        "edm_v": -inner,
    }
    found = convert(known[source], source, target, z_t, a, s, sigma_data)
    assert found.dtype == torch.float64
    assert (found - known[target]).abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("alpha", "sigma"), [(0.0, 1.0), (1.0, 0.0)])
def test_singular_ends_stay_finite_and_say_what_is_known(kind, alpha, sigma):
    """At alpha = 0 or sigma = 0: the undetermined part is zero, the determined one exact."""
    x0, eps = torch.full((1, 2), 3.0), torch.full((1, 2), -2.0)
    z_t = alpha * x0 + sigma * eps
    a, s = torch.tensor([alpha]), torch.tensor([sigma])
    truth = Prediction(z_t, a[:, None], s[:, None], x0, eps)
    found = Prediction.from_output(kind, truth.as_output(kind), z_t, a, s)
    unknown_x0 = kind == "epsilon" and alpha == 0
    unknown_eps = kind == "sample" and sigma == 0
    assert torch.equal(found.x0, torch.zeros_like(x0) if unknown_x0 else x0)
    assert torch.equal(found.eps, torch.zeros_like(eps) if unknown_eps else eps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("alpha", "sigma"), [*COEFFICIENTS, (0.0, 1.0), (1.0, 0.0)])
def test_noise_gain_says_what_an_output_does_to_the_predicted_noise(kind, alpha, sigma):
    """sigma (eps_th - eps) = g (output - target), with eps_th read by `Prediction`; float64."""
    x0, eps = normal((3, 8), 1, "x0").double(), normal((3, 8), 1, "eps").double()
    a, s = torch.full((3,), alpha, dtype=x0.dtype), torch.full((3,), sigma, dtype=x0.dtype)
    truth = Prediction(alpha * x0 + sigma * eps, a[:, None], s[:, None], x0, eps)
    target = truth.as_output(kind)
    output = target + normal((3, 8), 1, "error")
    found = Prediction.from_output(kind, output, truth.z_t, a, s)
    expected = sigma * (found.eps - eps)
    if kind == "sample" and sigma == 0:
        # The noise is unknown there; what is known is that alpha x0 + sigma eps keeps to z_t.
        expected = -(found.x0 - x0)
    gain = _noise_gain(kind, a, s, 0.5)[:, None]
    assert (gain * (output - target) - expected).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("prediction_type", "weight"),
    [
        ("epsilon", lambda alpha, sigma: sigma**2),
        ("v_prediction", lambda alpha, sigma: (alpha * sigma) ** 2),
        ("sample", lambda alpha, sigma: alpha**2),
    ],
)
def test_noise_delta_of_ddpm_weighs_as_derived(prediction_type, weight):
    """|delta|^2 over |output - target|^2: 1 - ab, ab (1 - ab), ab; pure noise included."""
    schedule = Schedule.from_scheduler(ddim(prediction_type, rescale_betas_zero_snr=True))
    t = torch.tensor([0, 400, 999])
    target, output = normal((3, 4, 2, 2), 1, "y").double(), normal((3, 4, 2, 2), 1, "o").double()
    delta = schedule.noise_delta(output, target, t)
    ratio = delta.square().sum((1, 2, 3)) / (output - target).square().sum((1, 2, 3))
    assert torch.allclose(ratio, weight(*schedule.alpha_sigma(t, torch.float64)), rtol=1e-12)
    assert torch.equal(schedule.noise_delta(target, target, t), torch.zeros_like(target))


def test_noise_delta_of_a_flow_is_the_same_in_both_conventions():
    """t (1 - t) (v_th - v); where t = 1 is the data and v = z - eps, with the other sign."""
    schedule = Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    t = torch.tensor([0.0, 300.0, 1000.0]).double()
    target, output = normal((3, 4), 1, "v").double(), normal((3, 4), 1, "o").double()
    found = schedule.noise_delta(output, target, t)
    share = (t / 1000)[:, None]
    assert torch.allclose(found, share * (1 - share) * (output - target), rtol=1e-12)
    backwards = 1 - share  # the time of the other convention
    other = -backwards * (1 - backwards) * ((-output) - (-target))
    assert torch.allclose(found, other, rtol=1e-12)


def test_half_precision_outputs_are_read_in_float32():
    schedule = Schedule.from_scheduler(ddim())
    z_t = normal((2, 4, 4, 4), 0, "z")
    prediction = schedule.prediction(z_t.bfloat16(), z_t.bfloat16(), torch.tensor([10, 900]))
    assert {prediction.x0.dtype, prediction.v.dtype, prediction.velocity.dtype} == {torch.float32}


def test_unknown_prediction_type_is_refused_by_name():
    with pytest.raises(UserError, match="'score'"):
        Schedule("ddpm", "score", 10, None)


# Where eps-prediction starts from alpha = 0 diffusers divides by zero; that case is not compared.
@pytest.mark.parametrize(
    ("prediction_type", "zero_snr", "spacing"),
    [
        case
        for case in itertools.product(
            ("epsilon", "sample", "v_prediction"), (False, True), ("leading", "trailing")
        )
        if case != ("epsilon", True, "trailing")
    ],
)
@pytest.mark.parametrize("steps", [4, 25])
def test_ddim_steps_equal_diffusers(prediction_type, zero_snr, spacing, steps):
    """Every z along the way equals DDIMScheduler's for the same network outputs."""
    stock = ddim(prediction_type, rescale_betas_zero_snr=zero_snr, timestep_spacing=spacing)
    schedule = Schedule.from_scheduler(stock)
    assert schedule.zero_terminal_snr == zero_snr
    stock.set_timesteps(steps)
    times = schedule.sampling_timesteps(steps)
    assert torch.equal(times[:-1], stock.timesteps)
    ours = theirs = normal((2, 4, 8, 8), 3, "start")
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        output = normal((2, 4, 8, 8), 3, "output", i) + 0.1 * theirs
        theirs = stock.step(output, t, theirs, eta=0.0).prev_sample
        ours = schedule.step(schedule.prediction(output, ours, t.expand(2)), s)
        assert torch.allclose(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [3, 28])
def test_flow_steps_equal_diffusers(shift, steps):
    stock = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = Schedule.from_scheduler(stock)
    stock.set_timesteps(steps)
    times = schedule.sampling_timesteps(steps)
    assert torch.allclose(times[:-1], stock.timesteps)
    ours = theirs = normal((2, 4, 8, 8), 4, "start")
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        output = normal((2, 4, 8, 8), 4, "output", i)
        theirs = stock.step(output, stock.timesteps[i], theirs).prev_sample
        ours = schedule.step(schedule.prediction(output, ours, t.expand(2)), s)
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_targets_equal_ddpm(prediction_type):
    stock = DDPMScheduler(prediction_type=prediction_type)
    schedule = Schedule.from_scheduler(stock)
    z0, eps = normal((3, 4, 4, 4), 5, "z0"), normal((3, 4, 4, 4), 5, "eps")
    t = torch.tensor([0, 500, 999])
    assert torch.allclose(schedule.add_noise(z0, eps, t), stock.add_noise(z0, eps, t), atol=1e-6)
    theirs = eps if prediction_type == "epsilon" else stock.get_velocity(z0, eps, t)
    assert torch.allclose(schedule.target(z0, eps, t), theirs, atol=1e-6)


def test_tables_do_not_depend_on_which_scheduler_the_folder_names():
    """EulerDiscrete nudges the last alpha off zero for its own division; the model has it at 0."""
    euler = EulerDiscreteScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    schedule = Schedule.from_scheduler(euler)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([999, -1]))
    assert alpha[0] == 0 and sigma[0] == 1
    assert alpha[1] == 1 and sigma[1] == 0


def test_train_timesteps_invert_the_density():
    ddpm = Schedule.from_scheduler(ddim())
    t = ddpm.train_timesteps(torch.tensor([0.0, 0.5, 1 - 1e-9]))
    assert t.tolist() == [0, 500, 999]
    with pytest.raises(UserError, match="logit_normal"):
        ddpm.train_timesteps(torch.tensor([0.5]), density="logit_normal")
    flow = Schedule.from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    # u = 1/2: s = 1/2 for both densities, shift(1/2) = 1.5 / 2 = 3/4.
    for density in ("uniform", "logit_normal"):
        assert flow.train_timesteps(torch.tensor([0.5]), density=density).item() == 750.0
    u = torch.linspace(0, 1 - 1e-7, 101)
    assert ((times := flow.train_timesteps(u)) > 0).all() and (times <= 1000).all()


class GaussianDenoiser:
    """The exact denoiser of data N(mean, covariance).

    E[x0 | z_t] = mean + alpha C (alpha^2 C + sigma^2 I)^-1 (z_t - alpha mean).
    """

    def __init__(self, schedule, mean, covariance):
        self.schedule, self.mean, self.covariance = schedule, mean, covariance

    def output(self, z_t, t):
        alpha, sigma = self.schedule.alpha_sigma(t, torch.float64)
        noisy = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean)).double()
        gain = alpha * self.covariance @ torch.linalg.inv(noisy)
        x0 = self.mean + (z_t - alpha * self.mean) @ gain.T
        kind = self.schedule.prediction_type
        levels = alpha.expand(len(z_t)), sigma.expand(len(z_t))
        return convert(x0, "sample", kind, z_t, *levels, self.schedule.sigma_data)


@pytest.mark.parametrize(
    "scheduler",
    [
        ddim("v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        ddim("sample", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        FlowMatchEulerDiscreteScheduler(shift=1.0),
        EDMEulerScheduler(sigma_data=0.8),
        EDMEulerScheduler(prediction_type="v_prediction", sigma_schedule="exponential"),
    ],
)
def test_sampling_reproduces_the_mean_and_covariance_of_gaussian_data(scheduler):
    schedule = Schedule.from_scheduler(scheduler)
    mean = torch.tensor([1.0, -2.0]).double()
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.8]]).double()
    denoiser = GaussianDenoiser(schedule, mean, covariance)
    # Antithetic whitened draws have mean 0 and covariance I exactly.
    half = normal((2000, 2), 6, "start").double()
    z = torch.cat([half, -half])
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / len(z))).T
    z = schedule.init_noise_sigma * z
    for t, s in itertools.pairwise(schedule.sampling_timesteps(300)):
        prediction = schedule.prediction(denoiser.output(z, t), z, t)
        z = schedule.step(prediction, s)
    assert torch.allclose(z.mean(0), mean, atol=0.02)
    assert torch.allclose(torch.cov(z.T), covariance, atol=0.02)
