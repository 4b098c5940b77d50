"""Values of preference optimisation: what follows from them, and which cannot be."""

from __future__ import annotations

import math

import pytest

from diffkit.errors import UserError
from diffkit.objectives.adaptive_dpo import AdaptiveConfig
from diffkit.objectives.preference_config import PreferenceConfig


def test_kappa_goes_by_the_size_of_the_latents():
    """2500 for 4 x 64 x 64 and above; 2500 / 8 for 2048 numbers, where 2500 settled every pair in
    the first steps (gradients of a norm of 5654); what is given stays."""
    usual = PreferenceConfig()
    assert [usual.resolved(n).kappa for n in (2048, 16384, 65536)] == [312.5, 2500.0, 2500.0]
    assert PreferenceConfig(kappa=7.0).resolved(2048).kappa == 7.0
    assert PreferenceConfig(loss="simpo").resolved(2048).kappa is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": "cdpo"}, "preference.flip_rate: cdpo needs the share of wrong labels"),
        ({"flip_rate": 0.2}, "preference.flip_rate: dpo reckons with no wrong labels"),
        ({"loss": "rdpo", "flip_rate": 0.5}, r"flip_rate: 0.5 is not in \[0, 0.5\)"),
        ({"ipo_beta": 10.0}, "preference.ipo_beta: is not for dpo"),
        ({"kappa": 0.0}, "preference.kappa: 0.0 must be above 0"),
        ({"kappa": math.nan}, "preference.kappa: nan must be a finite number"),
        ({"pixel": "dpo", "pixel_weight": math.inf}, "preference.pixel_weight: inf must be"),
        ({"anchor": -1.0}, "preference.anchor: -1.0 must not be negative"),
        ({"drift_limit": 1.0}, "preference.drift_limit: 1.0 must be above 1"),
        ({"timesteps": (5, 5)}, "preference.timesteps: names a time twice"),
        ({"pixel_weight": 1.0}, "preference.pixel_weight: no picture is decoded"),
        ({"pixel_relative": True}, "preference.pixel_relative: no picture is decoded"),
        ({"loss": "simpo", "pixel": "dpo"}, "preference.pixel: dpo compares with a reference"),
        ({"loss": "adaptive_dpo", "pixel": "dpo"}, "preference.pixel: adaptive_dpo judges pairs"),
        ({"sdpo": True, "pixel": "dpo"}, "preference.sdpo: holds the winner's latent error"),
    ],
)
def test_values_that_cannot_be(values, message):
    with pytest.raises(UserError, match=message):
        PreferenceConfig(**values).check()


def test_numbers_of_the_annotators_are_finite():
    with pytest.raises(UserError, match="adaptive.slope: inf must be a finite number"):
        AdaptiveConfig(slope=math.inf).check()
