"""A wheel holds the library, its command, the pipelines and the assets, and works on its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("diffkit", "pipelines", "assets", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built offline from a copy, so that no stale build folder can add to it."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, source / part, ignore=ignore)
        else:
            shutil.copy(ROOT / part, source / part)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--quiet", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(place)]
    subprocess.run(command, check=True)
    return next(place.glob("*.whl"))


def expected(top: str, package: str) -> set[str]:
    """The files of a top-level folder, as the wheel should name them."""
    return {
        f"{package}/{file.relative_to(ROOT / top).as_posix()}"
        for file in (ROOT / top).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.mark.slow
def test_the_wheel_holds_everything(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for top, package in (
        ("diffkit", "diffkit"),
        ("pipelines", "diffkit/pipelines"),
        ("assets", "diffkit/assets"),
    ):
        missing = expected(top, package) - names
        assert not missing, f"the wheel lacks {sorted(missing)}"
    inside = {name for name in names if not name.startswith("diffkit-")}
    assert all(name.startswith("diffkit/") for name in inside), "only diffkit is installed"


@pytest.mark.slow
def test_an_installed_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", str(wheel), "--quiet", "--no-index"]
    subprocess.run([*command, "--no-deps", "--target", str(target)], check=True)
    script = (
        "import diffkit, diffkit.pipelines, diffkit.assets, diffkit.cli\n"
        "print(diffkit.__file__)\n"
        "print(diffkit.assets.path('model'))\n"
        "raise SystemExit(diffkit.cli.main(['--help']))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()[:2]
    assert first == str(target / "diffkit" / "__init__.py")
    assert second == str(target / "diffkit" / "assets" / "model")
    assert (target / "bin" / "diffkit").is_file()
