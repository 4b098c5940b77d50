"""Imitators: trained alike, on the right pictures, and asked alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffkit.audit.distances import Ruler
from diffkit.audit.measures import CLEAN, CONTROL, PROTECTED
from diffkit.audit.mimicry import Imitation, Learner, imitate
from diffkit.audit.mimicry_scores import NOTE, score_imitation
from diffkit.audit.mimicry_sets import partly_protected
from diffkit.audit.mimicry_settings import MimicrySettings, check_device
from diffkit.audit.page import write_page
from diffkit.audit.report import build_report
from diffkit.audit.request import AuditRequest
from diffkit.audit.run import run_audit
from diffkit.audit.threats import parse_threats
from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.randomness import integers
from tests.audit.pictures import open_rgb, pixels, protected, two_folders


def test_a_larger_share_holds_the_smaller_one() -> None:
    quarter, half, all_of_them = (partly_protected(8, share, 3) for share in (25, 50, 100))
    assert [sum(part) for part in (quarter, half, all_of_them)] == [2, 4, 8]
    assert all(b for a, b in zip(quarter, half) if a)


def drawn(count: int, seed: int, shift: int = 0) -> torch.Tensor:
    return (integers(0, 200, (count, 3, 32, 32), seed, "drawn") + shift).to(torch.uint8)


@pytest.mark.slow
def test_scores_are_differences_to_the_imitator_of_clean_pictures(tiny_sd: Path) -> None:
    """Equal drawings differ by exactly nothing; darker ones are further from the originals."""
    ruler = Ruler(LatentDiffusion.load(tiny_sd))
    samples = {CLEAN: drawn(12, 0), CONTROL: drawn(12, 0), PROTECTED: drawn(12, 0) // 4}
    labels = {name: name for name in samples}
    found = Imitation("lora", "facts", ("b",), ("a",) * 12, labels, samples)
    entry = score_imitation(found, list(drawn(8, 1)), ruler, 0)
    assert entry["numbers"].keys() == {"frechet", "kernel", "precision", "alignment"}
    nothing = {"value": 0.0, "low": 0.0, "high": 0.0}
    for name, row in entry["numbers"].items():
        assert row["effect"][CONTROL] == nothing, name
        assert CLEAN not in row["effect"]
    far = entry["numbers"]["frechet"]
    assert far["effect"][PROTECTED]["low"] > 0
    assert far["values"][PROTECTED]["value"] > far["values"][CLEAN]["value"]
    assert entry["note"] == NOTE and "one training" in NOTE
    assert entry["instance_prompts"] == ["b"] and entry["sample_prompts"] == ["a"]
    assert "FID" not in entry["labels"]["frechet"] and "diffkit" in entry["labels"]["frechet"]


@pytest.mark.slow
def test_a_few_pictures_have_no_neighbours_and_the_report_says_so(tiny_sd: Path) -> None:
    ruler = Ruler(LatentDiffusion.load(tiny_sd))
    samples = dict.fromkeys((CLEAN, CONTROL, PROTECTED), drawn(4, 0))
    found = Imitation("lora", "facts", ("b",), ("a",) * 4, {}, samples)
    entry = score_imitation(found, list(drawn(3, 1)), ruler, 0)
    assert "precision" not in entry["numbers"]
    assert any("more than 5" in why for why in entry["skipped"].values())


def request(model: Path, kind: str, **values: Any) -> AuditRequest:
    usual: dict[str, Any] = {"steps": 2, "samples": 3, "instance_prompt": "a {}"} | values
    if kind == "textual-inversion":
        usual |= {"vectors": 3}
    return AuditRequest((str(model),), parse_threats(kind), mimicry=MimicrySettings(**usual))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dreambooth", "textual-inversion"])
def test_a_tiny_imitation(kind: str, tmp_path: Path, tiny_sd: Path) -> None:
    two_folders(tmp_path, 4)
    asked = request(tiny_sd, kind, partial=(50,) if kind == "lora" else ())
    place = tmp_path / "clean", tmp_path / "protected", tmp_path / "out"
    audit = run_audit(asked, *place)
    report = build_report(audit, asked)
    entry = report["models"][0]["mimicry"][0]
    versions = [CLEAN, CONTROL, PROTECTED, *(["50 %"] if kind == "lora" else [])]
    assert list(entry["numbers"]["kernel"]["values"]) == versions
    runs = sorted((tmp_path / "out" / "mimicry").glob("*/run/config.yaml"))
    assert len(runs) == len(versions)
    configs = [yaml.safe_load(path.read_text()) for path in runs]
    for config in configs:
        config.pop("data"), config.pop("output")
    assert all(config == configs[0] for config in configs)  # seeds and steps among them
    first = [p.read_bytes() for p in sorted((tmp_path / "out").glob("mimicry/*/samples-*/*.png"))]
    assert not list((tmp_path / "out").glob("mimicry/*/run/checkpoints"))
    again = build_report(run_audit(asked, *place), asked)
    assert again["models"][0]["mimicry"] == report["models"][0]["mimicry"]
    assert len(first) == 3 * len(versions)
    text = write_page(report, audit, tmp_path / "out").read_text(encoding="utf-8")
    assert "Imitation with" in text and "minus clean" in text and NOTE in text
    assert "Learnt as" in text and "clear of random noise</span>" not in text
    if kind == "lora":
        changed = request(tiny_sd, kind, partial=(50,), samples=2, sample_prompts=("b",))
        before = {path: path.stat().st_mtime_ns for path in runs}
        run_audit(changed, *place)
        assert before == {path: path.stat().st_mtime_ns for path in runs}  # drawn, not retrained
        assert len(list((tmp_path / "out").glob("mimicry/*/samples-*"))) == 2 * len(versions)


@pytest.mark.slow
def test_imitators_learn_from_their_own_version(tmp_path: Path, tiny_sd: Path) -> None:
    two_folders(tmp_path, 4)
    asked = request(tiny_sd, "lora", partial=(50,))
    run_audit(asked, tmp_path / "clean", tmp_path / "protected", tmp_path / "out")
    from diffkit.audit.purifiers.plain import from_pillow

    clean = [pixels(i) for i in range(4)]
    changed = [protected(p) for p in clean]
    found = []
    for folder in (tmp_path / "out" / "mimicry" / "sets").iterdir():
        learnt = [from_pillow(open_rgb(path)) for path in sorted(folder.glob("*.png"))]
        same = [torch.equal(a, b) for a, b in zip(learnt, clean)]
        new = [torch.equal(a, b) for a, b in zip(learnt, changed)]
        found.append((sum(same), sum(new)))
    # clean, protected, half of each, and noise that is neither
    assert sorted(found) == [(0, 0), (0, 4), (2, 2), (4, 0)]


def test_one_picture_teaches_nobody(tmp_path: Path, tiny_sd: Path) -> None:
    two_folders(tmp_path, 1)
    place = tmp_path / "clean", tmp_path / "protected", tmp_path / "out"
    with pytest.raises(UserError, match="learns from a folder"):
        run_audit(request(tiny_sd, "lora"), *place)


def learner(**values: Any) -> Learner:
    usual: dict[str, Any] = {"reads": True, "clip": True, "inpaints": False}
    return Learner("nowhere", "digest", **(usual | values))


def test_what_imitators_cannot_learn_is_known_before_anything_is_edited() -> None:
    """A model without text was found out after hours of edits, at the first caption."""
    assert learner().refusal("lora") is None
    assert "takes no text" in (learner(reads=False).refusal("lora") or "")
    assert "takes a mask" in (learner(inpaints=True).refusal("dreambooth") or "")
    assert learner(clip=False).refusal("lora") is None
    assert "no CLIP text encoder" in (learner(clip=False).refusal("textual-inversion") or "")


def test_a_model_of_classes_is_refused_whole(
    tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    two_folders(tmp_path, 2)
    place = tmp_path / "clean", tmp_path / "protected", tmp_path / "out"
    with pytest.raises(UserError, match="can do nothing of --threats. lora: it takes no text"):
        run_audit(request(tiny_folder("latent"), "lora"), *place)


def test_a_device_that_the_trainer_would_not_take_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """--device moved the edits and the drawing, while the training went where it liked."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_device("cpu")
    for device in ("cuda:1", "mps"):
        with pytest.raises(UserError, match=f"--device {device}: imitators are trained where"):
            check_device(device)


