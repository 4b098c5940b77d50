"""Configuration files: YAML in and out of dataclasses, strictly."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from diffkit.errors import UserError

__all__ = ["differing_keys", "dump", "load", "to_plain"]

Config = TypeVar("Config")


def load(path: Path, config_class: type[Config]) -> Config:
    """Read a YAML mapping into `config_class`; required keys may be absent and become `MISSING`.

    Raises `UserError` naming the file and the key: a key that does not exist (with the nearest one
    that does), a value of the wrong type, a file that is missing or is not YAML.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such configuration file.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({error}).") from error
    try:
        return _build(config_class, {} if content is None else content, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _build(config_class: type[Config], content: Any, prefix: str) -> Config:
    if not isinstance(content, Mapping):
        where = prefix.rstrip(".") or "the file"
        raise UserError(f"{where}: a mapping of keys to values is needed, not {_kind(content)}.")
    hints = get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in fields:
            raise UserError(f"{prefix}{key}: no such key. {_nearest(str(key), fields)}")
        values[key] = _value(hints[key], value, f"{prefix}{key}")
    for name, field in fields.items():
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if no_default and name not in values:
            values[name] = tyro.MISSING
    return config_class(**values)


def _value(hint: Any, value: Any, name: str) -> Any:
    """`value` as the annotated type, or `UserError`."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{name}.")  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, name)
    if origin is Literal:
        if value not in arguments:
            known = ", ".join(map(str, arguments))
            raise UserError(f"{name}: {value!r} is not one of {known}.")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{name}: a list is needed, not {_kind(value)}.")
        return tuple(_value(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    return _scalar(hint, value, name)


def _scalar(hint: type, value: Any, name: str) -> Any:
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float:
        # YAML 1.1 reads 1e-4 (no dot) as text.
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
    elif type(value) is hint:
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    needed = wanted.get(hint, "a path")
    raise UserError(f"{name}: {needed} is needed, not {_kind(value)} ({value!r}).")


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.replace("-", "_"), list(known), n=1, cutoff=0.6)
    return f"Did you mean {close[0]}?" if close else f"Known: {', '.join(sorted(known))}."


def _kind(value: Any) -> str:
    kinds = {bool: "true/false", int: "a whole number", float: "a number", str: "text"}
    kinds |= {list: "a list", dict: "a mapping", type(None): "nothing"}
    return kinds.get(type(value), type(value).__name__)


def to_plain(config: Any) -> dict[str, Any]:
    """The values as YAML and JSON know them."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_plain(value)
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        plain[field.name] = value
    return plain


def dump(config: Any) -> str:
    """The resolved configuration as YAML that `load` reads back."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def differing_keys(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names of the values in which two plain configurations differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*old, *(k for k in new if k not in old)]:
            found |= differing_keys(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
        return found
    return {} if old == new else {prefix: (old, new)}
