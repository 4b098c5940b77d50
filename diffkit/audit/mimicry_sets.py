"""What imitators learn from: the pictures of a version with their captions, as a folder.

OUTPUT/mimicry/sets/DIGEST/ holds them once, for all kinds of imitators and all models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from diffkit import __version__
from diffkit.audit.measures import CLEAN, PROTECTED
from diffkit.audit.mimicry_settings import DEFAULT_PROMPT, WORD, MimicrySettings
from diffkit.audit.pictures import AuditPicture, open_versions
from diffkit.audit.purifiers.plain import to_pillow
from diffkit.data.layout import read_layout
from diffkit.files import atomic_directory, atomic_write
from diffkit.protection.sidecar import parameter_digest
from diffkit.randomness import permutation

__all__ = ["captions_of", "partly_protected", "write_set"]

_FOLDER = "sets"


def partly_protected(count: int, share: int, seed: int) -> list[bool]:
    """Which of so many pictures are protected where `share` per cent are; nested in the share."""
    order = permutation(count, seed, "audit", "partial").tolist()
    chosen = set(order[: round(count * share / 100)])
    return [i in chosen for i in range(count)]


def captions_of(
    settings: MimicrySettings, pictures: Sequence[AuditPicture], clean: Path
) -> list[str]:
    """What each picture is learnt as: the prompt given, its own caption, else a default."""
    if settings.instance_prompt is not None:
        return [settings.instance_prompt.replace("{}", WORD)] * len(pictures)
    found = {e.path.resolve(): e.captions for e in read_layout(clean).entries if e.captions}
    own = [found.get(picture.pair.clean.resolve()) for picture in pictures]
    known = [texts[0] for texts in own if texts]
    if len(known) == len(pictures):
        return known
    return [DEFAULT_PROMPT.replace("{}", WORD)] * len(pictures)


def write_set(
    folder: Path,
    version: str,
    pictures: Sequence[AuditPicture],
    captions: Sequence[str],
    seed: int,
) -> Path:
    """The folder of one version, a name such as "clean" or "50 %"; written where it is missing.

    Arguments:
        folder: where all of them lie, `mimicry` of the audit's output.
        seed: of the audit.
    """
    made_of = {
        "diffkit": __version__,
        "version": version,
        "captions": list(captions),
        "pictures": [picture.identity(seed) for picture in pictures],
    }
    place = folder / _FOLDER / parameter_digest(made_of)[:24]
    if place.is_dir():
        return place
    share = int(version.removesuffix(" %")) if version.endswith(" %") else 100
    chosen = partly_protected(len(pictures), share, seed)
    with atomic_directory(place) as parts:
        rows = []
        for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            versions, _ = open_versions(picture, seed)
            taken = version if version in versions else PROTECTED if chosen[i] else CLEAN
            name = f"{i:05d}.png"
            with atomic_write(parts / name) as file:
                to_pillow(versions[taken]).save(file, "PNG")
            rows.append(json.dumps({"file_name": name, "text": caption}) + "\n")
        (parts / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    return place
