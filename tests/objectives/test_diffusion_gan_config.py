"""Flags of the one-step distillation: what would do nothing is refused, by name."""

from __future__ import annotations

from typing import Any

import pytest

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.diffusion_gan_config import DmdConfig, GanConfig, loss_shares


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discriminator": "none", "gamma": 1.0}, "gan.gamma: would do nothing"),
        ({"discriminator": "none", "loss": "relativistic"}, "gan.loss: would do nothing"),
        ({"discriminator": "none", "start": 3}, "gan.start: would do nothing"),
        ({"discriminator": "ladd", "multiscale": False}, "gan.multiscale"),
        ({"regression": "none", "discriminator": "none"}, "nothing would be learnt"),
        ({"regression": "none", "start": 2}, "gan.start"),
        ({"regression": "none", "share": 0.2}, "gan.share"),
        ({"share": 0.2, "weight": 1.0}, "gan.share: the weight is fixed"),
        ({"huber": 0.1}, "gan.huber"),
        ({"latent_lpips": "x"}, "gan.latent_lpips"),
        ({"augmentation": "b"}, "gan.augmentation"),
        ({"r1": "none", "r1_every": 4}, "gan.r1_every"),
        ({"r1": "exact", "r1_sigma": 0.2}, "gan.r1_sigma"),
        ({"mismatch": 1.0}, "gan.mismatch"),
        ({"pictures": True}, "gan.pictures"),
        ({"pictures": True, "regression": "none", "r1": "exact"}, "gan.r1"),
        ({"pictures": True, "regression": "none", "noise_input": True}, "gan.noise_input"),
    ],
)
def test_what_would_do_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GanConfig(**({"regression": "mse"} | options)).check()


def test_dmd_flags_without_dmd() -> None:
    with pytest.raises(UserError, match=r"dmd.updates: would do nothing"):
        DmdConfig(updates=2).check(GanConfig())
    with pytest.raises(UserError, match=r"dmd.share"):
        DmdConfig(share=2.0).check(GanConfig(regression="none", dmd=True))
    shares = loss_shares(GanConfig(dmd=True), DmdConfig(weight=3.0))
    assert list(shares) == ["regression", "dmd", "adversarial"]
    assert (shares["dmd"].weight, shares["adversarial"].share) == (3.0, 0.25)


def test_defaults_go_by_the_discriminator_and_what_it_is_told(tiny_folder: Any) -> None:
    """Second derivatives of a transformer's attention keep the maps of all its many tokens. A
    discriminator that is told nothing cannot tell true latents from true ones."""

    def resolved(name: str, **options: Any) -> GanConfig:
        return GanConfig(regression="mse", **options).resolve(LatentDiffusion.load(folder(name)))

    folder = tiny_folder
    sd3, unet, pixel = resolved("sd3"), resolved("sd"), resolved("latent")
    assert (sd3.discriminator, sd3.r1, sd3.r1_every, sd3.mismatch) == (
        "ladd", "approximate", 1, 0.25
    )  # fmt: skip
    assert (unet.discriminator, unet.r1, unet.r1_every) == ("unet", "exact", 16)
    assert resolved("sd", discriminator="ladd", r1_sigma=0.2).r1_sigma == 0.2
    with pytest.raises(UserError, match=r"gan.r1_sigma: would do nothing"):
        resolved("sd", r1_sigma=0.2)
    assert pixel.mismatch == 0
    with pytest.raises(UserError, match="both true and made"):
        resolved("latent", mismatch=0.25)
    scales = [DmdConfig().scale(LatentDiffusion.load(folder(n))) for n in ("sd", "sdxl", "flux")]
    assert scales == [1.75, 8.0, 1.0]
