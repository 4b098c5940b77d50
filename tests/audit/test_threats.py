"""Names of threats and settings that cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffkit.audit.mimicry_settings import MimicrySettings
from diffkit.audit.purifiers.registry import DEFAULT_PURIFIERS, parse_purifiers
from diffkit.audit.request import AuditRequest, purifier_list
from diffkit.audit.threats import parse_threats
from diffkit.errors import UserError


def request(**values: object) -> AuditRequest:
    return AuditRequest(models=("embedded",), **({"threats": parse_threats("sdedit")} | values))


def test_sdedit_is_a_row_a_strength_and_one_is_purified() -> None:
    found = parse_threats("sdedit", (0.8, 0.1, 0.3))
    assert [row.setting for row in found.edits] == ["strength 0.1", "strength 0.3", "strength 0.8"]
    assert [row.honest for row in found.edits] == [False, False, True]
    assert found.main["sdedit"].setting == "strength 0.3"
    assert parse_threats("sdedit", (0.1, 0.5)).main["sdedit"].setting == "strength 0.1"


def test_the_guided_row_is_the_one_of_ace() -> None:
    row = parse_threats("sdedit:guided,lora").edits[0]
    assert row.parameters == {"strength": 0.3, "steps": 50, "guidance": 7.5}
    assert row.name == "sdedit:guided" and parse_threats("sdedit:guided,lora").mimicry == ("lora",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("paint", "unknown. Known: sdedit, sdedit:guided, inpaint, lora"),
        ("sdedit,sdedit", "there twice"),
        (" , ", "names no threat"),
    ],
)
def test_wrong_names_are_refused_with_what_is_known(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_threats(text)


def test_an_unknown_purifier_is_refused_with_what_is_known() -> None:
    with pytest.raises(UserError, match="--purify wash: unknown. Known: identity, jpeg75"):
        parse_purifiers("jpeg75,wash")
    assert purifier_list("default") == DEFAULT_PURIFIERS and purifier_list("none") is None
    assert purifier_list("jpeg75") == "jpeg75"


def test_one_picture_needs_eight_noises() -> None:
    assert len(request().noises(1)) == 8
    assert len(request().noises(7)) == 8 and len(request().noises(8)) == 4
    with pytest.raises(UserError, match="needs 8 at least"):
        request(seeds=7).noises(1)


def test_audits_of_other_seeds_share_no_noise() -> None:
    """Noises were seed, seed + 1, ...: audits of seeds 0 and 1 had seven of eight in common."""
    found = [request(seed=seed).noises(1) for seed in (0, 1, 2)]
    assert len(set().union(*found)) == 24
    assert found[0] == request(seed=0).noises(1)
    assert request(seeds=2).noises(9) == found[0][:2]  # more seeds keep those that were there


def test_a_mask_is_for_inpainting_and_inpainting_for_a_mask(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs --mask"):
        request(threats=parse_threats("inpaint")).check()


@pytest.mark.parametrize(
    ("threats", "values", "words"),
    [
        ("sdedit", {"steps": 5}, "--steps: is for imitators"),
        ("dreambooth", {"rank": 8}, "--rank: is for lora"),
        ("textual-inversion", {"class_prompt": "a"}, "--class-prompt: textual-inversion has"),
        ("textual-inversion", {"instance_prompt": "a"}, "must hold {} once"),
        ("lora", {"vectors": 3}, "--vectors: is for textual-inversion"),
        ("lora", {"class_images": Path("x")}, "needs --class-prompt"),
        ("lora", {"partial": (100,)}, "between 0 and 100"),
        ("lora", {"samples": 1}, "at least 2"),
        ("lora", {"learning_rate": 0.0}, "above 0"),
    ],
)
def test_settings_that_do_nothing_or_cannot_work(
    threats: str, values: dict[str, object], words: str
) -> None:
    settings = MimicrySettings(**values)
    with pytest.raises(UserError, match=words):
        request(threats=parse_threats(threats), mimicry=settings).check()
