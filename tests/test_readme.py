"""What the README shows works, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(tiny_sd: Path) -> None:
    """As written, but on a tiny model of 32x32 pixels."""
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example
    source = example[1].replace('"embedded"', repr(str(tiny_sd))).replace("64, 64", "32, 32")
    names: dict[str, object] = {}
    exec(source, names)
    assert names["image"].shape == (1, 3, 32, 32)


def test_the_example_of_a_distance_of_latents_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (source,) = (block for block in blocks if "ELatentLpips" in block)
    names: dict[str, Any] = {}
    exec(source, names)
    assert names["loss"].shape == (4,) and (names["loss"] > 0).all()


def test_every_command_is_in_the_table() -> None:
    from diffkit.cli import COMMANDS

    shown = set(re.findall(r"^\| `diffkit (\w+)", README, re.MULTILINE))
    assert shown == set(COMMANDS)


def test_every_link_leads_somewhere() -> None:
    for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            assert link.startswith("https://") or (ROOT / link).exists(), f"{name}: {link}"


def test_the_tree_names_every_folder() -> None:
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)
    assert tree
    shown = set(re.findall(r"^ *(\w+)/", tree[1], re.MULTILINE))
    tops = {"diffkit", "pipelines", "assets", "scripts", "tests"}
    inside = {path.parent.name for path in (ROOT / "diffkit").glob("*/__init__.py")}
    inside |= {path.name for path in (ROOT / "scripts").iterdir() if any(path.glob("*.py"))}
    assert shown == tops | inside


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    documents = README + (ROOT / "CONTRIBUTING.md").read_text()
    targets = re.findall(r"(?:`|^)make ([a-z-]+)", documents, re.MULTILINE)
    assert {"demo", "test", "lint"} <= set(targets)
    for target in targets:
        assert f"\n{target}:" in makefile, target


def test_what_a_protection_is_not_stands_in_full() -> None:
    from diffkit.protection.notice import notice

    words = " ".join(README.replace("\n* ", "\n").split())
    assert " ".join(notice("the model that you name")) in words


def test_every_protection_method_is_in_the_table() -> None:
    from diffkit.protection.methods import METHODS

    section = README.split("## Protecting pictures")[1].split("\n## ")[0]
    shown = re.findall(r"^\| (\S+) \| (.+?) \| .+ \|$", section, re.MULTILINE)
    assert [(m.name, m.words) for m in METHODS.values()] == [x for x in shown if x[0] in METHODS]
