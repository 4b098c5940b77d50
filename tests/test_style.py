"""Small files and small functions: the limits of CONTRIBUTING.md, checked on the tree."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE_LIMIT, MEDIAN_LIMIT = 500, 180
FUNCTION_LIMIT, P90_LIMIT = 100, 45


def sources(*tops: str) -> list[Path]:
    return [file for top in tops for file in sorted((ROOT / top).rglob("*.py"))]


def functions(file: Path) -> list[tuple[str, int]]:
    """(file:line name, lines) of every function, decorators not counted."""
    return [
        (f"{file.relative_to(ROOT)}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
    ]


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def test_no_file_is_long() -> None:
    every = sources("diffkit", "pipelines", "scripts", "assets", "tests")
    long = [
        f"{file.relative_to(ROOT)}: {lines(file)}" for file in every if lines(file) > FILE_LIMIT
    ]
    assert not long, f"over {FILE_LIMIT} lines: {long}"


def test_the_median_file_is_short() -> None:
    sizes = [lines(file) for file in sources("diffkit", "pipelines")]
    assert statistics.median(sizes) <= MEDIAN_LIMIT


def test_no_function_is_long() -> None:
    found = [
        pair for file in sources("diffkit", "pipelines", "scripts") for pair in functions(file)
    ]
    long = [f"{name}: {size}" for name, size in found if size > FUNCTION_LIMIT]
    assert not long, f"over {FUNCTION_LIMIT} lines: {long}"


def test_nine_functions_of_ten_are_short() -> None:
    found = [pair for file in sources("diffkit", "pipelines") for pair in functions(file)]
    found.sort(key=lambda pair: pair[1])
    name, size = found[int(0.9 * (len(found) - 1))]
    longest = [f"{name}: {size}" for name, size in found[-10:]]
    assert size <= P90_LIMIT, f"the 90th percentile is {size} ({name}); the longest: {longest}"
