"""Whole audits on a tiny model: controls, purifiers, what is kept, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffkit.audit.cells import CELLS, CellStore, content_digest
from diffkit.audit.distances import Ruler
from diffkit.audit.edits import Measurer, purified_versions
from diffkit.audit.measures import CLEAN, CONTROL, PROTECTED
from diffkit.audit.outcome import ModelAudit
from diffkit.audit.page import write_page
from diffkit.audit.pairs import pair_up
from diffkit.audit.pictures import (
    AGAIN,
    JPEG,
    attacked_names,
    change_of,
    inspect,
    is_attacked,
    open_versions,
)
from diffkit.audit.purifiers.base import Models, Purifier
from diffkit.audit.purifiers.registry import PURIFIERS, parse_purifiers
from diffkit.audit.report import build_report
from diffkit.audit.request import AuditRequest
from diffkit.audit.run import run_audit
from diffkit.audit.sdedit import Edit, noise_seeds
from diffkit.audit.threats import parse_threats
from diffkit.audit.work import Work
from diffkit.errors import RunFailed, UserError
from diffkit.files import sha256, write_json
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.protection.image_file import Unreadable
from diffkit.protection.sidecar import sidecar_path
from tests.audit.pictures import pixels, protected, record, save, two_folders

Audited = Callable[..., dict[str, Any]]


def request(model: Path, **values: Any) -> AuditRequest:
    usual: dict[str, Any] = {
        "models": (str(model),),
        "threats": parse_threats("sdedit", (0.03,)),
        "seeds": 2,
        "resamples": 200,
        "prompt": "a",
    }
    return AuditRequest(**(usual | values))


def audit(root: Path, model: Path, **values: Any) -> dict[str, Any]:
    asked = request(model, **values)
    found = run_audit(asked, root / "clean", root / "protected", root / "out")
    return build_report(found, asked)


@pytest.mark.slow
def test_a_picture_against_itself_has_exactly_no_effect(tmp_path: Path, tiny_sd: Path) -> None:
    two_folders(tmp_path, 3, same=True)
    numbers = audit(tmp_path, tiny_sd)["models"][0]["threats"][0]["numbers"]
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    for name in numbers.keys() - {"psnr"}:
        assert numbers[name]["effect"][PROTECTED] == nothing
        assert numbers[name]["effect"][AGAIN] == nothing
        assert numbers[name]["clear"] is False
    assert numbers["latent_l2"]["effect"][CONTROL]["value"] > 0


@pytest.mark.slow
def test_identity_leaves_exactly_all_of_it(tmp_path: Path, tiny_sd: Path) -> None:
    two_folders(tmp_path, 3)
    report = audit(tmp_path, tiny_sd, purify="identity,jpeg75")
    numbers = report["models"][0]["threats"][0]["numbers"]
    same, jpeg = report["models"][0]["purifiers"]
    assert same["purifier"] == "identity" and jpeg["purifier"] == "jpeg75"
    for name, found in same["retention"].items():
        if not numbers[name].get("over_random"):
            continue
        assert found["random"] == {"value": 1.0, "low": 1.0, "high": 1.0}
        assert found["effect"] == {
            version: numbers[name]["effect"][version] for version in (PROTECTED, CONTROL)
        }
    assert same["cost"]["latent_l2"]["value"] == 0 < jpeg["cost"]["latent_l2"]["value"]


def test_the_controls_are_noise_of_equal_size_and_compression(tmp_path: Path) -> None:
    clean, result = two_folders(tmp_path, 1)
    pair = pair_up(clean, result, tmp_path / "out").pairs[0]
    picture = inspect(pair, None)
    versions, mask = open_versions(picture, 3)
    assert mask is None and picture.control.levels == 8 and picture.control.recorded
    assert torch.equal(versions[CLEAN], versions[AGAIN])
    assert change_of(picture, 3, None)[CONTROL]["largest"] == 8
    assert not torch.equal(versions[CONTROL], versions[PROTECTED])
    assert torch.equal(versions[JPEG], parse_purifiers("jpeg95")[0](versions[CLEAN], 0))
    other, _ = open_versions(picture, 4)
    assert not torch.equal(other[CONTROL], versions[CONTROL])


def test_without_a_record_the_control_is_as_strong_as_nearly_all_of_the_change(
    tmp_path: Path,
) -> None:
    """One pixel that a foreign tool moved by 100 levels made the control noise of 100 levels."""
    changed = protected(pixels(), 5)
    changed[0, 0, 0] = (int(pixels()[0, 0, 0]) + 100) % 200
    clean = save(tmp_path / "c.png", pixels())
    save(tmp_path / "p.png", changed)
    pair = pair_up(clean, tmp_path / "p.png", tmp_path / "out").pairs[0]
    picture = inspect(pair, None)
    assert picture.control.levels == 5 and not picture.control.recorded
    assert picture.facts()["method"] is None


def test_the_control_respects_contrast_and_mask(tmp_path: Path) -> None:
    """Noise at full budget everywhere was a stronger control than the protection's own budget."""
    clean, result = two_folders(tmp_path, 1)
    flat = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    half = torch.zeros(3, 32, 32, dtype=torch.uint8)
    half[:, :, :16] = 255
    mask = save(tmp_path / "mask.png", half)
    original = save(clean / "0.png", flat)
    copy = save(result / "0.png", protected(flat))
    digest = sha256(mask)
    known = record(copy, original).as_json() | {"contrast": True, "mask_sha256": digest}
    write_json(sidecar_path(copy), known)
    pair = pair_up(clean, result, tmp_path / "out").pairs[0]
    picture = inspect(pair, mask)
    assert picture.control.masked and picture.control.contrast and not picture.control.unmasked
    noise = open_versions(picture, 0)[0][CONTROL].int() - 128
    assert int(noise[:, :, 16:].abs().max()) == 0
    assert set(noise[:, :, :16].abs().unique().tolist()) == {2}  # a quarter of 8 on flat areas
    without = inspect(pair, None)
    assert without.control.unmasked and not without.control.masked
    assert int((open_versions(without, 0)[0][CONTROL].int() - 128)[:, :, 16:].abs().max()) == 2
    other = inspect(pair, save(tmp_path / "other.png", 255 - half))
    assert other.control.unmasked and not other.control.masked


