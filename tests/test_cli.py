"""The frame of the command line: fast help, exit codes, short messages, tracebacks on request."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import diffkit
from diffkit import cli, console
from diffkit.cli import COMMANDS, Command, main
from diffkit.errors import RunFailed, UserError

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "tyro", "diffusers", "transformers", "accelerate", "numpy", "PIL", "rich")


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_help_and_version_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from diffkit.cli import main; code = main(sys.argv[1:]);"
        f"print(code, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"
    # A generous bound for a loaded machine; it is about 0.1 s on an idle one.
    assert time.perf_counter() - start < 5


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and c.summary in text for name, c in COMMANDS.items())


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"diffkit {diffkit.__version__}\n"


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["genrate", "a"]) == 2
    assert "genrate: no such command. Did you mean generate?" in capsys.readouterr().err
    assert main(["xyzzy"]) == 2
    assert "Known: audit, data, demo" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["data"], ["data", "--help"], ["train", "--help"]])
def test_a_group_lists_its_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == (2 if len(words) == 1 else 0)
    assert f"usage: diffkit {words[0]} COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["generate", "protect", "audit", "info", "demo"])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: diffkit {name}")
    assert "--json" in text


@pytest.mark.parametrize("utf8", [False, True])
def test_flag_errors_are_two_short_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, utf8: bool
) -> None:
    """tyro frames its messages in Unicode or in ASCII, by the encoding of stdout."""
    monkeypatch.setattr("tyro._fmtlib._FORCE_UTF8_BOXES", utf8)
    assert main(["info", "--szie", "8"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "diffkit: Unrecognized options: --szie, 8 Did you mean --size?",
        "See diffkit info --help.",
    ]
    assert main(["info", "--steps", "ten"]) == 2
    assert "--steps: 'ten' is not INT." in capsys.readouterr().err
    assert main(["info", "--dtype", "fp8"]) == 2
    assert "Expected one of ('fp32', 'bf16', 'fp16')" in capsys.readouterr().err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make `diffkit probe` raise an error."""
    from dataclasses import dataclass

    @dataclass
    class Config:
        """Nothing."""

    def raising(error: BaseException) -> None:
        def work(config: Config) -> int:
            raise error

        module = SimpleNamespace(configs=lambda: {"": Config}, main=work)
        monkeypatch.setitem(COMMANDS, "probe", Command("probe_module", ""))
        monkeypatch.setattr(cli, "import_module", lambda name: module)

    return raising


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("what was wrong"), 2, "diffkit: what was wrong\n"),
        (RunFailed("what broke"), 1, "diffkit: what broke\n"),
        (KeyboardInterrupt(), 130, "diffkit: interrupted; what was finished is kept.\n"),
        (
            ZeroDivisionError("by zero"),
            1,
            "diffkit: ZeroDivisionError: by zero\nAdd --debug for the traceback.\n",
        ),
    ],
)
def test_exit_codes_and_tracebacks(
    command: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    text: str,
) -> None:
    command(error)
    assert main(["probe"]) == code
    assert capsys.readouterr().err == text
    assert main(["probe", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err
    assert main(["--debug", "probe"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m diffkit.cli generate --help | head -n 1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("usage: diffkit generate")
    assert done.stderr == ""


def test_json_of_one_command_does_not_silence_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--json` silences the console; in one process it used to stay silent for good."""
    main(["data", "check", str(tmp_path), "--json"])
    capsys.readouterr()
    console.say("still heard")
    assert capsys.readouterr().err == "still heard\n"
