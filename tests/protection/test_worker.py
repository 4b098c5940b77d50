"""Doing pictures: budgets that LPIPS limits, masks, batches, memory that runs out, and bad luck."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffkit.errors import RunFailed, UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.image_file import open_picture
from diffkit.protection.image_pixels import Unreadable
from diffkit.protection.job import Request, plan_job
from diffkit.protection.protect import ProtectionResult
from diffkit.protection.record import Finished, Recorder, _or_none
from diffkit.protection.settings import Settings
from diffkit.protection.sidecar import read_sidecar
from diffkit.protection.worker import Worker, largest_passing, read_mask
from tests.protection.gallery import encoded, noise

Loader = Callable[[str], LatentDiffusion]


@pytest.fixture
def model(tiny_model: Loader) -> LatentDiffusion:
    return tiny_model("sd")


@pytest.fixture
def request_of(tmp_path: Path) -> Request:
    """Three pictures of 32 pixels, a larger one in their midst, and one with alpha."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(5):
        pixels = noise(index, 48 if index == 1 else 32, 4 if index == 4 else 3)
        (folder / f"{index}.png").write_bytes(encoded(Image.fromarray(pixels), "PNG"))
    return Request((folder,), tmp_path / "out", Settings("texture", steps=2))


def work(request: Request, model: LatentDiffusion | None, **options: Any) -> Worker:
    """A worker that has done the whole job."""
    worker = Worker(request, model, **options)
    worker.run(plan_job(request, {}).pending)
    return worker


def outputs(worker: Worker) -> dict[str, Tensor]:
    return {path.name: open_picture(path).pixels for path in worker.made}


