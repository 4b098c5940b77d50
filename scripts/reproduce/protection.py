"""Protected pictures of an artist against a model that edits them and learns from them.

python scripts/reproduce/protection.py --jobs 2
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from protection_parts import plan
from protection_parts.artist import pixels_of, protected, save_sheet
from protection_parts.attacks import attack_latents, versions
from protection_parts.causes import causes
from protection_parts.edits import Version, compare, encode, look_at, relative_change
from protection_parts.figure import draw
from protection_parts.mimicry import draw_pictures, learn, learnt_pictures, scores
from protection_parts.report import text
from runner.experiment import Cell, Experiment, digest
from runner.inputs import FEATURES
from runner.main import main
from runner.work import claim
from safetensors.torch import load_file, save

from diffkit.files import atomic_write
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.latent_diffusion import LatentDiffusion


def embedded() -> LatentDiffusion:
    """The embedded model, no weight of which gets a gradient."""
    model = LatentDiffusion.load("embedded")
    for network in model.networks.values():
        network.requires_grad_(False).eval()
    return model


def clean_version(cell: Cell, model: LatentDiffusion, network: FeatureNetwork) -> Version:
    """The clean pictures' edits, shared by all cells of a seed."""
    own = ("method", "levels", "arm")
    made_of = {key: value for key, value in cell.settings.items() if key not in own}
    made_of["scoring"] = dict(cell.scoring)
    path = cell.work.parent / f"clean-{cell.seed}-{digest(made_of)[:8]}.safetensors"
    with claim(path, wait=True):
        if not path.exists():
            pixels = pixels_of(protected())
            found = look_at(model, network, pixels, None, cell.settings, cell.seed)
            with atomic_write(path) as file:
                file.write(save({name: value.contiguous() for name, value in found.items()}))
    return load_file(path)


def edit(cell: Cell, model: LatentDiffusion, network: FeatureNetwork) -> dict[str, Any]:
    """Edits of the version's pictures beside those of the clean ones."""
    clean = clean_version(cell, model, network)
    pixels, z, stats = None, None, {}
    if cell.settings["method"] == plan.LATENT:
        # as far, relatively, as AdvDM moved the pixels of the same pictures
        twin = EXPERIMENT.cell(plan.edit_arm("advdm", cell.settings["levels"]), cell.seed)
        twin = replace(twin, work=cell.work.parent / twin.work.name)
        change = relative_change(versions(model, twin)[0], clean["pixels"])
        options = cell.settings["attack"]
        z = attack_latents(model, encode(model, clean["pixels"]), change, cell.seed, **options)
    else:
        pixels, stats = versions(model, cell)
    version = look_at(model, network, pixels, z, cell.settings, cell.seed)
    values = compare(version, clean, cell.settings)
    if "mean_change" in stats:
        values["mean_change"] = sum(stats["mean_change"]) / len(stats["mean_change"])
    return values


def mimic(cell: Cell, model: LatentDiffusion, network: FeatureNetwork) -> dict[str, Any]:
    """How near a mimic that learnt from the version's pictures comes to the artist's style."""
    lora = None
    if cell.settings["method"] != "none":
        version, _ = versions(model, cell)
        pixels = learnt_pictures(pixels_of(protected()), version, cell.settings["share"])
        lora = learn(cell, pixels)
    pictures = draw_pictures(model, cell.settings, cell.seed, lora)
    save_sheet(pictures, cell.work / "sheet.png")
    return scores(network, pictures)


def cause(cell: Cell, model: LatentDiffusion) -> dict[str, Any]:
    """What stronger and stronger purifiers leave, in latents and in edits."""
    pixels, _ = versions(model, cell)
    return causes(model, pixels_of(protected()), pixels, cell.settings, cell.seed)


def run(cell: Cell) -> dict[str, Any]:
    """Make one cell."""
    if cell.settings["kind"] == "cause":
        return cause(cell, embedded())
    network = FeatureNetwork.load(FEATURES)
    part = edit if cell.settings["kind"] == "edit" else mimic
    return part(cell, embedded(), network)


EXPERIMENT = Experiment(
    name="protection",
    title="Protection against editing and mimicry, on a small model",
    arms=plan.ARMS,
    seeds=plan.SEEDS,
    fewer=plan.FEWER,
    settings=plan.SETTINGS,
    scoring=plan.SCORING,
    run=run,
    text=text,
    draw=draw,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