@pytest.mark.parametrize(("value", "word"), [(0, "is black"), (255, "is white")])
def test_one_bad_mask_refuses_its_picture_by_name(tmp_path: Path, value: int, word: str) -> None:
    """It ended the whole audit at this picture, hours in."""
    clean, result = two_folders(tmp_path, 1)
    pair = pair_up(clean, result, tmp_path / "out").pairs[0]
    full = torch.full((3, 32, 32), value, dtype=torch.uint8)
    mask = save(tmp_path / "masks" / "0.png", full)
    with pytest.raises(Unreadable, match=f"its mask 0.png {word}"):
        inspect(pair, mask, paints=True)
    assert inspect(pair, mask).mask == mask  # as the mask of the protection it is none of ours


def test_models_of_an_ensemble_are_attacked_ones(tmp_path: Path, tiny_sd: Path) -> None:
    """The report called the second model of an ensemble not attacked."""
    clean, result = two_folders(tmp_path, 1)
    known = record(result / "0.png", clean / "0.png").as_json()
    write_json(sidecar_path(result / "0.png"), known | {"ensemble": [tiny_sd.name]})
    pictures = [inspect(pair, None) for pair in pair_up(clean, result, tmp_path / "o").pairs]
    assert attacked_names(pictures) == {"the attacked model", tiny_sd.name}


