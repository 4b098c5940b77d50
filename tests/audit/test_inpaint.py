"""Inpainting as a threat: what is painted, what is kept, and where it is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffkit.audit.distances import Ruler
from diffkit.audit.edits import InpaintThreat, Measurer, SdeditThreat
from diffkit.audit.inpaint import Inpainter, Region, inpaint_versions
from diffkit.audit.measures import CLEAN, CONTROL, PROTECTED
from diffkit.audit.purifiers.base import Models
from diffkit.audit.purifiers.registry import parse_purifiers
from diffkit.audit.sdedit import Edit
from diffkit.audit.subjects import Subject
from diffkit.errors import RunFailed, UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from tests.audit.pictures import build_inpainting, pixels, protected


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_inpainting(tmp_path_factory.mktemp("inpainting"))


def mask(height: int = 64, width: int = 64) -> torch.Tensor:
    found = torch.zeros(1, height, width)
    found[:, 4:20, 20:40] = 1
    return found


def test_the_box_lies_on_the_grid_and_is_wide_enough_to_be_measured() -> None:
    region = Region.of(mask()[None], 4)
    assert region is not None
    assert region.box == (slice(0, 32), slice(12, 48))
    assert Region.of(torch.zeros(1, 1, 64, 64), 4) is None
    whole = Region.of(torch.ones(1, 1, 32, 32), 4)
    assert whole is not None and whole.box == (slice(0, 32), slice(0, 32))


@pytest.mark.parametrize("kind", ["plain", "inpainting"])
def test_outside_the_mask_every_result_is_the_clean_picture(
    kind: str, tiny_sd: Path, inpainting: Path
) -> None:
    model = LatentDiffusion.load(tiny_sd if kind == "plain" else inpainting)
    clean = pixels(0, 32, 32)
    subject = Subject(clean, model)
    where = torch.zeros(1, 32, 32)
    where[:, 8:24, 8:24] = 1
    versions = {CLEAN: clean, PROTECTED: protected(clean)}
    painter = Inpainter(model, "a")
    made, regions = inpaint_versions(painter, subject, where, versions, (0, 1), 3, 2.0)
    assert list(regions) == [0]
    for name in versions:
        found = made[name][0]
        assert found.shape == (2, 3, 32, 32)
        kept = where.expand(3, -1, -1) == 0
        assert all(torch.equal(row[kept], clean[kept]) for row in found)
        assert not torch.equal(found[0], found[1])  # two seeds paint two things
    assert not torch.equal(made[CLEAN][0], made[PROTECTED][0])  # the kept part is a condition
    again, _ = inpaint_versions(painter, subject, where, {CLEAN: clean}, (0, 1), 3, 2.0)
    assert torch.equal(again[CLEAN][0], made[CLEAN][0])


def test_a_painter_of_everything_is_a_plain_sampler(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all of the picture painted nothing is put back: DDIM steps from pure noise."""
    model = LatentDiffusion.load(tiny_sd)
    subject = Subject(pixels(), model)
    image = subject.clean[0]
    noise = subject.noise(subject.views[0], image, 0)[None]
    z_0, schedule = model.codec.encode(image).detach(), model.schedule
    painter = Inpainter(model, "a")

    def exact(z_t: torch.Tensor, t: torch.Tensor, *rest: object) -> object:
        return schedule.prediction(schedule.target(z_0, noise, t), z_t, t)

    monkeypatch.setattr(painter, "_predict", exact)
    where = torch.ones(1, 1, 32, 32)
    found = painter(image, where, noise, [subject.views[0].sizes(32, 32)], 4)
    z_t, times = noise * schedule.init_noise_sigma, schedule.sampling_timesteps(4)
    for t, s in zip(times[:-1], times[1:]):
        z_t = schedule.step(exact(z_t, t[None]), s)
    assert torch.allclose(found, model.codec.decode(z_t).float(), atol=1e-4)


def test_effects_are_measured_inside_the_box_alone(tiny_sd: Path) -> None:
    model = LatentDiffusion.load(tiny_sd)
    clean = pixels(1, 32, 32)
    versions = {CLEAN: clean, PROTECTED: protected(clean), CONTROL: clean.clone()}
    where = torch.zeros(1, 32, 32)
    where[:, 8:24, 8:24] = 1
    measure = Measurer(model, Ruler(model))
    threat = InpaintThreat(steps=3, guidance=2.0)
    result = measure(threat, Subject(clean, model), versions, (0, 1), "a", where)
    assert float(result.measured[PROTECTED].effect["latent_l2"].min()) > 0
    assert float(result.measured[CONTROL].effect["latent_l2"].max()) == 0
    assert result.shown[PROTECTED].shape == (3, 32, 32)


def test_a_mask_that_vanishes_is_refused(tiny_sd: Path) -> None:
    model = LatentDiffusion.load(tiny_sd)
    subject = Subject(pixels(), model)
    with pytest.raises(RunFailed, match="no white pixel"):
        inpaint_versions(
            Inpainter(model, "a"), subject, torch.zeros(1, 32, 32), {CLEAN: pixels()}, (0,), 2, 1.0
        )


def test_sdedit_and_inpainting_models_do_not_go_together(inpainting: Path, tiny_sd: Path) -> None:
    """It crashed at the first convolution: an inpainting denoiser takes 2C + 1 channels."""
    model = LatentDiffusion.load(inpainting)
    for threat in (SdeditThreat(Edit(0.3)), SdeditThreat(Edit(0.3, 50, 7.5))):
        reason = threat.refusal(model)
        assert reason is not None and reason.endswith("use --threats inpaint with --mask")
        assert threat.refusal(LatentDiffusion.load(tiny_sd)) is None
    assert InpaintThreat().refusal(model) is None
    with pytest.raises(UserError, match="--purify sdedit: this model's denoiser takes a mask"):
        parse_purifiers("sdedit0.2", Models(model))[0].prepare()
