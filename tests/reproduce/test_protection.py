"""The protection experiment: its arms, its measures on known answers, its tables."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from captions import read_concepts
from diffkit.assets import path
from gates import read_pictures
from matplotlib.figure import Figure
from protection_parts import plan
from protection_parts.artist import KNOWN, LEARNT, protected, reference
from protection_parts.attacks import attack_latents, picture_seeds, settings_of
from protection_parts.causes import band, shares
from protection_parts.claims import claims
from protection_parts.edits import compare, edit_latents, encode, look_at, purify
from protection_parts.mimicry import learnt_pictures
from protection_parts.report import text
from protection_parts.tables import retention
from reproduce import protection
from reproduce.protection import EXPERIMENT
from runner.experiment import Results
from torch import Tensor

from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.randomness import normal

SMALL = {**plan.SETTINGS, **plan.EDIT, "strengths": [0.3], "steps": 4, "held_out_draws": 2}


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return protection.embedded()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Two pictures that are shipped."""
    images, _ = read_pictures(path("sample"))
    return ((images[::100][:2] + 1) * 127.5).round().to(torch.uint8)


# -- what is made -------------------------------------------------------------------------------


def test_arms_are_file_names_and_each_differs() -> None:
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in plan.ARMS)
    assert len({str(sorted(arm.items())) for arm in plan.ARMS.values()}) == len(plan.ARMS)


def test_every_method_has_its_control_at_every_budget() -> None:
    for levels in plan.BUDGETS:
        for method in (*plan.METHODS, plan.LATENT):
            arm = plan.ARMS[plan.edit_arm(method, levels)]
            assert (arm["method"], arm["levels"], arm["kind"]) == (method, levels, "edit")


@pytest.mark.parametrize("method", plan.METHODS)
def test_methods_take_the_same_number_of_steps(method: str) -> None:
    settings = settings_of(method, 8, plan.SETTINGS["attack"])
    settings.check()
    assert settings.row.loss is None or settings.rule().steps == 50


def test_arms_that_train_once_are_made_with_one_seed() -> None:
    cells = EXPERIMENT.cells(plan.ARMS, plan.SEEDS)
    seeds = {arm: [cell.seed for cell in cells if cell.arm == arm] for arm in plan.ARMS}
    assert seeds["lora-mist-16"] == seeds["advdm-8"] == seeds["lora-clean"] == [0, 1, 2]
    assert seeds["lora-advdm-16"] == seeds["lora-none"] == [0]


def test_the_artist_draws_what_the_model_knows_and_what_it_does_not() -> None:
    concepts, mine = read_concepts(), protected()
    known = [drawing.concept in concepts for drawing in mine]
    assert len(mine) == 16
    assert known == [True, False] * 8
    assert sum(known[:LEARNT]) == LEARNT // 2
    asked = reference(64)
    assert len({drawing.concept for drawing in asked}) == 64
    assert not {drawing.concept for drawing in asked} & {drawing.concept for drawing in mine}
    assert set(KNOWN) <= set(concepts)


def test_half_of_what_a_mimic_learns_is_protected() -> None:
    clean, version = torch.zeros(16, 3, 2, 2), torch.ones(16, 3, 2, 2)
    assert learnt_pictures(clean, version, 0.5)[:, 0, 0, 0].tolist() == [1, 1, 0, 0, 1, 1, 0, 0]
    assert learnt_pictures(clean, version, 1.0).mean() == 1


# -- measures -----------------------------------------------------------------------------------


def test_an_edit_is_the_one_that_audits_make(model: LatentDiffusion, pixels: Tensor) -> None:
    from diffkit.audit.sdedit import Edit, Editor
    from diffkit.models.conditioner import Sizes
    from diffkit.protection.budget import as_signed

    noise = normal((2, *model.latent_shape(64, 64)), "noise")
    z = edit_latents(model, encode(model, pixels), noise, 0.5, 4, "")
    sizes = [Sizes((64, 64), (0, 0), (64, 64))] * 2
    expected = Editor(model, "")(as_signed(pixels), noise, Edit(0.5, 4), sizes)
    with torch.no_grad():
        assert torch.allclose(model.codec.decode(z), expected, atol=1e-4)