def test_a_renamed_copy_of_the_attacked_model_is_attacked(tmp_path: Path) -> None:
    """Only names were compared, so that a local copy of the attacked hub id was shown as a model
    that was not attacked: the claim that an attack transfers would have rested on it."""
    clean, result = two_folders(tmp_path, 1)
    known = record(result / "0.png", clean / "0.png").as_json()
    write_json(sidecar_path(result / "0.png"), known | {"model_weights": ["abc", "def"]})
    pictures = [inspect(pair, None) for pair in pair_up(clean, result, tmp_path / "o").pairs]
    assert is_attacked(pictures, "a copy", "def") is True
    assert is_attacked(pictures, "the attacked model", "0") is True
    assert is_attacked(pictures, "another", "0") is False
    assert is_attacked([], "another", "0") is None


@pytest.mark.slow
def test_sizes_that_differ_are_refused_by_name_and_the_rest_is_measured(
    tmp_path: Path, tiny_sd: Path
) -> None:
    clean, result = two_folders(tmp_path)
    record(save(result / "1.png", pixels(1, 40, 32)), clean / "1.png")
    report = audit(tmp_path, tiny_sd, seeds=8)
    assert report["models"][0]["skipped"]["ms_ssim"] == "needs sides of at least 176 pixels"
    assert report["refused"] == {"1.png": "has 32x40 pixels and its clean picture 32x32"}
    assert report["n"] == 1
    with pytest.raises(Unreadable, match="32x40"):
        inspect(pair_up(clean, result, tmp_path / "o").pairs[1], None)


def test_one_noise_for_clean_and_protected(tmp_path: Path, tiny_sd: Path) -> None:
    """A random purifier draws alike for all versions, anew for each seed."""
    noise = parse_purifiers("noise0.1")[0]
    grey = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    found = purified_versions(noise, {CLEAN: grey, PROTECTED: grey + 8}, (0, 1))
    assert not torch.equal(found[CLEAN][0], found[CLEAN][1])
    for seed in (0, 1):
        moved = found[PROTECTED][seed].int() - found[CLEAN][seed].int()
        assert int(moved.min()) == int(moved.max()) == 8


