"""Files that are either whole or absent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from diffkit.errors import RunFailed, UserError
from diffkit.files import (
    TEMPORARY_PREFIX,
    append_jsonl,
    atomic_directory,
    atomic_write,
    check_writable,
    read_json,
    read_jsonl,
    sha256,
    storage_errors,
    write_json,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "x.json", "w") as file:
        file.write("half")
        _ = 1 / 0
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path):
    with atomic_directory(tmp_path / "d") as place:
        (place / "f").write_text("old")
    with pytest.raises(UserError, match="exists already"), atomic_directory(tmp_path / "d"):
        pass
    with (
        pytest.raises(ZeroDivisionError),
        atomic_directory(tmp_path / "d", overwrite=True) as place,
    ):
        (place / "f").write_text("new")
        _ = 1 / 0
    assert (tmp_path / "d" / "f").read_text() == "old"
    with atomic_directory(tmp_path / "d", overwrite=True) as place:
        (place / "f").write_text("new")
    assert (tmp_path / "d" / "f").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_killed_writer_leaves_no_half_file(tmp_path):
    program = (
        "import sys, time; from diffkit.files import atomic_write\n"
        f"with atomic_write({str(tmp_path / 'x')!r}) as f:\n"
        "    f.write(b'half'); f.flush(); print('writing', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "x").exists()
    assert all(p.name.startswith(TEMPORARY_PREFIX) for p in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.ENOSPC, RunFailed, "model: the disk is full"),
        (errno.EACCES, UserError, "model: cannot be written, permission denied"),
        (errno.EROFS, UserError, "read-only"),
    ],
)
def test_storage_errors_name_the_path_and_the_cause(number, kind, message):
    with pytest.raises(kind, match=message), storage_errors("model"):
        raise OSError(number, os.strerror(number))


def test_other_errors_pass():
    with pytest.raises(FileNotFoundError), storage_errors("model"):
        raise FileNotFoundError(errno.ENOENT, "no")


def test_output_inside_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_writable(tmp_path / "file")
    with pytest.raises(UserError, match="a file, not a folder"):
        check_writable(tmp_path / "file" / "below")
    assert check_writable(tmp_path / "new" / "deep").is_dir()


def test_json_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"a": 1}, {"a": 2})
    with open(path, "a") as file:
        file.write('{"a": 3, "torn')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_jsonl(path)
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "missing.json")


def test_sha256_of_known_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x").startswith("ba7816bf8f01cfea")


def test_large_files_are_hashed_in_blocks(tmp_path):
    import hashlib

    content = bytes(3 << 20)
    (tmp_path / "x").write_bytes(content)
    assert sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()
