"""Files that are either whole or absent.

Everything diffkit writes goes through this module: a temporary name beside the target, `fsync`,
then one `rename`. A reader therefore never sees half a file, whenever the writer was killed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from diffkit.errors import RunFailed, UserError

__all__ = [
    "TEMPORARY_PREFIX",
    "append_jsonl",
    "atomic_directory",
    "atomic_write",
    "check_writable",
    "read_json",
    "read_jsonl",
    "sha256",
    "storage_errors",
    "write_json",
]

TEMPORARY_PREFIX = ".partial-"

# A process can read its mask only by changing it, which several threads must not do at once.
_UMASK = os.umask(0o077)
os.umask(_UMASK)

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
_FULL[errno.EFBIG] = "the file size limit of this process or disk is reached"
_REFUSED = {
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long",
}


@contextlib.contextmanager
def storage_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn a storage error of the body into an error that names `path` and the cause.

    Raises `RunFailed` when the storage ran out and `UserError` when the path cannot be written;
    any other error passes unchanged.
    """
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number in _FULL:
            raise RunFailed(
                f"{os.fspath(path)}: {_FULL[number]}. What was finished before is kept; "
                "free some space, then run the same command again."
            ) from error
        if number in _REFUSED:
            raise UserError(
                f"{os.fspath(path)}: cannot be written, {_REFUSED[number]}. "
                "Choose another place, for example with --output."
            ) from error
        raise


def _error_number(error: Exception) -> int:
    """The `errno` behind an error, 0 when there is none.

    safetensors wraps it into a class of its own, and only its message keeps the number.
    """
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found and type(error).__name__ == "SafetensorError" else 0


def _sync_folder(folder: Path) -> None:
    # The rename itself is durable only once the folder's entry is on disk.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that becomes `path` when the body ends without an error.

    `mode` is "wb" or "w" (UTF-8). The parent folder is made. On an error nothing is left behind
    and an older `path` stays as it was. Raises what `storage_errors` raises.
    """
    target = Path(path)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        encoding = None if "b" in mode else "utf-8"
        descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=target.parent)
        try:
            with os.fdopen(descriptor, mode, encoding=encoding) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_UMASK)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _sync_folder(target.parent)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the body ends without an error.

    Raises `UserError` when `path` exists and `overwrite` is false; with `overwrite` the old folder
    stays in place until the new one is whole.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists already. Choose another folder or add --overwrite.")
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=target.parent))
        try:
            yield temporary
            _sync_tree(temporary)
            temporary.chmod(0o777 & ~_UMASK)
            if target.exists():
                retired = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=target.parent))
                os.replace(target, retired / target.name)
                os.replace(temporary, target)
                shutil.rmtree(retired)
            else:
                os.replace(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(target.parent)


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(root))


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Make `folder` and prove that a file can be written in it, or raise `UserError`."""
    target = Path(folder)
    with storage_errors(target):
        if target.exists() and not target.is_dir():
            raise UserError(f"{target}: is a file; an output folder is needed here.")
        target.mkdir(parents=True, exist_ok=True)
        descriptor, probe = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=target)
        os.close(descriptor)
        os.unlink(probe)
    return target


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; raises `UserError` naming the file when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{os.fspath(path)}: no such file.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{os.fspath(path)}: is not JSON ({error}).") from error


def append_jsonl(path: str | os.PathLike[str], *rows: Any) -> None:
    """Append one line a row. A line torn by a crash is the last one, and `read_jsonl` drops it."""
    with storage_errors(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: str | os.PathLike[str]) -> list[Any]:
    """Read the rows of a JSON-lines file; a torn last line is left out.

    Raises `UserError` naming the line when any other line is not JSON.
    """
    rows = []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{os.fspath(path)}, line {number}: is not JSON ({error}).") from error
    return rows


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
