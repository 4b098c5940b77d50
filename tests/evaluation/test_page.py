"""report.html: complete, bounded, self-contained, escaped, and quiet in a browser."""

from __future__ import annotations

import base64
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffkit.evaluation.cost_table import cost_groups
from diffkit.evaluation.page import _whisker, write_page
from diffkit.evaluation.wording import (
    amount,
    command_line,
    estimate_text,
    number,
    storage,
    verdict,
)

EVIL = '<script>alert("x")</script> & apple'
VOID = {"meta", "img", "br"}


def around(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def metric(name: str, kind: str, better: str | None, a: float, b: float | None, half: float) -> Any:
    values = {"model": around(a, half)}
    if b is not None:
        values["against"] = around(b, half)
    return {
        "name": name,
        "label": f"the {name} (network of {name})",
        "about": f"What {name} says.",
        "kind": kind,
        "better": better,
        "extractor": f"network of {name}",
        "resize": f"rule of {name}",
        "n": 1234,
        "n_reference": 5678 if name == "frechet" else None,
        "resamples": 1000,
        "seed": 77,
        "note": "",
        "values": values,
        "difference": None if b is None else around(a - b, half),
    }


def cost(steps: int) -> dict[str, Any]:
    seconds = {"text": 0.004, "denoiser": 0.03, "decode": 0.02, "picture": 0.03 + 0.03 * steps}
    return {
        "device": "cpu, 1 thread",
        "dtype": "fp32",
        "size": [16, 16],
        "batch_size": 4,
        "steps": steps,
        "guided": True,
        "parameters": {"unet": 2_000_000, "vae": 1_000_000},
        "macs": {"text": 10, "denoiser": 20, "decode": 30, "picture": 40 + 20 * steps},
        "seconds": {key: around(value, 0.001) for key, value in seconds.items()},
        "pictures_per_second": 10 / steps,
        "peak_memory_bytes": 3 * 2**30,
    }


def about(name: str, kind: str) -> dict[str, Any]:
    facts = dict.fromkeys(("family", "steps", "guidance", "scheduler", "weights"))
    return {"name": name, "kind": kind, "loras": [], "folder": "model", **facts}


def evaluation(
    folder: Path,
    groups: int = 3,
    per_group: int = 2,
    two: bool = True,
    kind: str = "model",
    side: int = 16,
    shift: float = -0.1,
    plots: bool = True,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A report and its samples, with every picture a noise of its own."""
    roles = ("model", "against") if two else ("model",)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, side, side, 3), np.uint8)
    samples = []
    for i in range(groups * per_group):
        pictures = {role: f"{role}/{i % 4:05d}.png" for role in roles}
        base = 0.3 + 0.01 * (i % 7)
        values: dict[str, Any] = {"alignment": {"model": base + shift * (i % 3)}}
        if two:
            values["alignment"]["against"] = base
            values["psnr"] = {"model": 20.0 + i}
        prompt = "" if kind == "pictures" else (EVIL if i < per_group else f"prompt {i}")
        row = {"index": i, "prompt": prompt, "group": i // per_group}
        samples.append({**row, "pictures": pictures, "values": values})
    for role in roles:
        (folder / role).mkdir(parents=True)
        for i, picture in enumerate(pixels):
            Image.fromarray(picture).save(folder / role / f"{i:05d}.png")
    half = 0.05 if shift else 0.0
    other = [0.3 - shift, 30.0, 0.5] if two else [None] * 3
    metrics = [
        metric("alignment", "sample", "higher", 0.3, other[0], half),
        metric("frechet", "set", "lower", 30 + 10 * shift, other[1], half),
        metric("high_frequency", "set", None, 0.5 + shift / 10, other[2], half),
    ]
    if two:
        metrics.append(metric("psnr", "sample", "higher", 20.0, None, 1.0))
    costs = {role: cost(steps) for role, steps in zip(roles, (4, 25))}
    power = {role: [0.0, -1.0, -2.0 - i] for i, role in enumerate((*roles, "reference"))}
    report = {
        "diffkit": "0.1.0",
        "created": "2026-01-02T03:04:05+00:00",
        "command": {"model": "my model", "num": 6},
        "sets": {role: about(f"the {role}", kind) for role in roles},
        "reference": {"source": "real", "n": 5678},
        "n": len(samples),
        "prompts": groups,
        "prompts_from": "a file",
        "per_prompt": per_group,
        "pairing": "noises" if two else None,
        "seed": 77,
        "level": 0.95,
        "resamples": 1000,
        "metrics": metrics,
        "skipped": [{"name": "lpips", "reason": "needs a <package>"}],
        "spectra": {"frequency": [0.1, 0.5, 1.0], "sets": power} if plots else None,
        "cost": costs if kind == "model" and plots else None,
    }
    return report, samples


class Page(HTMLParser):
    """Checks the nesting while it collects tags with their attributes, and the visible text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str, key: str) -> list[str]:
        return [attrs.get(key) or "" for name, attrs in self.tags if name == tag]


Parse = Callable[..., Page]


@pytest.fixture
def parse(tmp_path: Path) -> Parse:
    def write(**kwargs: Any) -> Page:
        report, samples = evaluation(tmp_path, **kwargs)
        return Page(write_page(report, samples, tmp_path).read_text(encoding="utf-8"))

    return write


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("pair")
    report, samples = evaluation(folder)
    return Page(write_page(report, samples, folder).read_text(encoding="utf-8"))


def check_whole(page: Page) -> None:
    """What every page keeps to, whatever it shows."""
    ids = Counter(attrs["id"] for _, attrs in page.tags if "id" in attrs)
    assert [name for name, count in ids.items() if count > 1] == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all(source.startswith("data:image/") for source in page.all("img", "src"))
    assert all(page.all("img", "alt"))
    for target in page.all("a", "href"):
        assert target[1:] in ids if target.startswith("#") else target.startswith("model/")
    plots = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in plots)
    used = [
        attrs.get("xlink:href") or attrs.get("href") for tag, attrs in page.tags if tag == "use"
    ]
    assert used and all(name and name[1:] in ids for name in used)