def test_a_version_beside_itself_has_no_effect(model: LatentDiffusion, pixels: Tensor) -> None:
    network = FeatureNetwork.load(path("features"))
    first, again = (look_at(model, network, pixels, None, SMALL, 3) for _ in range(2))
    other = look_at(model, network, pixels // 2, None, SMALL, 3)
    none, some = compare(again, first, SMALL), compare(other, first, SMALL)
    for name in ("0.3", *plan.PURIFIERS):
        assert none["latent"][name] == [0, 0]
        assert none["ssim"][name] == pytest.approx([0, 0], abs=1e-6)
        assert min(some["latent"][name]) > 0
    assert none["loss"] == none["pull"] == [0, 0]
    half = first["pixels"].float() - other["pixels"].float()
    rounding = first["pixels"].float().flatten(1).norm(dim=1)
    expected = half.flatten(1).norm(dim=1) / rounding
    assert some["change"] == pytest.approx(expected.tolist(), rel=1e-4)


def test_purifiers_keep_the_format(model: LatentDiffusion, pixels: Tensor) -> None:
    for name in plan.PURIFIERS:
        purified = purify(model, pixels, name, 10, 0)
        assert purified.dtype == torch.uint8 and purified.shape == pixels.shape
        assert not torch.equal(purified, pixels)


def test_latents_stay_in_their_ball_and_get_harder(model: LatentDiffusion, pixels: Tensor) -> None:
    z0, rho = encode(model, pixels), torch.tensor([0.1, 0.2])
    z = attack_latents(model, z0, rho, 0, steps=4, prompt="")
    moved = (z - z0).flatten(1).norm(dim=1) / z0.flatten(1).norm(dim=1)
    assert (moved <= rho * 1.0001).all() and (moved > 0.5 * rho).all()


def test_seeds_of_pictures_differ() -> None:
    assert len({*picture_seeds(0, 16), *picture_seeds(1, 16)}) == 32


def test_size_and_direction_of_what_is_left() -> None:
    whole = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    turned = torch.tensor([[0.0, 2.0], [1.0, 0.0]])  # scattered, and halved
    found = shares([whole, turned], [whole, whole])
    assert found == {"latents": 1, "latents along": 1, "edits": 0.75, "edits along": 0.25}


def test_the_bands_of_a_change_add_up_and_do_not_overlap() -> None:
    delta = normal((2, 3, 16, 16), "delta")
    low, high = band(delta, low=True), band(delta, low=False)
    assert torch.allclose(low + high, delta.double(), atol=1e-6)
    assert abs(float((low * high).sum())) < 1e-6
    stripes = torch.tensor([1.0, -1.0]).repeat(8).expand(1, 3, 16, 16)
    assert torch.allclose(band(stripes, low=False), stripes.double(), atol=1e-12)


# -- intervals and tables -----------------------------------------------------------------------


def known() -> Results:
    """Random has effect 1, AdvDM 3 (a third is left after purifying), SDS- is as random."""
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for method, size in (("random", 1.0), ("advdm", 3.0), ("sds-", 1.0)):
        strengths = {f"{s}": [size] * 3 for s in plan.STRENGTHS}
        purified = {name: [1.0] * 3 for name in plan.PURIFIERS}
        both = {**strengths, **purified}
        for seed in plan.SEEDS:
            cells[plan.edit_arm(method, 16), seed] = {
                "latent": both,
                "ssim": both,
                "amplification": [size] * 3,
                "loss": [0.25] * 3,
                "pull": [-0.5] * 3,
            }
    for seed in plan.SEEDS:
        cells["lora-clean", seed] = dict.fromkeys(("kernel_style", "kernel", "frechet"), 1.0)
        cells["lora-mist-16", seed] = dict.fromkeys(("kernel_style", "kernel", "frechet"), 3.0)
        for arm in ("lora-clean", "lora-mist-16"):
            cells[arm, seed]["style"] = 0.5
    return Results(cells)


def test_the_tables_of_known_results() -> None:
    rows = text(known()).splitlines()
    edits = (
        "| advdm | 3 | 3.0 | 3.00 | 3.00 | 3.00 [3.00, 3.00] | 3.00 | 3.00 | 3.00 [3.00, 3.00] |"
    )
    assert any(row.startswith(edits) for row in rows)
    assert "| advdm | " + " | ".join(["33% [33%, 33%]"] * 3) + " |" in rows
    assert "| sds- | n/a | n/a | n/a |" in rows
    assert "| random | " + " | ".join(["100% [100%, 100%]"] * 3) + " |" in rows
    mimic = "| mist, 16 levels | 3 | 3.000 | 3.000 | 3.0 | 50.0% | +2.000 [+2.000, +2.000] |"
    assert mimic in rows


EXPECTED = [
    "yes", "yes",  # mist, in the place of all methods of the encoder: 3 times random noise
    "no",  # at strength 0.8 as much as at 0.3
    "yes",  # moving latents: a third of advdm
    "yes", "no",  # advdm raises the denoising loss, and so does sds-
    "yes", "yes", "no",  # a third is left: less than 70 %, not less than 30 %
    "yes", "yes",  # mist's mimic ends far away, half of it nearer than half way
]  # fmt: skip


def test_claims_hold_or_not_by_their_intervals() -> None:
    cells = dict(known().values)
    for seed, value in zip(plan.SEEDS, (2.9, 3.0, 3.1)):
        cells["lora-random-16", seed] = {**cells["lora-clean", seed], "kernel_style": 1.0}
        cells["lora-mist-16", seed] = {**cells["lora-mist-16", seed], "kernel_style": value}
        cells["lora-50-mist-16", seed] = {**cells["lora-clean", seed], "kernel_style": 1.5}
        cells["mist-16", seed] = cells["advdm-16", seed]
        cells["latent-16", seed] = cells["sds-minus-16", seed]
    rows = {row.split(" | ")[0][2:]: row for row in claims(Results(cells), 16)[2:]}
    ends = {name: row.rsplit(" | ", 1)[1].removesuffix(" |") for name, row in rows.items()}
    assert list(ends.values()) == EXPECTED, ends
    assert "+2.000 [+1.752, +2.248]" in rows[next(name for name in rows if "mimic" in name)]
    assert (
        "to 25% of it; half way is passed by -0.500 [-0.624, -0.376]"
        in rows[next(name for name in rows if "half" in name)]
    )


def test_what_is_left_is_a_ratio_of_means() -> None:
    found = retention(known(), "advdm", 16, "jpeg75")
    assert found is not None and found.value == pytest.approx(1 / 3)


def test_the_figure_is_drawn_from_results_alone() -> None:
    figure = Figure()
    EXPERIMENT.draw(known(), figure)
    assert len(figure.axes) == 3
