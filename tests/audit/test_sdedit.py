"""SDEdit's grid and its noise, against the stock pipelines, and effects on real tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from diffkit.audit.distances import Ruler
from diffkit.audit.effects import sdedit_effects
from diffkit.audit.sdedit import Edit, Editor, edit_noise
from diffkit.audit.subjects import Subject, picture_key, working_views
from diffkit.errors import UserError
from diffkit.evaluation.pictures import to_float
from diffkit.models.conditioner import Sizes
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.protect import plan_for
from diffkit.protection.settings import Settings
from diffkit.randomness import integers

SIZES = Sizes((32, 32), (0, 0), (32, 32))


def pictures(count: int = 2, side: int = 32) -> list[torch.Tensor]:
    return [integers(0, 256, (3, side, side), i, "picture").to(torch.uint8) for i in range(count)]


def test_strength_counts_steps_of_the_grid() -> None:
    runs = {s: Edit(s).run for s in (0.01, 0.05, 0.1, 0.2, 0.29, 0.3, 1)}
    assert runs == {0.01: 1, 0.05: 5, 0.1: 10, 0.2: 20, 0.29: 29, 0.3: 30, 1: 100}
    assert Edit(0.3, 50, 7.5).run == 15
    with pytest.raises(UserError, match="51 steps or more"):
        Edit(0.01, 10)
    with pytest.raises(UserError, match="at most 1"):
        Edit(1.5)
    assert Edit(0.01, 51).run == 1


def test_it_is_the_stock_pipeline_with_ddim(tiny_sd: Path) -> None:
    """Same noise, mean encoding, no guidance: the same picture as diffusers' img2img."""
    model = LatentDiffusion.load(tiny_sd)
    image = to_float(pictures(1)[0])[None]
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    own = Editor(model, "a")(image, noise, Edit(0.3, 10), [SIZES])
    pipeline = StableDiffusionImg2ImgPipeline(
        **{k: v for k, v in model.pipeline().components.items() if k != "image_encoder"},
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    start = model.schedule.sampling_timesteps(10)[-4]
    noised = model.schedule.add_noise(model.codec.encode(image), noise, start[None])
    pipeline.prepare_latents = lambda *a, **k: noised
    stock = pipeline(
        "a", image=image, strength=0.3, num_inference_steps=10, guidance_scale=1, output_type="pt"
    ).images
    assert torch.allclose((own / 2 + 0.5).clamp(0, 1), stock, atol=1e-5)


@pytest.mark.parametrize("name", ["sd", "sd-v", "sd3", "flux", "sdxl-edm"])
def test_the_exact_denoiser_gives_the_picture_back(
    name: str, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that knows eps undoes the noise at every strength, on every kind of schedule."""
    model = LatentDiffusion.load(tiny_folder(name))
    prompt = model.conditioner.example
    editor = Editor(model, prompt)
    size = model.default_size
    image = to_float(pictures(1, size)[0])[None]
    z_0 = model.codec.encode(image)
    noise = edit_noise(z_0.shape[1:], "picture", 3)[None]
    schedule = model.schedule

    def exact(z_t: torch.Tensor, t: torch.Tensor, *rest: object) -> object:
        return schedule.prediction(schedule.target(z_0, noise, t), z_t, t)

    monkeypatch.setattr(model.denoiser, "predict", exact)
    sizes = [Sizes((size, size), (0, 0), (size, size))]
    mu = schedule.mu(model.denoiser.tokens(*z_0.shape[-2:])) if name == "flux" else None
    # the last DDIM time keeps a trace of noise where the final alpha is not one
    end = schedule.sampling_timesteps(10, mu)[-1:]
    whole = model.codec.decode(schedule.add_noise(z_0, noise, end))
    for strength in (0.1, 0.6):
        edited = editor(image, noise, Edit(strength, 10), sizes)
        assert torch.allclose(edited, whole, atol=1e-3)


def test_equal_pictures_have_no_effect_and_noise_has_one(tiny_sd: Path) -> None:
    model = LatentDiffusion.load(tiny_sd)
    clean = pictures()
    grain = [(c.int() + 8 * (integers(0, 2, c.shape, 9, "g") * 2 - 1)).clamp(0, 255).byte()
             for c in clean]  # fmt: skip
    found = sdedit_effects(
        model, clean, {"same": clean, "grain": grain}, (0.2, 0.5), (0, 1), "a", steps=10
    )
    for values in (found["same"], found["grain"]):
        assert {"ssim", "latent_l2", "feature_distance", "psnr"} <= values.effect.keys()
        assert "ms_ssim" not in values.effect
        assert all(v.shape == (2, 2, 2) for v in values.effect.values())
    assert float(found["same"].effect["ssim"].abs().max()) < 1e-12
    assert float(found["same"].effect["latent_l2"].max()) == 0
    assert float(found["grain"].effect["latent_l2"].min()) > 0
    for name, value in found["same"].vs_original.items():
        assert torch.equal(value, found["same"].clean_vs_original[name])


def test_noise_belongs_to_the_clean_picture_and_the_seed(tiny_sd: Path) -> None:
    model = LatentDiffusion.load(tiny_sd)
    first, second = (Subject(p, model) for p in pictures())
    view = first.views[0]
    image = first.clean[0]
    assert torch.equal(first.noise(view, image, 1), first.noise(view, image, 1))
    assert not torch.equal(first.noise(view, image, 1), first.noise(view, image, 2))
    assert not torch.equal(first.noise(view, image, 1), second.noise(view, image, 1))
    assert picture_key(first.pixels) != picture_key(second.pixels)


def test_long_and_grey_pictures_are_seen_in_windows(tiny_sd: Path) -> None:
    model = LatentDiffusion.load(tiny_sd)
    grey = integers(0, 256, (1, 40, 130), 5, "grey").to(torch.uint8)
    subject = Subject(grey, model)
    assert len(subject.views) > 1
    found = sdedit_effects(model, [grey], {"same": [grey]}, (0.5,), (0,), "a", steps=2)
    assert found["same"].effect["ssim"].shape == (1, 1, 1)
    with pytest.raises(UserError, match="cannot be paired"):
        subject.working(grey[:, :20])


def test_distances_left_out_are_named(tiny_sd: Path) -> None:
    ruler = Ruler(LatentDiffusion.load(tiny_sd), lpips="alex:/nowhere.pth")
    assert "lpips" in ruler.skipped
    assert "lpips" not in ruler.names(200, 200) and "ms_ssim" in ruler.names(200, 200)
    assert "ms_ssim" not in ruler.names(64, 64)


@pytest.mark.parametrize("size", [(32, 32), (33, 41), (40, 72), (32, 34), (20, 50)])
def test_an_audit_sees_what_the_attack_saw(tiny_sd: Path, size: tuple[int, int]) -> None:
    """It rounded sides to the autoencoder's multiple and the attack to the denoiser's, so that the
    effect of a protection was measured through another resampling than it was made for."""
    model = LatentDiffusion.load(tiny_sd)
    attack = plan_for(model, Settings("texture", views=1), *size)
    assert working_views(model, *size) == list(attack.whole)
