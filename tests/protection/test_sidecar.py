"""A run that was killed goes on; what is finished stays; what is foreign is not touched."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from diffkit import files
from diffkit.errors import UserError
from diffkit.protection import sidecar
from diffkit.protection.sidecar import (
    Sidecar,
    parameter_digest,
    publish,
    read_sidecar,
    remove_leftovers,
    sidecar_path,
    state,
)

DATA = b"the bytes of a picture"
INPUT, JOB = "1" * 64, "2" * 64


class Killed(BaseException):
    """Stands for the end of the process: no handler of ours may catch it."""


def record(data: bytes = DATA, **changes: object) -> Sidecar:
    base = Sidecar(
        method="texture",
        levels=8,
        steps=100,
        model="org/name",
        model_revision="abc",
        target="checker",
        prompt="a picture",
        seed=7,
        input_sha256=INPUT,
        output_sha256=hashlib.sha256(data).hexdigest(),
        parameter_sha256=JOB,
        views=2,
        working_sizes=((512, 768), (512, 512)),
        max_delta=8.0,
        mean_delta=4.5,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def write(output: Path) -> None:
    publish(output, DATA, record())


def test_a_finished_result_is_done_until_something_changes(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "x.v1.png"
    assert state(output, INPUT, JOB) == "missing"
    write(output)
    assert sorted(os.listdir(output.parent)) == ["x.v1.png", "x.v1.png.json"]
    assert output.read_bytes() == DATA
    assert state(output, INPUT, JOB) == "done"
    assert state(output, "3" * 64, JOB) == state(output, INPUT, "3" * 64) == "other"
    output.write_bytes(DATA + b"!")
    assert state(output, INPUT, JOB) == "other"
    output.unlink()
    assert state(output, INPUT, JOB) == "missing"  # only our own record is left


def test_strangers_and_torn_files(tmp_path: Path) -> None:
    output = tmp_path / "x.png"
    output.write_bytes(DATA)
    assert state(output, INPUT, JOB) == "other"
    sidecar_path(output).write_text('{"kind": "diffkit prot')
    assert state(output, INPUT, JOB) == "other"
    output.unlink()
    assert state(output, INPUT, JOB) == "missing"
    sidecar_path(output).write_text('{"mine": 1}')
    assert state(output, INPUT, JOB) == "other"
    sidecar_path(output).unlink()
    output.mkdir()
    assert state(output, INPUT, JOB) == "other"
    output.rmdir()
    output.symlink_to("nowhere")
    assert state(output, INPUT, JOB) == "other"


def die_at(moment: int, output: Path) -> None:
    """Publish in a process that ends, without any clean-up, before its call `moment` to the disk.

    The calls are the sync, the rename and the folder's sync of marker, picture and sidecar, and
    the removal of the marker.
    """
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 9 << 8
        return
    calls = iter(range(moment + 1))

    def counted(plain: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            if next(calls) == moment:
                os._exit(9)
            plain(*arguments)

        return call

    for name in ("replace", "fsync", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    try:
        write(output)
    finally:
        os._exit(1)


@pytest.mark.parametrize("moment", range(10))
def test_killed_at_any_moment_ends_with_the_same_bytes(tmp_path: Path, moment: int) -> None:
    output = tmp_path / "x.png"
    die_at(moment, output)
    recorded = sidecar_path(output).exists()
    assert (output.exists(), recorded) == (moment > 4, moment > 7)
    assert len(list(tmp_path.glob(".partial-*"))) == (moment in (0, 1, 3, 4, 6, 7))
    assert state(output, INPUT, JOB) == ("done" if recorded else "missing")
    # another job must not take over what is there
    assert state(output, INPUT, "9" * 64) == ("other" if output.exists() else "missing")
    if not recorded:
        write(output)
    assert state(output, INPUT, JOB) == "done" and output.read_bytes() == DATA
    remove_leftovers(tmp_path, age=0)
    assert sorted(os.listdir(tmp_path)) == ["x.png", "x.png.json"]


@pytest.mark.parametrize("moment", range(10))
def test_killed_while_it_replaced_a_result_of_another_job(tmp_path: Path, moment: int) -> None:
    """The old result is either whole and refused as before, or ours to finish."""
    output = tmp_path / "x.png"
    publish(output, b"old", record(b"old", parameter_sha256="8" * 64))
    die_at(moment, output)
    expected = "other" if moment < 5 else "missing" if moment < 8 else "done"
    assert state(output, INPUT, JOB) == expected
    assert state(output, INPUT, "8" * 64) == ("done" if moment < 5 else "other")


def test_a_picture_put_there_after_the_marker_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "x.png"
    with monkeypatch.context() as patch:
        patch.setattr(sidecar, "atomic_write", lambda path: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            write(output)
    output.write_bytes(b"a stranger's")
    assert state(output, INPUT, JOB) == "other"
    assert remove_leftovers(tmp_path, age=0) == 1
    assert os.listdir(tmp_path) == ["x.png"]


def test_leftovers_of_others_at_work_stay(tmp_path: Path) -> None:
    output = tmp_path / "x.png"
    write(output)
    (tmp_path / ".partial-abc").write_bytes(b"half")
    (tmp_path / ".mine.diffkit-part").write_text("not ours")
    assert remove_leftovers(tmp_path) == 0
    assert remove_leftovers(tmp_path / "none") == 0
    assert remove_leftovers(tmp_path, age=0) == 1
    assert sorted(os.listdir(tmp_path)) == [".mine.diffkit-part", "x.png", "x.png.json"]


def test_a_marker_that_still_proves_something_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "x.png"
    write_json = files.write_json
    with monkeypatch.context() as patch:

        def until_record(path: Path, value: object) -> None:
            if path == sidecar_path(output):
                raise Killed
            write_json(path, value)

        patch.setattr(sidecar, "write_json", until_record)
        with pytest.raises(Killed):
            write(output)
    assert remove_leftovers(tmp_path, age=0) == 0
    assert state(output, INPUT, JOB) == "missing"


def test_the_record_survives_and_is_strict_json(tmp_path: Path) -> None:
    output = tmp_path / "x.png"
    wanted = record(
        psnr=math.inf, ssim=0.9, loss_first=math.nan, effect={"sdedit": {"interval": (1.0, 2.0)}}
    )
    publish(output, DATA, wanted)
    text = sidecar_path(output).read_text()
    values = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert values["psnr"] is None and values["lpips"] is None and values["loss_first"] is None
    assert values["purification"] == "not measured" and values["tool_version"]
    found = read_sidecar(output)
    assert found == dataclasses.replace(
        wanted, psnr=None, loss_first=None, effect={"sdedit": {"interval": [1.0, 2.0]}}
    )
    with pytest.raises(ValueError, match="other output bytes"):
        publish(output, b"?", wanted)
    sidecar_path(output).write_text('{"kind": "diffkit protection", "method": "mist"}')
    with pytest.raises(UserError, match="misses"):
        read_sidecar(output)
    sidecar_path(output).write_text("[]")
    with pytest.raises(UserError, match="not the record"):
        read_sidecar(output)


def test_no_absolute_path_is_recorded(tmp_path: Path) -> None:
    values = record(
        model="/drive/mine/my models/mine",
        target="C:\\pictures\\t.png",
        prompt="/imagine a cat",
        notices=("mask ~/masks/m.png and /a/b.png; see https://x.org/y, 1 / 2, and/or",),
        effect={"source": str(tmp_path / "e.json")},
    ).as_json()
    assert (values["model"], values["target"]) == ("mine", "t.png")
    assert values["prompt"] == "/imagine a cat"
    assert values["notices"] == ["mask m.png and b.png; see https://x.org/y, 1 / 2, and/or"]
    assert values["effect"] == {"source": "e.json"}
    assert record(model="org/name").as_json()["model"] == "org/name"


def test_parameters_are_canonical() -> None:
    one = parameter_digest({"levels": 8, "views": (1, 2), "more": {"a": 1, "b": None}})
    assert one == parameter_digest({"more": {"b": None, "a": 1.0}, "views": [1, 2], "levels": 8.0})
    assert one != parameter_digest({"levels": 9, "views": [1, 2], "more": {"a": 1, "b": None}})
    assert parameter_digest({"k": 1}) == hashlib.sha256(b'{"k":1}').hexdigest()
    with pytest.raises(ValueError, match="JSON"):
        parameter_digest({"x": math.inf})
    with pytest.raises(TypeError):
        parameter_digest({"x": Path("a")})
