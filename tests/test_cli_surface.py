"""Every command and flag, compared with the committed text file.

A changed flag changes somebody's scripts, so it is changed on purpose: write the file again with

    python -m tests.test_cli_surface
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from diffkit.cli import COMMANDS
from diffkit.commands.flags import flag_surface

FILE = Path(__file__).with_name("cli_surface.txt")


def surface() -> str:
    """All commands in the order of the help, each with its flags and their types and defaults."""
    blocks = []
    for name, command in COMMANDS.items():
        for word, config in import_module(command.module).configs().items():
            lines = [f"diffkit {name} {word}".rstrip(), *(f"  {x}" for x in flag_surface(config))]
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def test_the_command_line_is_the_committed_one() -> None:
    assert surface() == FILE.read_text(encoding="utf-8"), (
        "the command line changed; if on purpose: python -m tests.test_cli_surface"
    )


if __name__ == "__main__":
    FILE.write_text(surface(), encoding="utf-8")