def test_a_comparison_is_whole_and_fetches_nothing(pair: Page) -> None:
    check_whole(pair)
    assert not re.search(r"https?:", pair.text)


def test_a_prompt_stays_text(pair: Page) -> None:
    assert EVIL in pair.text
    assert f"candidate, picture 0, {EVIL}" in pair.all("img", "alt")
    assert "needs a <package>" in pair.text


def test_each_number_carries_what_it_was_measured_with(pair: Page) -> None:
    for name in ("alignment", "high_frequency", "psnr"):
        facts = (
            f"n 1,234, seed 77, 1,000 resamplesextractor: network of {name}resize: rule of {name}"
        )
        assert facts in pair.text
    assert "n 1,234, reference n 5,678, seed 77" in pair.text
    assert "0.2500.200 to 0.300" not in pair.text
    assert "0.3000.250 to 0.350" not in pair.text
    assert "0.300.25 to 0.35" in pair.text  # two digits of the interval's width
    assert "−0.10−0.15 to −0.05clearly worse" in pair.text
    assert "1,000 resamples" in pair.text and "95 %" in pair.text


def test_the_summary_sorts_changes_without_one_verdict(pair: Page) -> None:
    text = " ".join(pair.text.split())
    assert "Clearly better: The frechet. Clearly worse: The alignment." in text
    assert "Undecided: The high_frequency." in text
    assert "the same 3 prompts (a file) from the same noises" in text
    assert "of 3 comparisons about 0.2 would look clear by chance" in text


def test_the_pictures_of_a_pair_stand_side_by_side(pair: Page) -> None:
    first = pair.all("img", "alt")[:4]
    assert [text.split(", ")[:2] for text in first] == [
        ["candidate", "picture 0"],
        ["baseline", "picture 0"],
        ["candidate", "picture 1"],
        ["baseline", "picture 1"],
    ]
    assert pair.text.index("Greatest losses") < pair.text.index("picture 5: 0.350 → 0.150 (−0.200)")
    assert "Furthest from the baseline" in pair.text


