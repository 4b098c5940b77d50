"""What is said around a run: medians beside the control, warnings, retention; and the estimate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from PIL import Image

from diffkit.cli import main
from diffkit.commands import protect_estimate
from diffkit.commands.protect_estimate import Models, estimate_job
from diffkit.commands.protect_words import closing, hints, measured, opening
from diffkit.errors import UserError
from diffkit.models.cost import parameter_count
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.skeleton import skeleton, skeleton_of
from diffkit.protection.estimate import StepShape, estimate_step
from diffkit.protection.image_file import Header
from diffkit.protection.inputs import Input, Skipped
from diffkit.protection.job import Item, Job, Request, Unit, plan_job
from diffkit.protection.memory import Effort
from diffkit.protection.run import Outcome
from diffkit.protection.settings import Settings
from diffkit.protection.sidecar import Sidecar, publish
from tests.protection.attacks import build_inpaint
from tests.protection.gallery import encoded, noise


def result(path: Path, **values: Any) -> Path:
    """A finished picture whose record has these values."""
    data = path.name.encode()
    blank = dict.fromkeys(("model", "model_revision", "target", "prompt"))
    zero = dict.fromkeys(("steps", "seed", "views", "mean_delta"), 0)
    digests = dict.fromkeys(("input_sha256", "parameter_sha256"), "0")
    found = {"levels": 8, "max_delta": 8.0, "working_sizes": (), **values}
    digests["output_sha256"] = hashlib.sha256(data).hexdigest()
    record = Sidecar("texture", **blank, **zero, **digests, **found)
    publish(path, data, record)
    return path


def effect(gain: float, psnr: float = 30.0) -> dict[str, Any]:
    control = {"psnr": psnr, "lpips": 0.5}
    return {"random_control": control, "encoder_amplification_over_random": gain}


def request_of(folder: Path, method: str = "texture") -> Request:
    return Request((folder,), folder / "out", Settings(method))


def test_medians_beside_the_control(tmp_path: Path) -> None:
    outputs = tuple(
        result(tmp_path / f"{i}.png", psnr=30.0 + i, lpips=0.1 * i, effect=effect(1.0 + i))
        for i in range(4)
    )
    found = measured(outputs)
    assert found["psnr"] == 31.5 and found["lpips"] == pytest.approx(0.15)
    assert found["random"] == {"psnr": 30.0, "lpips": 0.5}
    assert found["over_random"] == {"encoding": {"median": 2.5, "least": 1.0, "unclear": 1}}
    skipped = (Skipped(Path("notes.txt"), "no picture"),)
    said = closing(Outcome(outputs, 3, skipped, {"b.png": "cut off"}), request_of(tmp_path), "m/x")
    text = "\n".join(said)
    assert "skipped notes.txt: no picture" in said and "failed b.png: cut off" in said
    assert f"4 pictures protected in {tmp_path / 'out'}, 3 there already, 1 files skipped" in text
    assert "PSNR 31.5 dB, LPIPS 0.150, at most 8 levels" in text
    assert "random noise of equal budget: PSNR 30.0 dB, LPIPS 0.500" in text
    assert "The encodings of m/x moved 2.5 times as much" in text and "(least 1)" in text
    assert "warning: on 1 of 4 pictures that is not clearly above random noise" in text
    assert "Left after purification: not measured" in text
    assert "protected." not in text.lower().replace("pictures protected in", "")


def test_reports_and_retention_are_told(tmp_path: Path) -> None:
    def entry(ratio: float, clear: bool) -> dict[str, Any]:
        return {"over_random": {"value": ratio, "low": 1.0, "high": 9.0}, "clear": clear}

    outputs = tuple(
        result(
            tmp_path / f"{i}.png",
            psnr=30.0,
            effect=effect(4.0)
            | {"sdedit": {"numbers": {"lpips": entry(2.0 + i, i > 0), "psnr": {"effect": {}}}}},
            purification={
                "jpeg75": {"lpips": {"protected": left, "random": {"value": 0.25}}},
            },
        )
        for i, left in enumerate((None, {"value": 0.4}, {"value": 0.6}))
    )
    text = "\n".join(closing(Outcome(outputs, 0), request_of(tmp_path), "m/x"))
    assert "Edits changed (lpips) 3 times as much as under random noise" in text
    assert "warning: on 1 of 3 pictures" in text and "(psnr)" not in text
    assert "  jpeg75: lpips 50% (25%)" in text.splitlines()


def test_hints_say_what_may_not_be_meant(tmp_path: Path) -> None:
    def unit(*done: bool) -> Unit:
        source = Input(
            tmp_path / "a.png", tmp_path, PurePosixPath("a.png"), Header("PNG", True, (8, 8))
        )
        return Unit(tuple(Item(source, tmp_path / "b.png", "0", "0", None, d) for d in done))

    joint = replace(request_of(tmp_path), settings=Settings("ace"))
    apart = Job((unit(False), unit(False), unit(True)))
    first, second, third = hints(apart, joint, 4, True)
    assert "one surrogate for each of 2 pictures" in first
    assert "4 processes share 2 folders" in second
    assert "1 are there already" in third
    assert hints(Job((unit(False, False),)), joint, 1, False) == ()
    assert hints(apart, request_of(tmp_path), 1, False) == ()


def test_an_unchanged_picture_and_nothing_to_do(tmp_path: Path) -> None:
    same = result(tmp_path / "same.png", max_delta=0.0, effect={"random_control": {}})
    text = "\n".join(closing(Outcome((same,), 0), request_of(tmp_path), "m/x"))
    assert "The pictures are unchanged." in text and "The effect was not measured." in text
    assert closing(Outcome((), 2), request_of(tmp_path), "m/x") == (
        f"0 pictures protected in {tmp_path / 'out'}, 2 there already.",
    )


def test_the_first_line_says_what_protects_nothing(tmp_path: Path) -> None:
    texture, control = request_of(tmp_path), request_of(tmp_path, "random")
    assert opening(texture, "embedded", "cpu", True)[0].startswith("This run protects nothing real")
    assert opening(control, "embedded", "cpu", False)[0].endswith("It protects nothing.")
    said = opening(texture, "owner/name", "cuda", True)
    assert said[0].startswith("method: texture") and "chosen for the device cuda" in said[0]
    assert any("computed against owner/name." in line for line in said)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_a_loaded_models_twin_counts_as_its_skeleton(
    tiny_folder: Callable[[str], Path], name: str
) -> None:
    folder = tiny_folder(name)
    model = LatentDiffusion.load(folder)
    before = {n: [p.data_ptr() for p in net.parameters()] for n, net in model.networks.items()}
    twin, read = skeleton_of(model), skeleton(str(folder))
    assert all(p.is_meta for net in twin.networks.values() for p in net.parameters())
    for shape in (StepShape("none"), StepShape("backward", lean=True)):
        assert estimate_step(twin, 32, 32, shape) == estimate_step(read, 32, 32, shape)
    after = {n: [p.data_ptr() for p in net.parameters()] for n, net in model.networks.items()}
    assert before == after


@pytest.fixture
def photos(tmp_path: Path) -> Request:
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(4):
        picture = Image.fromarray(noise(index, 64, wide=index == 3))
        (folder / f"{index}.png").write_bytes(encoded(picture, "PNG"))
    return Request((folder,), tmp_path / "out", Settings("advdm", steps=10, views=1))


def test_estimates_follow_steps_and_views(photos: Request, tiny_sd: Path) -> None:
    models = Models([], [str(tiny_sd)])
    job = plan_job(photos, None)
    once = estimate_job(job, photos, models, "cpu", torch.float32)
    assert (once.pictures, once.present, once.views, once.largest) == (4, 0, (1, 1), (32, 48))
    more = replace(photos, settings=replace(photos.settings, steps=20))
    twice = estimate_job(plan_job(more, None), more, models, "cpu", torch.float32)
    assert twice.flops == pytest.approx(2 * once.flops, rel=1e-6)
    assert "4 pictures to protect: advdm, at most 8 levels, 10 steps of 1 view" in once.words
    both = replace(photos, settings=replace(photos.settings, views=2))
    detailed = estimate_job(plan_job(both, None), both, models, "cpu", torch.float32)
    assert detailed.views == (2, 2)  # 64 pixels through a model of 32: f = 2
    assert detailed.flops > 1.5 * once.flops


def test_less_memory_is_used_before_it_runs_out(
    photos: Request, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First two passes, then fewer pictures, then a warning that it may not fit."""
    models = Models([], [str(tiny_sd)])
    wide = replace(photos, batch_size=4)
    job = plan_job(wide, None)

    def estimate(free: int | None) -> protect_estimate.JobEstimate:
        monkeypatch.setattr(protect_estimate, "free_memory", lambda device: free)
        return estimate_job(job, wide, models, "cpu", torch.float32)

    plain = estimate(None)
    assert (plain.lean, plain.batch_size, plain.fits, plain.lowered) == (False, 4, True, False)
    assert plain.fitted(wide) == wide
    some = estimate(int(plain.memory_bytes))
    assert some.lean and some.batch_size == 4 and some.fits and some.lowered
    assert "To fit the memory: two passes a step, 4 at once." in some.words
    few = estimate(int(0.6 * some.memory_bytes))
    assert few.lean and few.batch_size < 4 and few.fits
    fitted = few.fitted(wide)
    assert (fitted.lean, fitted.batch_size) == (True, few.batch_size)
    none = estimate(1000)
    assert (none.batch_size, none.fits) == (1, False)
    assert "may be more than the free memory holds" in none.words


