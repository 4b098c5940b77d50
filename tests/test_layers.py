"""Imports point one way: nothing imports upward, and parts of a layer do not import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Low to high. Each part may import the parts of the lines above its own.
LAYERS = (
    {"errors"},
    {"files", "randomness", "console", "assets"},
    {"kernels"},
    {"models"},
    {"perceptual", "rewards", "data"},
    {"generation"},
    {"objectives", "compression", "score_distillation", "protection"},
    {"training", "evaluation"},
    {"audit"},
    {"commands"},
    {"cli", "pipelines"},
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# The four bottom files are small tools of one another.
BOTTOM = LAYERS[1]


def part_of(module: str) -> str | None:
    """The part of diffkit that a dotted name belongs to; None for the package itself and others."""
    names = module.split(".")
    return names[1] if names[0] == "diffkit" and len(names) > 1 else None


def imported(source: str, package: str) -> set[str]:
    """Every module named by an import of the source, those inside functions included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")
                anchor = anchor[: len(anchor) - node.level + 1]
                base = ".".join([*anchor, *filter(None, [node.module])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def violations(source: str, module: str, package: str) -> list[str]:
    """What the module may not import, each as `importer -> imported`."""
    mine = part_of(module)
    if mine is None:
        return []
    wrong = []
    for name in sorted(imported(source, package)):
        other = part_of(name)
        if other in (None, mine) or other not in LEVEL:
            continue
        downward = LEVEL[other] < LEVEL[mine]
        neighbours = {mine, other} <= BOTTOM
        if not (downward or neighbours):
            wrong.append(f"{module} -> {name}")
    return wrong


def modules() -> list[tuple[Path, str, str]]:
    """(file, module, package) of the whole library."""
    found = []
    for top, prefix in (("diffkit", "diffkit"), ("pipelines", "diffkit.pipelines")):
        for file in sorted((ROOT / top).rglob("*.py")):
            names = [prefix, *file.relative_to(ROOT / top).with_suffix("").parts]
            if names[-1] == "__init__":
                module = package = ".".join(names[:-1])
            else:
                module, package = ".".join(names), ".".join(names[:-1])
            found.append((file, module, package))
    return found


def test_every_part_has_one_layer() -> None:
    assert len(LEVEL) == sum(len(parts) for parts in LAYERS)
    parts = {part_of(module) for _, module, _ in modules()} - {None}
    assert parts <= set(LEVEL), f"give these a layer: {sorted(parts - set(LEVEL))}"


def test_nothing_imports_upward() -> None:
    wrong = [
        line
        for file, module, package in modules()
        for line in violations(file.read_text(), module, package)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("diffkit.models.codec", "from diffkit.errors import UserError", 0),
        ("diffkit.models.codec", "from diffkit import training", 1),
        ("diffkit.models.codec", "def f():\n    import diffkit.training.trainer", 1),
        ("diffkit.models.codec", "from ..data import folder", 2),
        ("diffkit.models.codec", "from .schedule import Schedule", 0),
        ("diffkit.objectives.denoising", "import diffkit.protection.losses", 1),
        ("diffkit.data.cache", "from diffkit.rewards.base import score", 2),
        ("diffkit.cli", "import diffkit.commands.train", 0),
        ("diffkit.commands.train", "import diffkit.pipelines", 1),
        ("diffkit.models.codec", "import diffusers.training", 0),
    ],
)
def test_the_check_itself(module: str, source: str, expected: int) -> None:
    package = module.rpartition(".")[0]
    assert len(violations(source, module, package)) == expected