def test_small_pictures_keep_their_pixels_and_grow_by_a_whole_factor(parse: Parse) -> None:
    page = parse(side=24, plots=False)
    head, _, data = page.all("img", "src")[0].partition(",")
    assert head == "data:image/png;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    expected = np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), np.uint8)[0]
    np.testing.assert_array_equal(shown, expected)
    assert page.all("img", "width")[0] == "120"
    assert page.all("img", "class")[0] == "pixelated"


def test_the_page_is_bounded_whatever_the_number_of_pictures(parse: Parse) -> None:
    page = parse(groups=300, per_group=6, plots=False)
    assert len(page.all("img", "src")) <= 10 * 4 * 2 + 2 * 2 * 4 * 2
    assert "10 of 300 prompts" in page.text
    assert "prompt 1794" in page.text  # the last prompt is among them


def test_large_pictures_become_thumbnails_that_lead_to_their_files(parse: Parse) -> None:
    page = parse(two=False, side=600, plots=False)
    check_whole(page)
    head, _, data = page.all("img", "src")[0].partition(",")
    assert head == "data:image/jpeg;base64"
    assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) == 392
    assert page.all("img", "width")[0] == "224"
    assert "model/00000.png" in page.all("a", "href")


def test_one_set_alone(parse: Parse) -> None:
    page = parse(two=False)
    check_whole(page)
    assert "baseline" not in page.text and "clearly" not in page.text
    assert "Worst" in page.text and "--against" in page.text


def test_a_folder_of_pictures_without_prompts_models_or_costs(parse: Parse) -> None:
    page = parse(two=False, kind="pictures", groups=60, per_group=1)
    check_whole(page)
    assert "seed 77 +" not in page.text and "Multiply" not in page.text
    assert len(page.all("img", "src")) == 20 + 8


def test_sets_that_nothing_pairs_are_shown_apart(tmp_path: Path) -> None:
    report, samples = evaluation(tmp_path, groups=4, per_group=1, plots=False)
    apart = [
        {
            **row,
            "pictures": {role: row["pictures"][role]},
            "values": {"alignment": {role: row["values"]["alignment"][role]}},
        }
        for role in ("model", "against")
        for row in samples
    ]
    report["pairing"] = "none"
    report["metrics"] = report["metrics"][:3]
    page = Page(write_page(report, apart, tmp_path).read_text(encoding="utf-8"))
    check_whole(page)
    assert "4 pictures of the candidate, the model, with 4 of the baseline" in " ".join(
        page.text.split()
    )
    assert "Nothing pairs" in page.text and "Greatest losses" not in page.text
    first = [text[: len("candidate, picture 0")] for text in page.all("img", "alt")[:8:4]]
    assert first == ["candidate, picture 0", "baseline, picture 0,"]


def test_a_model_against_itself_has_neither_losses_nor_gains(parse: Parse) -> None:
    page = parse(shift=0.0, plots=False)
    check_whole(page)
    assert "Exactly equal: 3" in page.text
    assert "Clearly" not in page.text and "Greatest" not in page.text
    assert "Equal in every picture: The alignment." in page.text


def test_nothing_needs_a_display() -> None:
    program = (
        "import sys, diffkit.evaluation.page; raise SystemExit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(
    ("low", "high", "better", "expected"),
    [
        (0.1, 0.3, "higher", "better"),
        (0.1, 0.3, "lower", "worse"),
        (-0.3, -0.1, "higher", "worse"),
        (-0.3, -0.1, "lower", "better"),
        (-0.3, -0.1, None, "changed"),
        (-0.1, 0.3, "higher", "undecided"),
        (0.0, 0.3, "higher", "undecided"),
        (0.0, 0.0, "higher", "equal"),
    ],
)
def test_verdicts(low: float, high: float, better: str | None, expected: str) -> None:
    difference = {"value": (low + high) / 2, "low": low, "high": high}
    assert verdict(difference, better) == expected
    assert verdict(None, better) is None