@pytest.mark.slow
def test_a_killed_audit_goes_on(
    tmp_path: Path, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_folders(tmp_path)
    original, calls = Measurer.__call__, []

    def counted(self: Measurer, *args: Any, **kwargs: Any) -> Any:
        if len(calls) == killed_after:
            raise KeyboardInterrupt
        calls.append(args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Measurer, "__call__", counted)
    killed_after = 3
    with pytest.raises(KeyboardInterrupt):
        audit(tmp_path, tiny_sd, purify="jpeg75")
    assert len(list((tmp_path / "out" / CELLS).iterdir())) == 3
    killed_after = -1
    calls.clear()
    resumed = audit(tmp_path, tiny_sd, purify="jpeg75")
    assert len(calls) == 1  # two pictures, plain and purified: four in all
    calls.clear()
    again = audit(tmp_path, tiny_sd, purify="jpeg75")
    assert not calls
    del resumed["created"], again["created"]
    assert resumed == again
    audit(tmp_path, tiny_sd, purify="jpeg50")
    assert len(calls) == 2  # the plain edits are there
    save(tmp_path / "protected" / "0.png", protected(pixels(0), 4))
    calls.clear()
    audit(tmp_path, tiny_sd)
    assert len(calls) == 1  # the picture that changed


def test_other_folders_are_not_written_into(tmp_path: Path, tiny_sd: Path) -> None:
    two_folders(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "holiday.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="holds holiday.png"):
        audit(tmp_path, tiny_sd)


@pytest.mark.slow
def test_a_prompt_of_its_own_comes_from_the_record(tmp_path: Path, tiny_sd: Path) -> None:
    clean, result = two_folders(tmp_path, 2)
    record(result / "0.png", clean / "0.png", prompt="b c")
    report = audit(tmp_path, tiny_sd, prompt=None)
    assert report["prompts"] == ["b c", "a picture"]
    model = report["models"][0]
    assert model["attacked"] is False  # the records name another one
    assert model["labels"]["alignment"] == "text alignment (diffkit text-image scorer)"


def test_a_model_without_guidance_leaves_the_guided_row_out_by_name(
    tiny_folder: Callable[[str], Path],
) -> None:
    guided, plain = parse_threats("sdedit:guided,sdedit", (0.03,)).edits
    model = LatentDiffusion.load(tiny_folder("latent"))
    assert "no classifier-free guidance" in (guided.refusal(model) or "")
    assert plain.refusal(model) is None


@pytest.mark.slow
def test_numbers_are_those_of_the_library(tmp_path: Path, tiny_sd: Path) -> None:
    """audit.json and `sdedit_effects` measure the same edits."""
    from diffkit.audit.effects import sdedit_effects

    clean, result = two_folders(tmp_path)
    report = audit(tmp_path, tiny_sd)
    x = [pixels(i) for i in range(2)]
    y = [protected(p) for p in x]
    model = LatentDiffusion.load(tiny_sd)
    found = sdedit_effects(model, x, {"y": y}, (0.03,), noise_seeds(0, 2), "a")["y"]
    shown = report["models"][0]["threats"][0]["numbers"]["latent_l2"]
    assert shown["effect"][PROTECTED]["value"] == pytest.approx(
        float(found.effect["latent_l2"].mean()), rel=1e-6
    )
    assert shown["vs_original"][CLEAN]["value"] == pytest.approx(
        float(found.clean_vs_original["latent_l2"].mean()), rel=1e-6
    )
    assert Edit(0.03).run == 3


@pytest.mark.slow
def test_the_page_is_whole_and_tells_what_must_be_told(tmp_path: Path, tiny_sd: Path) -> None:
    from tests.evaluation.test_page import Page, check_whole

    two_folders(tmp_path)
    asked = request(tiny_sd, purify="jpeg75", command={"clean": "a b", "protected": "c"})
    found = run_audit(asked, tmp_path / "clean", tmp_path / "protected", tmp_path / "out")
    report = json.loads(json.dumps(build_report(found, asked)))
    path = write_page(report, found, tmp_path / "out")
    page = Page(path.read_text(encoding="utf-8"))
    check_whole(page)
    text = " ".join(page.text.split())
    assert text.index("Read this first") < text.index("There is no verdict here")
    assert "the attacked model" in text and "Not attacked" in text
    assert "diffkit audit 'a b' c" in text
    # 4 versions, 3 edits and 3 purified edits of both pictures
    assert len(page.all("img", "src")) == 2 * (4 + 3 + 3)
    assert str(tmp_path) not in page.text.replace(path.as_uri(), "")


@pytest.mark.slow
def test_a_purifier_that_breaks_off_names_the_picture_and_the_others_are_measured(
    tmp_path: Path, tiny_sd: Path
) -> None:
    """A purifier that ran out of memory with one large picture ended the audit."""

    class Narrow(Purifier):
        def __call__(self, pixels: torch.Tensor, seed: int) -> torch.Tensor:
            if pixels.shape[-1] > 32:
                raise RunFailed("jpeg75: out of memory with a picture of 40x32.")
            return super().__call__(pixels, seed)

    clean, result = two_folders(tmp_path, 3)
    original = save(clean / "1.png", pixels(1, 32, 40))
    record(save(result / "1.png", protected(pixels(1, 32, 40))), original)
    asked = request(tiny_sd, purify="jpeg75")
    place = tmp_path / "clean", tmp_path / "protected", tmp_path / "out"
    found = run_audit(asked, *place, dry_run=True)
    model = LatentDiffusion.load(tiny_sd)
    work = Work(asked, found, CellStore(tmp_path / "out"), model, Ruler(model))
    jpeg = PURIFIERS["jpeg"]
    work.jobs[1] = (work.jobs[1][0], Narrow(jpeg, 75, None, Models()))
    found.changes = [change_of(picture, 0, None) for picture in found.pictures]
    found.models.append(work.run())
    assert not found.complete
    report = build_report(found, asked)["models"][0]
    assert report["failed"] == {
        "1.png, sdedit strength 0.03, jpeg75": "jpeg75: out of memory with a picture of 40x32."
    }
    assert report["threats"][0]["n"] == 3 and report["purifiers"][0]["n"] == 2


@pytest.mark.slow
def test_cells_behind_a_model_name_its_weights_and_prompt(tmp_path: Path, tiny_sd: Path) -> None:
    """Another model at the same path, or another prompt, was answered from old cells."""
    two_folders(tmp_path)
    text = f"sdedit0.03:{tiny_sd},jpeg75"
    keys = []
    for prompt in ("a", "b"):
        asked = request(tiny_sd, purify=text, prompt=prompt)
        found = run_audit(
            asked, *(tmp_path / name for name in ("clean", "protected", "out")), dry_run=True
        )
        model = LatentDiffusion.load(tiny_sd)
        keys.append(Work(asked, found, CellStore(tmp_path), model, Ruler(model)).purifier_keys)
    name = f"sdedit0.03:{tiny_sd.name}"
    assert [key[name]["prompt"] for key in keys] == ["a", "b"]
    assert all(key[name]["weights"] == content_digest(tiny_sd) for key in keys)
    assert keys[0]["jpeg75"] == keys[1]["jpeg75"]
    assert keys[0]["jpeg75"]["weights"] is None and keys[0]["jpeg75"]["prompt"] is None


def test_a_digest_of_a_folder_is_that_of_what_it_holds(tmp_path: Path) -> None:
    for place in ("here", "there/deep"):
        (tmp_path / place / "unet").mkdir(parents=True)
        (tmp_path / place / "unet" / "weights").write_bytes(b"one")
    here, there = (content_digest(tmp_path / place) for place in ("here", "there/deep"))
    assert here == there
    (tmp_path / "here" / "unet" / "weights").write_bytes(b"two")
    assert content_digest(tmp_path / "here") != there


def test_a_dry_run_tells_the_edits_and_makes_none(
    tmp_path: Path, tiny_sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 pictures x 2 noises x (5 versions + 3 behind each of two purifiers) are 44 edits."""
    two_folders(tmp_path)
    place = tmp_path / "clean", tmp_path / "protected", tmp_path / "out"
    found = run_audit(request(tiny_sd, purify="jpeg75,jpeg50"), *place, dry_run=True)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "44 edits by" in said and "(20 plain, 24 behind purifiers; 2 pictures x 2 noises)" in said
    )
    assert "0 of 6 measurements are there" in said and "estimate:" in said
    assert not found.models and not (tmp_path / "out" / CELLS).exists()


def test_what_the_change_looks_like_is_measured_once(tmp_path: Path, tiny_sd: Path) -> None:
    """SSIM, LPIPS and JPEG of every picture at its own size were computed at every start."""
    store, made_of = CellStore(tmp_path), {"clean": "a"}
    calls: list[int] = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return {"psnr": 30.0}

    assert store.change(made_of, measure) == store.change(made_of, measure) == {"psnr": 30.0}
    assert len(calls) == 1 and store.change({"clean": "b"}, measure) and len(calls) == 2


def test_reports_name_files_by_their_place_below_the_folders(tmp_path: Path, tiny_sd: Path) -> None:
    """a/x.png and b/x.png had one entry, and a link in CLEAN made the exit code 1."""
    clean, result = two_folders(tmp_path, 1)
    for name in ("a", "b"):
        (result / name).mkdir()
        (result / name / "x.png").write_bytes(b"torn")
    (clean / "x.png").write_bytes(b"torn")
    (clean / "link.png").symlink_to(clean / "0.png")
    place = clean, result, tmp_path / "out"
    found = run_audit(request(tiny_sd, seeds=8), *place, dry_run=True)
    found.changes = [change_of(picture, 0, None) for picture in found.pictures]
    found.models = [ModelAudit("m", None)]
    report = build_report(found, request(tiny_sd))
    assert report["refused"].keys() == {"a/x.png", "b/x.png", "x.png (clean)"}
    assert report["passed_over"] == {"link.png (clean)": "a symbolic link"}
    found.refused.clear()
    assert found.complete
