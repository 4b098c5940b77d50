"""The hand-written package list of pyproject.toml is the tree, and every asset is packaged."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREES = {"diffkit": "diffkit", "diffkit.pipelines": "pipelines", "diffkit.assets": "assets"}


def section(name: str) -> str:
    """The text of one table of pyproject.toml (Python 3.10 has no TOML reader)."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(rf"^\[{re.escape(name)}\]\n(.*?)(?=^\[|\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"pyproject.toml has no [{name}]"
    return found[1]


def strings(name: str, key: str) -> list[str]:
    """The strings of a list in a table."""
    found = re.search(
        rf'^"?{re.escape(key)}"? = \[(.*?)\]', section(name), re.DOTALL | re.MULTILINE
    )
    assert found, f"[{name}] has no {key}"
    return re.findall(r'"([^"]+)"', found[1])


def folders() -> set[str]:
    """Every folder with Python files, as a dotted package name."""
    found = set()
    for package, top in TREES.items():
        for file in (ROOT / top).rglob("*.py"):
            parts = file.parent.relative_to(ROOT / top).parts
            assert (file.parent / "__init__.py").is_file(), f"{file.parent} lacks __init__.py"
            found.add(".".join([package, *parts]))
    return found


def test_the_package_list_is_the_tree() -> None:
    listed = strings("tool.setuptools", "packages")
    assert listed == sorted(set(listed)), "keep the list sorted and without repeats"
    assert set(listed) == folders()


def test_the_mapped_folders_are_the_top_level_ones() -> None:
    mapped = dict(re.findall(r'"([^"]+)" = "([^"]+)"', section("tool.setuptools.package-dir")))
    assert mapped == TREES


def test_every_asset_is_packaged() -> None:
    patterns = strings("tool.setuptools.package-data", "diffkit.assets")
    left_out = [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "assets").rglob("*"))
        if file.is_file()
        and file.suffix not in (".py", ".pyc")
        and not any(fnmatch(file.name, pattern.removeprefix("**/")) for pattern in patterns)
    ]
    assert not left_out, f"package-data of pyproject.toml leaves out {left_out}"