def test_memory_is_that_of_all_networks_at_first(
    photos: Request, tiny_folder: Callable[[str], Path]
) -> None:
    """The text encoders were left out, which are on the device until prompts are encoded, and with
    them what a folder holds that is protected together."""
    folder = tiny_folder("sd3")
    (net,) = Models([], [str(folder)]).skeletons()
    sizes = {name: parameter_count(part) for name, part in net.networks.items()}
    count = protect_estimate._Count([net], photos.settings, (32, 32), torch.float32, 0, None)
    assert count.loaded == 4 * sum(sizes.values())
    encoders = sum(parameter_count(part) for part in net.conditioner.encoders.values())
    assert count._aside == 4 * encoders > 0
    step = count.step(False)
    attack = count.loaded - 4 * encoders + step.memory_bytes - step.weight_bytes
    assert count.memory(Effort()) == max(count.loaded, attack)
    here = protect_estimate._Count([net], photos.settings, (32, 32), torch.float32, 0, 1000)
    assert here._aside == 0 and here.memory(Effort()) == attack + 4 * encoders + 1000
    joint = replace(photos, settings=Settings("ace", steps=10, views=1))
    models = Models([], [str(folder)])
    found = estimate_job(plan_job(joint, None), joint, models, "cpu", torch.float32)
    assert found.waiting_bytes == 7 * 3 * 64 * (3 * 64 + 96)
    assert "All pictures of a folder wait in the memory of the CPU" in found.words


def test_an_inpainting_model_needs_a_mask_before_its_weights(
    photos: Request, tiny_sd: Path, tmp_path: Path
) -> None:
    """Every picture by itself was refused, after the model was loaded."""
    source = build_inpaint(tiny_sd, tmp_path / "inpaint")
    request = replace(photos, settings=Settings("diffusionguard", steps=1))
    with pytest.raises(UserError, match="--mask: diffusionguard needs it"):
        estimate_job(
            plan_job(request, None), request, Models([], [str(source)]), "cpu", torch.float32
        )
    output = tmp_path / "out"
    words = ["--model", str(source), "--method", "diffusionguard", "--device", "cpu"]
    assert main(["protect", str(photos.paths[0]), "--output", str(output), *words]) == 2
    assert not output.exists()


def test_a_model_that_cannot_is_refused_without_its_weights(photos: Request, tiny_sd: Path) -> None:
    request = replace(photos, settings=Settings("diffusionguard"))
    with pytest.raises(UserError, match="needs an inpainting model"):
        estimate_job(
            plan_job(request, None), request, Models([], [str(tiny_sd)]), "cpu", torch.float32
        )
