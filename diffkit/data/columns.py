"""Which columns of a `datasets` table hold the pictures, the captions and the labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffkit.data.records import Encoded
from diffkit.errors import UserError

__all__ = [
    "CAPTIONS",
    "NUMBERED_PAIRS",
    "RANKED_PAIR",
    "Columns",
    "captions_of",
    "content_hash",
    "encoded_of",
    "find_columns",
    "has_pair_columns",
    "label_of",
    "pairs_of_columns",
]

CAPTIONS = ("text", "txt", "caption", "prompt")
"""Names under which captions are looked for, in this order."""

RANKED_PAIR = ("winner", "loser")
NUMBERED_PAIRS = (("image_0", "image_1"), ("jpg_0", "jpg_1"))
"""Names of the two pictures of a preference pair."""

_LABELS = ("label", "cls")


@dataclass(frozen=True)
class Columns:
    """Names of the columns; without captions or labels None. `class_names` may be unknown: ()."""

    image: str
    caption: str | None
    label: str | None
    class_names: tuple[str, ...]


def has_pair_columns(columns: Collection[str]) -> bool:
    """Whether a table with these columns is meant as one of preference pairs."""
    return any(name in columns for pair in (RANKED_PAIR, *NUMBERED_PAIRS) for name in pair)


def pairs_of_columns(columns: Collection[str], place: str) -> UserError:
    """What to say where single pictures are wanted and the columns are those of pairs."""
    return UserError(
        f"{place}: these are preference pairs: `diffkit train preference` trains on them. Its "
        f"columns: {', '.join(columns)}."
    )


def find_columns(
    features: Mapping[str, Any],
    place: str,
    image: str | None = None,
    caption: str | None = None,
    label: str | None = None,
) -> Columns:
    """The columns of a table with these `datasets` features; given names are taken as they are.

    Otherwise the picture column is the only one of type image, or the one named "image"; captions
    are in the first of "text", "txt", "caption", "prompt" that holds texts, labels in the first of
    "label", "cls" that holds whole numbers. Raises `UserError` naming `place` and its columns when
    one cannot be found.
    """
    for name in (image, caption, label):
        if name is not None and name not in features:
            raise UserError(f'{place}: has no column "{name}". Its columns: {", ".join(features)}.')
    if image is None:
        pictures = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
        if len(pictures) != 1:
            if "image" not in features:
                if has_pair_columns(features):
                    raise pairs_of_columns(features, place)
                raise UserError(
                    f"{place}: {len(pictures)} columns hold images; name the one to use. "
                    f"Its columns: {', '.join(features)}."
                )
            pictures = ["image"]
        image = pictures[0]
    if label is not None and not _is_number(features[label]):
        raise UserError(
            f'{place}: labels are class numbers, and "{label}" holds {features[label]}.'
        )
    caption = caption or _first(CAPTIONS, features, _is_text)
    label = label or _first(_LABELS, features, _is_number)
    names = tuple(getattr(features[label], "names", ())) if label else ()
    return Columns(image, caption, label, names)


def _first(
    names: Sequence[str], features: Mapping[str, Any], fits: Callable[[Any], bool]
) -> str | None:
    return next((name for name in names if name in features and fits(features[name])), None)


def _is_text(feature: Any) -> bool:
    kind = getattr(feature, "feature", feature)  # of a list, what it holds
    return getattr(kind, "dtype", "") in ("string", "large_string")


def _is_number(feature: Any) -> bool:
    return "int" in str(getattr(feature, "dtype", ""))


def encoded_of(value: Any) -> Encoded:
    """The bytes or the file of one undecoded picture cell; no bytes for an empty one."""
    if value and value.get("bytes"):
        return bytes(value["bytes"])
    return Path(value["path"]) if value and value.get("path") else b""


def content_hash(encoded: Encoded) -> str:
    """Hash of the bytes of an encoded picture."""
    data = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def captions_of(value: object, place: str) -> tuple[str, ...]:
    """The captions of one cell: a text, a list of texts, or nothing."""
    texts = value if isinstance(value, list) else [value or ""]
    kept = [text.strip() for text in texts if isinstance(text, str)]
    if len(kept) < len(texts):
        raise UserError(f"{place}: a caption must be a text or a list of texts, not {value!r}.")
    return tuple(text for text in kept if text)


def label_of(value: object, place: str) -> int | None:
    """The class number of one cell."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise UserError(f"{place}: a label must be a class number, 0 or more, not {value!r}.")
