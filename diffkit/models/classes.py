"""The classes of a model that is conditioned on labels, by number and by name.

A model folder says which classes its network has:

- `id2label`, {"207": "golden retriever", ...}, in `model_index.json` (stock `DiTPipeline`) or in
  `diffkit.json`; several names of one class are separated by commas. Without it classes have
  numbers only.
- `null_class`, in `diffkit.json`: the number of the embedding row that stands for no class, the
  last row. A U-Net with `num_class_embeds` = K + 1 and this key has K classes and a null class,
  which classifier-free guidance needs; without the key all rows are classes and there is no
  guidance. A DiT always has K = `num_embeds_ada_norm` classes and the null class K.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from diffkit.errors import UserError
from diffkit.files import read_json

__all__ = [
    "CARD_NAME",
    "CLASS_KEYS",
    "DEFAULT_KEYS",
    "Classes",
    "hub_file",
    "parse_names",
    "read_defaults",
    "read_stored",
]

CARD_NAME = "diffkit.json"
CLASS_KEYS = ("id2label", "null_class")
DEFAULT_KEYS = ("guidance_scale", "steps", "distilled")
"""Of the same file, what a model made from another one keeps of it."""


@dataclass(frozen=True)
class Classes:
    """Which labels a network knows.

    Attributes:
        count: K, the classes are 0 ... K-1; 0 for an unconditional model.
        null: number of the null class, None where there is none.
        names: names by number, as stored; a part of the numbers may be missing.
    """

    count: int
    null: int | None = None
    names: Mapping[int, str] = field(default_factory=dict)

    def name(self, number: int) -> str:
        """The name of a class; its number where it has none."""
        return self.names.get(number, str(number))

    def prompt(self, number: int) -> str:
        """What `number` turns back into this class: its name, its number where that is not so.

        In ImageNet two classes are called "crane".
        """
        name = self.name(number)
        return name if self._known.get(name.strip().lower()) == [number] else str(number)

    def number(self, text: str) -> int:
        """The class that a person means: a name, one of several names, or a number.

        Case does not count, and a whole name wins over one of several. "" is the null class.
        Raises `UserError` naming the nearest names, or the classes that share this one.
        """
        wanted = text.strip().lower()
        if self.count == 0:
            if wanted:
                raise UserError(
                    f'{text!r}: this model is unconditional and takes no prompt but "".'
                )
            return 0
        if not wanted and self.null is not None:
            return self.null
        found = self._known.get(wanted, [])
        if len(found) == 1:
            return found[0]
        if wanted.isdecimal() and int(wanted) < self.count:
            return int(wanted)
        if found:
            some = " and ".join(f"{number} ({self.name(number)})" for number in found)
            raise UserError(f"{text!r}: several classes are called so, {some}. Give the number.")
        raise UserError(f"{text!r}: no such class. {self._nearest(wanted, self._known)}")

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        """The classes that each lower-case name means."""
        whole: dict[str, list[int]] = {}
        parts: dict[str, list[int]] = {}
        for number, name in sorted(self.names.items()):
            whole.setdefault(name.strip().lower(), []).append(number)
            for part in dict.fromkeys(part.strip().lower() for part in name.split(",")):
                parts.setdefault(part, []).append(number)
        return parts | whole

    def _nearest(self, wanted: str, known: Mapping[str, list[int]]) -> str:
        numbers = f"Classes have numbers from 0 to {self.count - 1}"
        if not known:
            return f"{numbers}; this model stores no names."
        close = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
        found = dict.fromkeys(number for name in close or list(known)[:6] for number in known[name])
        some = ", ".join(f"{number} ({self.name(number)})" for number in found)
        return f"{'Nearest' if close else 'There are'}: {some}. {numbers}."

    def numbers(self, prompts: Sequence[str]) -> list[int]:
        """`number` of every prompt."""
        return [self.number(prompt) for prompt in prompts]

    def named(self, names: Sequence[str]) -> Classes:
        """These classes with names, the first ones in the order of their numbers."""
        return replace(self, names=dict(enumerate(names)))

    def stored(self) -> dict[str, Any]:
        """What `diffkit.json` keeps of them; empty when there is nothing to keep."""
        kept: dict[str, Any] = {}
        if self.names:
            kept["id2label"] = {str(number): name for number, name in sorted(self.names.items())}
        if self.null is not None:
            kept["null_class"] = self.null
        return kept


def parse_names(values: Mapping[Any, Any] | None, count: int) -> dict[int, str]:
    """`id2label` of a file -> names by number; raises `UserError` for a number out of range."""
    names: dict[int, str] = {}
    for key, value in (values or {}).items():
        if not str(key).isdecimal() or int(key) >= count or not isinstance(value, str):
            raise UserError(
                f"id2label: {key!r}: {value!r} is not a number from 0 to {count - 1} and a name."
            )
        names[int(key)] = value
    return names


def read_defaults(source: str, revision: str | None = None) -> dict[str, Any]:
    """How a model is best sampled, and whether it is a student: see `DEFAULT_KEYS`.

    Empty where nothing says so, or where the source is no longer there: nothing fails for it.
    """
    if not source:
        return {}
    folder = Path(source).expanduser()
    try:
        path = folder / CARD_NAME if folder.exists() else hub_file(source, CARD_NAME, revision)
        values = read_json(path) if path is not None and path.is_file() else {}
    except UserError:
        return {}
    return {key: values[key] for key in DEFAULT_KEYS if values.get(key) is not None}


def read_stored(source: str, revision: str | None = None) -> dict[str, Any]:
    """`id2label` and `null_class` of a model folder or hub id; empty where no file has them.

    `diffkit.json` wins over `model_index.json`. Raises `UserError` for a file that is not JSON.
    """
    found: dict[str, Any] = {}
    if not source:
        return found
    folder = Path(source).expanduser()
    for name in ("model_index.json", CARD_NAME):
        path = folder / name if folder.exists() else hub_file(source, name, revision)
        if path is not None and path.is_file():
            values = read_json(path)
            found |= {key: values[key] for key in CLASS_KEYS if values.get(key) is not None}
    return found


def hub_file(source: str, name: str, revision: str | None) -> Path | None:
    """A file of a hub repository, in the local cache; None where there is no such file.

    Raises `UserError` where the repository cannot be asked.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except EntryNotFoundError:  # also offline, where the cache has no such file
        return None
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{source}: {name} cannot be fetched from the hub ({first})") from error