@contextmanager
def room_for(model: LatentDiffusion, pictures: int) -> Iterator[list[int]]:
    """The encoder runs out of memory on more pictures; yields how many each other call had."""
    passed: list[int] = []

    def check(module: nn.Module, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        if len(x) > pictures:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        passed.append(len(x))

    first = model.codec.vae.encoder.conv_in
    handle = first.register_forward_pre_hook(check)
    try:
        yield passed
    finally:
        handle.remove()


def test_batches_hold_pictures_of_one_kind_and_change_no_draw(
    request_of: Request, model: LatentDiffusion, tmp_path: Path
) -> None:
    alone = outputs(work(request_of, model))
    ticks: list[int] = []
    together = replace(request_of, output=tmp_path / "batched", batch_size=3)
    with room_for(model, 99) as batches:
        worker = work(together, model, each=ticks.append)
    assert sorted(path.name for path in worker.made) == [f"{i}.png" for i in range(5)]
    # 0, 2 and 3 are equal in kind; 1 is larger and 4 has an alpha channel.
    assert ticks == [3, 3, 1, 1, 1, 1]
    assert max(batches) == 3
    for name, pixels in outputs(worker).items():
        assert (pixels == alone[name]).float().mean() >= 0.99


def test_memory_runs_out_and_the_work_goes_on(
    request_of: Request,
    model: LatentDiffusion,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Room for three pictures: four at once fail plainly and in two passes, then go in twos."""
    for index in range(4):
        picture = Image.fromarray(noise(index, 32))
        (request_of.paths[0] / f"{index}.png").write_bytes(encoded(picture, "PNG"))
    plain = outputs(work(request_of, model))
    tight = replace(request_of, output=tmp_path / "tight", batch_size=4)
    # The measures of a finished picture encode three versions of it, without a graph.
    with room_for(model, 3):
        worker = work(tight, model)
    assert worker.failed == {} and len(worker.made) == 5
    assert worker.effort.batch_size == 2 and worker.effort.lean
    said = capsys.readouterr().err
    assert "out of memory with 4 at once; going on in two passes" in said
    for name, pixels in outputs(worker).items():
        assert (pixels == plain[name]).float().mean() >= 0.99


def test_what_never_fits_is_named_and_the_rest_is_done(
    request_of: Request, model: LatentDiffusion
) -> None:
    first = model.codec.vae.encoder.conv_in

    def check(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if inputs[0].shape[-1] * inputs[0].shape[-2] > 32 * 32:
            raise torch.OutOfMemoryError("CUDA out of memory")

    wide = request_of.paths[0] / "4.png"
    wide.write_bytes(encoded(Image.fromarray(noise(4, 32, 3, wide=True)), "PNG"))
    handle = first.register_forward_pre_hook(check)
    try:
        worker = work(request_of, model)
    finally:
        handle.remove()
    assert len(worker.made) == 4
    assert list(worker.failed) == [str(wide)]
    assert "out of memory, even one picture at a time" in worker.failed[str(wide)]


@pytest.mark.parametrize("limit", range(10))
def test_bisection_finds_the_largest_that_passes(limit: int) -> None:
    tried: list[int] = []

    def attempt(levels: int) -> tuple[ProtectionResult, bool]:
        tried.append(levels)
        return ProtectionResult(torch.tensor(levels)), levels <= limit

    levels, found = largest_passing(attempt, 8)
    assert levels == min(limit, 8)
    assert (found is None) == (limit == 0)
    assert found is None or int(found.pixels) == levels
    assert len(tried) <= 4  # 8, then bisection of 1..7


class _LargestChange(nn.Module):
    """In place of LPIPS: the largest change in levels, whose answer is known."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (one - other).abs().amax() * 127.5


def test_lpips_lowers_the_budget_of_each_picture(
    request_of: Request, model: LatentDiffusion, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = replace(request_of, max_lpips=5.01, batch_size=4)
    worker = work(limited, model, perceptual=_LargestChange())
    for path in worker.made:
        record = read_sidecar(path)
        assert (record.levels, record.max_delta) == (5, 5)
        assert record.lpips == pytest.approx(5, abs=1e-4)
    strict = replace(request_of, max_lpips=0.5, output=request_of.output / "strict")
    worker = work(strict, model, perceptual=_LargestChange())
    record = read_sidecar(worker.made[0])
    assert (record.levels, record.max_delta, record.psnr) == (0, 0, None)
    assert "no budget keeps LPIPS within 0.5; left as it is" in capsys.readouterr().err


def test_lpips_runs_where_its_network_is() -> None:
    """Both pictures stayed on the CPU while the network was on the GPU: every CUDA run with LPIPS
    weights at hand ended in a traceback after its first attack."""
    recorder = Recorder(Settings("random"), None, perceptual=_LargestChange("meta"))
    clean = torch.zeros(3, 32, 32, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="meta"):  # the result is there, its value cannot be read
        recorder.lpips(clean, clean)


def test_too_small_for_lpips_is_said_and_no_reason_to_fail() -> None:
    """Sides below 32 pixels broke off in the middle of AlexNet, and the run with them."""
    recorder = Recorder(Settings("random"), None, perceptual=_LargestChange())
    small = torch.zeros(3, 31, 40, dtype=torch.uint8)
    with pytest.raises(UserError, match="40x31 pixels are too few for LPIPS"):
        recorder.lpips(small, small)
    assert recorder._distances(small, small, []) == {"psnr": None, "lpips": None}


def test_a_measure_without_memory_is_null_and_named() -> None:
    def exhausted() -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    notices: list[str] = []
    assert _or_none(exhausted, "LPIPS", notices) is None
    assert notices == ["LPIPS was not measured: out of memory"]


def test_a_result_survives_an_extra_that_fails(request_of: Request, model: LatentDiffusion) -> None:
    """Extras ran before the picture was written: hours of an attack were lost with them."""

    def failing(done: Finished) -> dict[str, Any]:
        raise RunFailed("no memory for edits")

    worker = work(request_of, model, extras=[failing])
    assert worker.failed == {} and len(worker.made) > 0
    record = read_sidecar(worker.made[0])
    assert record.notices[-1] == "not measured further: no memory for edits"


def test_a_full_disk_ends_the_run(
    request_of: Request, model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each further picture was attacked in full, only to be no more savable than the first."""

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffkit.protection.worker.publish", full)
    steps: list[int] = []
    with pytest.raises(RunFailed, match="the disk is full"):
        work(request_of, model, each=steps.append)
    assert len(steps) == 2  # of the first picture


def test_one_bad_picture_does_not_spoil_its_batch(
    request_of: Request, model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture whose gradient is not finite failed all pictures attacked with it."""
    attack = Worker._attack

    def sometimes(self: Worker, rows: Any, lean: bool) -> Any:
        if any(row.item.source.path.name == "2.png" for row in rows):
            raise RunFailed("the gradient was not finite")
        return attack(self, rows, lean)

    monkeypatch.setattr(Worker, "_attack", sometimes)
    worker = work(replace(request_of, batch_size=4), model)
    assert [Path(path).name for path in worker.failed] == ["2.png"]
    assert sorted(path.name for path in worker.made) == ["0.png", "1.png", "3.png", "4.png"]


def test_a_file_that_changes_under_way_is_not_mixed_up(
    request_of: Request, model: LatentDiffusion
) -> None:
    pending = plan_job(request_of, {}).pending
    changed = request_of.paths[0] / "2.png"
    changed.write_bytes(encoded(Image.fromarray(noise(77, 32)), "PNG"))
    (request_of.paths[0] / "3.png").unlink()
    worker = Worker(request_of, model)
    worker.run(pending)
    assert len(worker.made) == 3
    reasons = {Path(path).name: reason for path, reason in worker.failed.items()}
    assert "changed while the job ran" in reasons["2.png"]
    assert "does not exist" in reasons["3.png"]


def test_extras_reach_the_record(request_of: Request, model: LatentDiffusion) -> None:
    seen: list[Finished] = []

    def extra(done: Finished) -> dict[str, Any]:
        seen.append(done)
        return {"effect": {"sdedit": 1.5}, "purification": {"jpeg75": 0.5}}

    worker = work(request_of, model, extras=[extra])
    record = read_sidecar(worker.made[0])
    assert record.effect is not None and record.purification == {"jpeg75": 0.5}
    assert record.effect["sdedit"] == 1.5 and record.effect["random_control"]["psnr"] > 0
    assert record.effect["encoder_amplification_over_random"] > 0
    done = seen[0]
    change = (done.control.int() - done.picture.pixels.int()).abs()
    assert int(change.max()) == 8  # the control spends the whole budget


def test_the_control_keeps_to_the_same_pixels(
    request_of: Request, model: LatentDiffusion, tmp_path: Path
) -> None:
    """It once changed what mask and alpha fix, and so looked stronger than what it is beside."""
    mask = tmp_path / "mask.png"
    half = torch.zeros(32, 32, dtype=torch.uint8)
    half[:, 16:] = 255
    Image.fromarray(half.numpy()).save(mask)
    pixels = noise(8, 32, 4)
    pixels[:8, :, 3], pixels[8:, :, 3] = 0, 200
    path = request_of.paths[0] / "4.png"
    path.write_bytes(encoded(Image.fromarray(pixels), "PNG"))
    seen: list[Finished] = []
    masked = replace(request_of, paths=(path,), mask=mask)
    work(masked, model, extras=[lambda done: seen.append(done) or {}])
    (done,) = seen
    free = torch.zeros(32, 32, dtype=torch.bool)
    free[8:, 16:] = True
    for version in (done.control, done.encoded.pixels):
        change = (version.int() - done.picture.pixels.int()).abs().amax(0)
        assert not change[~free].any()
        assert change[free].float().mean() > 1


def test_masks_are_read_by_the_nearest_pixel(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    mask = Image.new("RGB", (2, 1))
    mask.putpixel((1, 0), (255, 255, 255))
    mask.save(path)
    found = read_mask(path, torch.zeros(3, 3, 4, dtype=torch.uint8))
    assert found.tolist() == [[[0, 0, 1, 1]] * 3]
    path.write_bytes(b"no picture")
    with pytest.raises(Unreadable, match="its mask"):
        read_mask(path, torch.zeros(3, 3, 4, dtype=torch.uint8))
