"""`diffkit demo`: one self-contained page that shows what diffkit does, made on the spot."""

from __future__ import annotations

import base64
import io
import json
import tempfile
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkit import __version__
from diffkit.console import say, set_quiet
from diffkit.errors import UserError
from diffkit.files import atomic_write, check_writable

if TYPE_CHECKING:
    from PIL import Image

    from diffkit.commands.panels import Panel

__all__ = ["EXAMPLE_PROMPTS", "PAGE_NAME", "DemoConfig", "configs", "main", "page"]

PAGE_NAME = "index.html"

# For a model without a card; the embedded one's card names what it was trained on.
EXAMPLE_PROMPTS = (
    "a red apple, blue background",
    "a cat, green background",
    "a sunflower, white background",
    "a rocket, black background",
)


@dataclass(frozen=True)
class DemoConfig:
    """Write one HTML page with a grid of pictures and a panel for each method."""

    model: str = "embedded"
    """"embedded", a diffusers folder, a single .safetensors file, or a hub id."""

    output: Path = Path("demo")
    """Folder for index.html."""

    seed: int = 0
    """Seed of the first picture."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    overwrite: bool = False
    """Replace the page that is there."""

    json: bool = False
    """Print where the page is as JSON on stdout, and nothing else."""


def configs() -> dict[str, type]:
    """The one config of this command."""
    return {"": DemoConfig}


def main(config: DemoConfig) -> int:
    """Write the page; returns 0. See `DemoConfig`."""
    set_quiet(config.json)
    target = config.output / PAGE_NAME
    if target.exists() and not config.overwrite:
        raise UserError(f"{target}: is there already; add --overwrite or choose another --output.")
    check_writable(config.output)

    from diffkit.commands.panels import Stage, panels
    from diffkit.generation.card import read_card
    from diffkit.generation.engine import choose_device
    from diffkit.models.latent_diffusion import LatentDiffusion

    start = time.perf_counter()
    device = choose_device(config.device)
    model = LatentDiffusion.load(config.model, device=device)
    card = read_card(config.model).filled(model.family)
    prompts = card.example_prompts or EXAMPLE_PROMPTS
    made: list[Panel] = []
    with tempfile.TemporaryDirectory(prefix="diffkit-demo-") as scratch:
        stage = Stage(model, config.model, prompts, card, config.seed, Path(scratch))
        for panel in panels(stage):
            made.append(panel)
            say(f"{panel.title}: done after {time.perf_counter() - start:.1f} s")
    about = {
        "model": config.model,
        "seed": config.seed,
        "device": device,
        "seconds": f"{time.perf_counter() - start:.0f}",
        "command": f"diffkit demo --output {config.output}",
    }
    with atomic_write(target, "w") as file:
        file.write(page(made, about))
    say(f"open {target.resolve().as_uri()}")
    if config.json:
        print(json.dumps({"page": str(target), "panels": [panel.title for panel in made]}))
    return 0


def page(panels: list[Panel], about: dict[str, Any]) -> str:
    """The page's HTML: every picture inline, every text escaped, nothing fetched.

    `about` fills the head and the foot: model, seed, device, seconds, command.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True)
    environment.filters["data_uri"] = _data_uri
    template = files("diffkit.commands").joinpath("demo.html").read_text(encoding="utf-8")
    rendered = environment.from_string(template)
    return rendered.render(panels=panels, version=__version__, **about)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
