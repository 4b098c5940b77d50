"""`diffkit demo`: one page that needs nothing else, with every registered panel."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from diffkit.cli import main
from diffkit.commands.demo import page
from diffkit.commands.panels import PANELS, Panel, Picture

ABOUT = {"model": "m", "seed": 0, "device": "cpu", "seconds": "1", "command": "c"}


class Links(HTMLParser):
    """Collects what a browser would fetch, and the order of the tags."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def quick_model(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """The tiny v-model with a card of two steps and four prompts."""
    from diffkit.models.latent_diffusion import LatentDiffusion

    LatentDiffusion.load(tiny_folder("sd-v")).save(tmp_path / "model")
    card = {"steps": 2, "example_prompts": ["one", "two", "three", "four <b>"]}
    (tmp_path / "model" / "diffkit.json").write_text(json.dumps(card))
    return tmp_path / "model"


def test_the_page_has_every_panel_and_fetches_nothing(
    quick_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["demo", "--model", str(quick_model), "--output", str(tmp_path / "demo"), "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["panels"]) == len(PANELS)
    text = Path(report["page"]).read_text()
    assert [p.name for p in (tmp_path / "demo").iterdir()] == ["index.html"]
    links = Links()
    links.feed(text)
    assert links.open == []
    assert len(links.sources) == 4 + 4 + 5 + 2 * 4 + 3 * 5
    for source in links.sources:
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (32, 32)
    assert "http" not in text
    assert "<figcaption>four &lt;b&gt;</figcaption>" in text
    for title in report["panels"]:
        assert f"<h2>{title}</h2>" in text

    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    again = Path(report["page"]).read_text()
    assert re.findall(r'src="[^"]+"', again) == re.findall(r'src="[^"]+"', text)


def test_captions_stand_below_their_pictures_in_order() -> None:
    row = tuple(Picture(Image.new("RGB", (2, 2), c), f"a {c} one") for c in ("red", "blue"))
    text = page([Panel("T", "words", "a command", (row,), (("name", "value"),))], ABOUT)
    found = re.findall(r"<figure><img src=\"([^\"]+)\"[^>]*><figcaption>([^<]+)<", text)
    assert [caption for _, caption in found] == ["a red one", "a blue one"]
    colours = [
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).getpixel((0, 0))
        for source, _ in found
    ]
    assert colours == [(255, 0, 0), (0, 0, 255)]
    assert '<th scope="row">name</th><td>value</td>' in text


def test_a_missing_model_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--model", str(tmp_path / "absent"), "--output", str(tmp_path / "demo")]
    assert main(words) == 2
    assert "no such model" in capsys.readouterr().err
    assert not (tmp_path / "demo" / "index.html").exists()


@pytest.mark.parametrize(
    ("name", "work"),
    [("flux", "25 steps of one call"), ("sd-v", "25 steps of two calls, for guidance")],
)
def test_the_model_panel_counts_the_calls_of_a_step(
    tiny_folder: Callable[[str], Path], tmp_path: Path, name: str, work: str
) -> None:
    """It said "guided steps" of two calls for Flux and unconditional models too."""
    from diffkit.commands.panels import Stage
    from diffkit.commands.panels.model import what_it_is
    from diffkit.generation.card import Card
    from diffkit.models.latent_diffusion import LatentDiffusion

    model = LatentDiffusion.load(tiny_folder(name))
    panel = what_it_is(Stage(model, str(tiny_folder(name)), (), Card(), 0, tmp_path))
    assert dict(panel.table)["work a picture"].endswith(work)
