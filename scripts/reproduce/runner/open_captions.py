"""A teacher whose captions leave something open, for experiments about sampling in few steps.

The embedded model's captions name concept, style and background, which one picture of its training
set has: from pure noise it then says the whole picture in one step, and there is nothing to be
distilled. So the few-step experiments start from the embedded model trained on with captions that
many pictures share: the concept alone (4 styles x 8 backgrounds), or style and background alone
(60 concepts).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from diffkit.files import atomic_directory, read_jsonl
from diffkit.training.denoising import DenoisingTraining
from runner.inputs import EMOJI, pictures
from runner.judge import Asked
from runner.stages import train_stages
from runner.work import claim

__all__ = ["KINDS", "TEACHER", "asked_of", "open_caption", "open_pictures", "open_teacher"]

KINDS = ("concept", "look")

TEACHER: dict[str, Any] = {
    "steps": 2000,
    "batch_size": 32,
    "learning_rate": 2e-4,
    "warmup_steps": 50,
    "ema": 0.998,
}


def open_caption(row: dict[str, Any], kind: str) -> str:
    """The caption of a picture that names its concept alone, or its style and background alone."""
    if kind == "concept":
        name: str = row["text"][0].split(",")[0]
        return name
    return f"{row['style']} style, {row['background']} background"


def asked_of(data: Path) -> list[Asked]:
    """The different open captions of pictures: all concepts, then all looks."""
    found: dict[str, Asked] = {}
    for kind in KINDS:
        for row in read_jsonl(data / "metadata.jsonl"):
            caption = open_caption(row, kind)
            names = {"concept": caption} if kind == "concept" else {"style": row["style"]}
            found.setdefault(caption, Asked(caption, **names))
    return list(found.values())


def open_pictures(folder: Path = EMOJI) -> Path:
    """The 1,920 pictures of `pictures` with the open captions beside the full one."""
    source = pictures(folder)
    target = source.with_name(f"{source.name}-open")
    with claim(target, wait=True):
        if not target.is_dir():
            with atomic_directory(target) as new:
                _link(source, new)
    return target


def _link(source: Path, target: Path) -> None:
    lines = []
    for row in read_jsonl(source / "metadata.jsonl"):
        _same_file(source / row["file_name"], target / row["file_name"])
        captions = [*(open_caption(row, kind) for kind in KINDS), row["text"][0]]
        lines.append(json.dumps({**row, "text": captions}, ensure_ascii=False) + "\n")
    (target / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def _same_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy(source, target)


def open_teacher(work: Path = Path(".build/reproduce/open_teacher")) -> Path:
    """The folder of the teacher, trained if it is not there: some 25 minutes on one thread."""
    settings = TEACHER
    config = DenoisingTraining(
        data=str(open_pictures()),
        output=work / "run",
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        warmup_steps=settings["warmup_steps"],
        ema=settings["ema"],
        cache_latents=True,
        cache_embeddings=True,
        cache=work / "cache",
        workers=1,
        checkpoint_every=100,
        keep=1,
        tracker="none",
    )
    (folder,) = train_stages(config, [settings["steps"]])
    return folder
