"""Threats that learn from the whole set: an imitator a version, trained and asked alike.

OUTPUT/mimicry/DIGEST/pictures/    what one imitator learns from
OUTPUT/mimicry/DIGEST/run/         its training, which goes on where it stopped
OUTPUT/mimicry/DIGEST/samples/     what it draws
OUTPUT/mimicry/cache/              class pictures, shared by all

The imitators of the clean, the protected and the random pictures, and of sets of which only a part
is protected, have the same seeds, steps, prompts and class pictures, and draw from the same noises.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkit import __version__
from diffkit.audit.cells import MIMICRY
from diffkit.audit.measures import CLEAN, CONTROL, PROTECTED
from diffkit.audit.mimicry_settings import DEFAULT_PROMPT, RECIPES, WORD, MimicrySettings
from diffkit.audit.pictures import AuditPicture, open_versions
from diffkit.audit.purifiers.plain import from_pillow, to_pillow
from diffkit.audit.request import AuditRequest
from diffkit.audit.subjects import in_pieces
from diffkit.console import say
from diffkit.data.layout import read_layout
from diffkit.errors import RunFailed, UserError
from diffkit.evaluation.pictures import to_uint8
from diffkit.files import atomic_directory, atomic_write
from diffkit.generation.card import read_card
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.lora import load_lora
from diffkit.models.placeholder import load_embedding
from diffkit.models.sampling import sample
from diffkit.models.text_encoders import clip_encoders
from diffkit.objectives.dreambooth import DreamBoothConfig
from diffkit.objectives.textual_inversion import TextualInversionConfig
from diffkit.protection.sidecar import parameter_digest
from diffkit.randomness import normal, permutation
from diffkit.training.config import TrainConfig
from diffkit.training.launch import train
from diffkit.training.personal import (
    DreamBoothLoraTraining,
    DreamBoothTraining,
    TextualInversionTraining,
)

__all__ = ["Imitation", "imitate", "partly_protected"]

SAMPLE_STEPS = 50
_TOKEN, _INITIALIZER = "<sks>", "art"
_PRECISION: dict[str, Any] = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Imitation:
    """What one kind of imitator made of every version.

    Attributes:
        kind: a name of `RECIPES`.
        facts: how it was trained, in words.
        prompts: of the drawn pictures, in order.
        labels: version -> what it learnt from.
        samples: version -> drawn pictures, uint8 (N, 3, H, W).
    """

    kind: str
    facts: str
    prompts: tuple[str, ...]
    labels: dict[str, str]
    samples: dict[str, Tensor]


def partly_protected(count: int, share: int, seed: int) -> list[bool]:
    """Which of so many pictures are protected where `share` per cent are; nested in the share."""
    order = permutation(count, seed, "audit", "partial").tolist()
    chosen = set(order[: round(count * share / 100)])
    return [i in chosen for i in range(count)]


def imitate(
    request: AuditRequest,
    kind: str,
    source: str,
    weights: str,
    pictures: Sequence[AuditPicture],
    clean: Path,
    output: Path,
) -> Imitation:
    """Train and ask one imitator a version.

    Arguments:
        source, weights: where the model lies, and the digest of its weights.
        pictures: the pairs, at least two.
        clean: the folder of clean pictures, for their captions.
        output: of the audit.

    Raises:
        UserError: a single picture, or a model that cannot be trained so.
        RunFailed: a training broke off.
    """
    if len(pictures) < 2:
        raise UserError(f"--threats {kind}: learns from a folder of pictures; there is one.")
    settings = request.mimicry
    captions = _captions(settings, pictures, clean)
    work = _Imitators(request, kind, source, weights, pictures, captions, output)
    labels = {CLEAN: "clean pictures", CONTROL: "random noise", PROTECTED: "protected pictures"}
    labels |= {f"{share} %": f"{share} % protected, the others clean" for share in settings.partial}
    samples = {version: work.samples(version) for version in labels}
    return Imitation(kind, work.facts(), tuple(work.prompts), labels, samples)


def _captions(
    settings: MimicrySettings, pictures: Sequence[AuditPicture], clean: Path
) -> list[str]:
    """What each picture is learnt as."""
    if settings.instance_prompt is not None:
        return [settings.instance_prompt.replace("{}", WORD)] * len(pictures)
    found = {e.path.resolve(): e.captions for e in read_layout(clean).entries if e.captions}
    own = [found.get(picture.pair.clean.resolve()) for picture in pictures]
    known = [texts[0] for texts in own if texts]
    return (
        known
        if len(known) == len(pictures)
        else [DEFAULT_PROMPT.replace("{}", WORD)] * len(pictures)
    )


class _Imitators:
    """Imitators of one kind and model."""

    def __init__(
        self,
        request: AuditRequest,
        kind: str,
        source: str,
        weights: str,
        pictures: Sequence[AuditPicture],
        captions: Sequence[str],
        output: Path,
    ) -> None:
        self.request, self.kind, self.source, self.weights = request, kind, source, weights
        self.pictures, self.captions, self.output = pictures, captions, output / MIMICRY
        self.recipe, settings = RECIPES[kind], request.mimicry
        self.steps = settings.steps or self.recipe.steps
        self.rate = settings.learning_rate or self.recipe.learning_rate
        asked = settings.sample_prompts or self._learnt()
        self.prompts = [asked[i % len(asked)] for i in range(settings.samples)]

    def _learnt(self) -> Sequence[str]:
        if self.kind == "textual-inversion":
            return self._inversion().sentences()
        return list(dict.fromkeys(self.captions))

    def _inversion(self) -> TextualInversionConfig:
        settings = self.request.mimicry
        own = () if settings.instance_prompt is None else (settings.instance_prompt,)
        return TextualInversionConfig(
            token=_TOKEN,
            initializer=_INITIALIZER,
            vectors=settings.vectors,
            template="object" if own else "style",
            prompts=own,
        )

    def facts(self) -> str:
        """How they were trained, in words."""
        settings, words = self.request.mimicry, [f"{self.steps} steps of {self.recipe.batch_size}"]
        words.append(f"learning rate {self.rate:g}")
        if self.kind == "lora":
            words.append(f"rank {settings.rank}")
        if self.kind == "textual-inversion":
            words.append(f"{settings.vectors} vectors")
        elif settings.class_prompt is not None:
            words.append(f"class pictures of “{settings.class_prompt}”")
        else:
            words.append("no class pictures")
        words.append(f"{settings.samples} pictures drawn in {SAMPLE_STEPS} steps")
        return ", ".join(words) + f". Usual values are those of {self.recipe.source}."

    def samples(self, version: str) -> Tensor:
        """What the imitator of a version draws, uint8 (N, 3, H, W); made where it is not there."""
        place = self.output / parameter_digest(self._made_of(version))[:24]
        folder = place / "samples"
        if not folder.is_dir():
            say(f"{self.kind}: learning from the version {version}")
            config = self._config(self._write(place / "pictures", version), place / "run")
            if code := train(config):
                raise RunFailed(f"{config.output}: the training ended with code {code}.")
            drawn = self._draw(place / "run")
            with atomic_directory(folder) as parts:
                for number, pixels in enumerate(drawn):
                    with atomic_write(parts / f"{number:05d}.png") as file:
                        to_pillow(pixels).save(file, "PNG")
        return torch.stack([_read(path) for path in sorted(folder.glob("*.png"))])

    def _made_of(self, version: str) -> dict[str, Any]:
        settings, request = self.request.mimicry, self.request
        kept = replace(settings, partial=())
        return {
            "diffkit": __version__,
            "kind": self.kind,
            "model": [self.weights, request.dtype],
            "version": version,
            "seed": request.seed,
            "settings": {key: str(value) for key, value in vars(kept).items()},
            "prompts": self.prompts,
            "captions": list(self.captions),
            "pictures": [
                [p.pair.clean_sha256, p.pair.protected_sha256, p.levels] for p in self.pictures
            ],
        }

    def _write(self, folder: Path, version: str) -> Path:
        """The pictures of a version with their captions."""
        if folder.is_dir():
            return folder
        count = len(self.pictures)
        share = int(version.removesuffix(" %")) if version.endswith(" %") else 100
        chosen = partly_protected(count, share, self.request.seed)
        with atomic_directory(folder) as place:
            rows = []
            for i, (picture, caption) in enumerate(zip(self.pictures, self.captions, strict=True)):
                versions, _ = open_versions(picture, self.request.seed)
                taken = version if version in versions else PROTECTED if chosen[i] else CLEAN
                name = f"{i:05d}.png"
                with atomic_write(place / name) as file:
                    to_pillow(versions[taken]).save(file, "PNG")
                rows.append(json.dumps({"file_name": name, "text": caption}) + "\n")
            (place / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
        return folder

    def _config(self, data: Path, run: Path) -> TrainConfig:
        request, settings = self.request, self.request.mimicry
        common: dict[str, Any] = {
            "data": str(data),
            "output": run,
            "model": self.source,
            "seed": request.seed,
            "max_steps": self.steps,
            "batch_size": self.recipe.batch_size,
            "learning_rate": self.rate,
            "cache": self.output / "cache",
            "cache_latents": True,
            "mixed_precision": _PRECISION[request.dtype],
            "checkpoint_every": max(1, min(500, self.steps)),
            "keep": 1,
            "tracker": "none",
        }
        if self.kind == "textual-inversion":
            return TextualInversionTraining(textual_inversion=self._inversion(), **common)
        prior: dict[str, Any] = {}
        if settings.class_prompt is not None:
            prior = {"class_prompt": settings.class_prompt, "class_images": settings.class_images}
            if settings.class_images is None:
                prior["class_count"] = self.recipe.class_count
        if self.kind == "lora":
            dreambooth = DreamBoothConfig(**prior)
            return DreamBoothLoraTraining(dreambooth=dreambooth, lora_rank=settings.rank, **common)
        model = LatentDiffusion.load(self.source)
        prior["train_text_encoder"] = bool(clip_encoders(model.conditioner))
        return DreamBoothTraining(dreambooth=DreamBoothConfig(**prior), **common)

    def _draw(self, run: Path) -> Tensor:
        """One picture a prompt; picture i starts from the same noise whatever was learnt."""
        request = self.request
        options: dict[str, Any] = {"device": request.device}
        if self.kind == "dreambooth":
            model = LatentDiffusion.load(str(run / "model"), **options)
        else:
            model = LatentDiffusion.load(self.source, **options)
            if self.kind == "lora":
                load_lora(model, run / "lora")
            else:
                load_embedding(model, run / "embedding")
        size = (model.default_size,) * 2
        shape = model.latent_shape(*size)
        guidance = read_card(self.source).guidance(model.family.guidance_scale)
        guided = "cfg" in model.family.capabilities

        def make(rows: slice) -> Tensor:
            texts = self.prompts[rows]
            noise = [
                normal(shape, request.seed, i, "imitator") for i in range(*rows.indices(10**9))
            ]
            z = sample(
                model.denoiser,
                torch.stack(noise).to(model.device),
                model.conditioner.encode(texts, size).to(model.device),
                model.conditioner.null(len(texts), size).to(model.device) if guided else None,
                steps=SAMPLE_STEPS,
                guidance_scale=guidance if guided or model.family.takes_guidance else 1.0,
            )
            with torch.no_grad():
                return to_uint8(model.codec.decode(z.to(model.codec.device)).float().cpu())

        return in_pieces(make, len(self.prompts), request.batch_size)


def _read(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path) as image:
        return from_pillow(image.convert("RGB"))