def test_numbers_are_rounded_to_their_intervals() -> None:
    assert estimate_text({"value": 0.31234, "low": 0.3051, "high": 0.3196}) == (
        "0.312",
        "0.305 to 0.320",
    )
    assert estimate_text(around(-1234.5, 30), signed=True) == ("−1,234", "−1,264 to −1,204")
    assert estimate_text(around(0.25, 0.0), signed=True) == ("+0.25", "+0.25 to +0.25")
    assert number(float("inf")) == "∞" and number(None) == "undefined"
    assert [amount(x) for x in (7, 999, 1234, 999_999, 12_345_678, 3.3e9)] == [
        "7",
        "999",
        "1.23 k",
        "1.00 M",
        "12.3 M",
        "3.30 G",
    ]
    assert storage(700 * 2**20) == "700 MiB" and storage(3 * 2**29) == "1.50 GiB"


def test_the_command_can_be_pasted() -> None:
    flags = {
        "model": "my model",
        "metrics": ["frechet", "alignment"],
        "per_prompt": 4,
        "lora": ["one:0.5", "two"],
        "output": "a b",
    }
    assert shlex.split(command_line(flags)) == [
        *("diffkit", "evaluate", "my model", "--metrics", "frechet", "alignment"),
        *("--per-prompt", "4", "--lora", "one:0.5", "--lora", "two", "--output", "a b"),
    ]


def test_costs_are_set_side_by_side() -> None:
    found = {
        group.title: group.rows for group in cost_groups({"model": cost(4), "against": cost(25)})
    }
    times = {row.label: row for row in found["Time for one picture, drawn alone"]}
    assert times["one denoising step"].cells[0] == ("30.0 ms", "29.0 to 31.0")
    assert times["whole picture"].ratio == "0.19×"
    assert found["In batches"][0].ratio == "6.25×"
    assert found["Parameters"][0].cells == (("3.00 M", ""), ("3.00 M", ""))


def test_a_stage_or_a_memory_that_one_model_lacks_is_left_open() -> None:
    pixel = cost(4) | {"peak_memory_bytes": None}
    del pixel["seconds"]["decode"], pixel["macs"]["decode"]
    groups = cost_groups({"model": pixel, "against": cost(4)})
    decode = [row for group in groups for row in group.rows if row.label == "decoding"]
    assert [(row.cells[0][0], row.ratio) for row in decode] == [("–", ""), ("–", "")]
    assert not [row for group in groups for row in group.rows if row.label == "peak memory"]
    assert cost_groups(None) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_has_nothing_to_complain_about(tmp_path: Path) -> None:
    """No line in the console, and no sideways scrolling on a phone and on a desk."""
    report, samples = evaluation(tmp_path)
    text = write_page(report, samples, tmp_path).read_text(encoding="utf-8")
    root = "document.documentElement"
    tell = f"parent.postMessage(innerWidth + ': ' + ({root}.scrollWidth <= innerWidth), '*')"
    child, frames = tmp_path / "child.html", tmp_path / "frames.html"
    child.write_text(text.replace("</body>", f"<script>{tell}</script></body>"), encoding="utf-8")
    listen = "onmessage = said => document.body.append(said.data, '; ')"
    shown = "".join(
        f'<iframe src="child.html" width="{w}" height="900"></iframe>' for w in (420, 1300)
    )
    frames.write_text(f"<body><script>{listen}</script>{shown}</body>", encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --enable-logging=stderr"
    flags += " --v=0 --virtual-time-budget=5000 --dump-dom"
    words = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", frames.as_uri()]
    run = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in run.stderr
    assert "420: true; " in run.stdout and "1300: true; " in run.stdout


def test_a_value_beside_its_interval_stays_on_its_axis() -> None:
    """A pivotal interval takes out the bias of finite n; the dot once lay outside the plot."""
    for given in ({"value": 30.0, "low": 5.0, "high": 12.0}, {"value": -4, "low": -3, "high": -2}):
        shown = _whisker(given, "lower", compared=False)
        assert all(0 <= x <= 200 for x in (shown.low, shown.high, shown.value, shown.zero))
