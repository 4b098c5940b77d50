"""A whole job: shares of several processes, what they gather, and one set of bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from diffkit.generation.run import Processes
from diffkit.protection.job import Request, plan_job
from diffkit.protection.run import run_job
from diffkit.protection.settings import Settings
from tests.protection.gallery import encoded, make_gallery, noise
from tests.training.test_processes import launch


@pytest.fixture
def request_of(tmp_path: Path) -> Request:
    """Five pictures, the last of them broken, for the control."""
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(5):
        data = encoded(Image.fromarray(noise(index, 16)), "PNG")
        (folder / f"{index}.png").write_bytes(data if index < 4 else data[:100])
    return Request((folder,), tmp_path / "out", Settings("random"))


def test_the_outcome_names_what_came_of_every_file(request_of: Request) -> None:
    outcome = run_job(plan_job(request_of, {}), request_of, None)
    assert [path.name for path in outcome.made] == ["0.png", "1.png", "2.png", "3.png"]
    assert [Path(path).name for path in outcome.failed] == ["4.png"]
    assert (outcome.kept, outcome.skipped) == (0, ())
    again = run_job(plan_job(request_of, {}), request_of, None)
    assert (again.made, again.kept, len(again.failed)) == ((), 4, 1)


def test_no_process_writes_before_all_have_planned(request_of: Request) -> None:
    """One that planned later once saw less to do, took other shares, and left pictures out."""
    seen: list[bool] = []
    alone = Processes(wait=lambda: seen.append(any(request_of.output.glob("*.png"))))
    run_job(plan_job(request_of, {}), request_of, None, processes=alone)
    assert seen[0] is False and seen[-1] is True


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--method", "sds-"], ["--method", "ace", "--rounds", "2"]])
def test_two_processes_give_the_bytes_of_one(
    tiny_sd: Path, tmp_path: Path, words: list[str]
) -> None:
    """Under `accelerate launch`; a set is the share of one process."""
    roots = [make_gallery(tmp_path / name, 9, 16).root for name in ("x", "y")]
    for path in list(roots[1].rglob("*.*")):
        if path.is_file():
            path.rename(path.with_name(f"y {path.name}"))
    found = []
    for count in (1, 2):
        output = tmp_path / f"out {count}"
        flags = ["--output", output, "--model", tiny_sd, "--steps", "2", "--device", "cpu", *words]
        codes, said = launch(count, ["-m", "diffkit.cli", "protect", *roots, *flags])
        assert codes == [1] * count, said  # one picture of each gallery is cut off
        assert "16 pictures protected" in said, said
        files = [path for path in output.rglob("*") if path.is_file()]
        found.append({str(path.relative_to(output)): path.read_bytes() for path in files})
    assert len(found[0]) == 2 * 2 * 8
    assert found[0] == found[1]
