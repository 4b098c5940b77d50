"""Every sampler by name, on models of its kind; the model's noise schedule is never lost."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from diffkit.errors import UserError
from diffkit.generation.schedulers import SCHEDULERS, scheduler_names, swap_scheduler

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def zero_snr() -> DDIMScheduler:
    return DDIMScheduler(
        **BETAS,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )


@pytest.mark.parametrize("name", scheduler_names("ddpm"))
def test_a_swap_keeps_the_noise_schedule(name: str) -> None:
    own = DDIMScheduler(**BETAS, prediction_type="v_prediction", timestep_spacing="trailing")
    new = swap_scheduler(own, name, "ddpm", "v_prediction")
    assert type(new).__name__ == SCHEDULERS[name].class_name
    assert new.config.prediction_type == "v_prediction"
    assert new.config.timestep_spacing == "trailing"
    assert torch.allclose(new.alphas_cumprod, own.alphas_cumprod)


@pytest.mark.parametrize("name", scheduler_names("ddpm"))
def test_zero_terminal_snr_is_kept_or_the_swap_is_refused(name: str) -> None:
    if name in ("heun", "pndm"):
        with pytest.raises(UserError, match=f"{name}: does not know rescale_betas_zero_snr"):
            swap_scheduler(zero_snr(), name, "ddpm", "v_prediction")
        return
    new = swap_scheduler(zero_snr(), name, "ddpm", "v_prediction")
    assert new.config.rescale_betas_zero_snr
    assert new.config.timestep_spacing == "trailing"
    assert new.alphas_cumprod[-1] < 1e-6
    new.set_timesteps(5)
    assert new.timesteps[0] == 999


@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm"])
def test_latents_are_not_clipped_by_a_class_default(name: str) -> None:
    """DDIM and DDPM clip x0 to [-1, 1] unless told; an Euler config has no word on it."""
    own = EulerDiscreteScheduler(**BETAS)
    assert swap_scheduler(own, name, "ddpm", "epsilon").config.clip_sample is False


@pytest.mark.parametrize("name", scheduler_names("flow"))
def test_the_flow_shift_is_kept(name: str) -> None:
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    new = swap_scheduler(own, name, "flow", "velocity")
    assert new.config.get("flow_shift", new.config.get("shift")) == 3.0


def test_names_of_the_other_kind_and_unknown_ones_are_refused() -> None:
    flow = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="ddim: not for a flow-matching model.*flow-euler"):
        swap_scheduler(flow, "ddim", "flow", "velocity")
    with pytest.raises(UserError, match="flow-euler: not for a DDPM-type model"):
        swap_scheduler(zero_snr(), "flow-euler", "ddpm", "v_prediction")
    with pytest.raises(UserError, match="dpmpp: unknown"):
        swap_scheduler(zero_snr(), "dpmpp", "ddpm", "v_prediction")
    with pytest.raises(UserError, match="cannot start from a picture"):
        swap_scheduler(flow, "flow-unipc", "flow", "velocity", from_noise=False)
    with pytest.raises(UserError, match="no sample prediction"):
        swap_scheduler(zero_snr(), "euler-a", "ddpm", "sample")