def test_an_interrupted_training_interrupts_the_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a training ended as "the training ended with code 130", with exit code 1."""
    from diffkit.audit import mimicry
    from diffkit.audit.pairs import pair_up
    from diffkit.audit.pictures import inspect

    clean, result = two_folders(tmp_path, 2)
    pictures = [inspect(pair, None) for pair in pair_up(clean, result, tmp_path / "o").pairs]
    monkeypatch.setattr(mimicry, "train", lambda config: 130)
    with pytest.raises(KeyboardInterrupt):
        imitate(request(Path("m"), "lora"), "lora", learner(), pictures, clean, tmp_path / "o")


def test_what_is_drawn_does_not_decide_what_is_learnt(tmp_path: Path) -> None:
    """--samples and --sample-prompts trained everything anew; new class pictures did not."""
    from diffkit.audit.mimicry import _Imitators

    def trained(**values: Any) -> dict[str, Any]:
        asked = request(Path("m"), "lora", class_prompt="a", class_images=images, **values)
        return _Imitators(asked, "lora", learner(), [], ["a b"], tmp_path)._made_of(CLEAN)

    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    (images / "deep" / "a.png").write_bytes(b"one")
    first = trained()
    assert trained(samples=7, sample_prompts=("b",)) == first != trained(rank=2)
    (images / "deep" / "a.png").write_bytes(b"two")
    assert trained() != first
