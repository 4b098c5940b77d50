"""Flags from config dataclasses (through tyro), and short messages for what is wrong with them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from diffkit.errors import UserError

__all__ = ["flag_surface", "nearest", "parse_flags"]

Config = TypeVar("Config")

_UNTYPED = re.compile(
    r"Error parsing (?P<flag>\S+): no type matching (?:\{None\}\|)?(?P<kind>\S+) "
    r"could be instantiated from \['(?P<value>.*?)'\]"
)
_MARKERS = (tyro.conf.FlagCreatePairsOff,)
_RULES = set("-─")
_WALL = "│"
_CORNERS = "╭╰"


def parse_flags(
    config_class: type[Config], argv: Sequence[str], prog: str, default: Config | None = None
) -> Config:
    """Build `config_class` from command-line words; `default` gives the values of absent flags.

    `--help` prints the help and raises `SystemExit(0)`. Raises `UserError` with one or two lines
    for an unknown flag, a missing or a badly typed value.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            options: dict[str, Any] = {} if default is None else {"default": default}
            return tyro.cli(config_class, args=list(argv), prog=prog, config=_MARKERS, **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{_message(complaint.getvalue())}\nSee {prog} --help.") from None


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence naming the nearest known word, or all of them where none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(names)}."


def flag_surface(config_class: type, prefix: str = "") -> list[str]:
    """One line for each flag, those of nested configs included: its name, type and default.

    Raises `TypeError` when `config_class` is not a dataclass.
    """
    hints = typing.get_type_hints(config_class, include_extras=True)
    lines = []
    for field in dataclasses.fields(config_class):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        hint = hints[field.name]
        if dataclasses.is_dataclass(default):
            lines += flag_surface(type(default), f"{prefix}{_name(field.name, hint)}.")
            continue
        shown = "required" if default is dataclasses.MISSING else _shown(default)
        kind = _type_text(hint)
        written = str(field.type)
        if "Positional[" in written:
            lines.append(f"{field.name.upper()}: {kind} = {shown}")
            continue
        repeatable = ", repeatable" if "UseAppendAction[" in written else ""
        lines.append(f"--{prefix}{_name(field.name, hint)}: {kind}{repeatable} = {shown}")
    return sorted(lines)


def _name(field_name: str, hint: Any) -> str:
    given = [getattr(mark, "name", None) for mark in getattr(hint, "__metadata__", ())]
    return str(next(filter(None, given), field_name)).replace("_", "-")


def _type_text(hint: Any) -> str:
    bare = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    text = bare.__name__ if isinstance(bare, type) and not typing.get_args(bare) else str(bare)
    return re.sub(r"\b[a-z_]+(\.[a-z_]+)*\.(?=[A-Z])", "", text)


def _shown(value: Any) -> str:
    return repr(str(value)) if isinstance(value, Path) else repr(value)


def _message(box: str) -> str:
    """The complaint and the suggested flags out of tyro's framed text, unwrapped.

    The frame is drawn in Unicode with the title in its border, or in ASCII with the title above
    the first rule, depending on the terminal's encoding.
    """
    framed = any(row.startswith(_CORNERS[0]) for row in box.splitlines())
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        row = line.strip().strip(_WALL).strip()
        if row and set(row) <= _RULES:
            sections.append([])
        elif row and row[0] not in _CORNERS:
            sections[-1].append(row)
    complaint, *hints = sections if framed else sections[1:]
    message = " ".join(complaint)
    # What tyro says of an optional flag is one line for each type that it tried.
    untyped = _UNTYPED.search(message)
    if untyped:
        message = f"{untyped['flag']}: {untyped['value']!r} is not {untyped['kind']}."
    flags = [
        row.split()[0].rstrip(",")
        for hint in hints
        if hint and hint[0].startswith("Perhaps you meant")
        for row in hint
        if row.startswith("--")
    ]
    return f"{message} Did you mean {' or '.join(flags)}?" if flags else message
