"""Threats that learn from the whole set: an imitator a version, trained and asked alike.

OUTPUT/mimicry/sets/DIGEST/             what imitators learn from, see `mimicry_sets.py`
OUTPUT/mimicry/DIGEST/run/              the training of one, which goes on where it stopped
OUTPUT/mimicry/DIGEST/samples-DIGEST/   what it draws
OUTPUT/mimicry/cache/                   class pictures, shared by all

The imitators of the clean, the protected and the random pictures, and of sets of which only a part
is protected, have the same seeds, steps, prompts and class pictures, and draw from the same noises.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkit import __version__
from diffkit.audit.cells import MIMICRY, content_digest
from diffkit.audit.estimate import SAMPLE_STEPS
from diffkit.audit.measures import CLEAN, CONTROL, PROTECTED
from diffkit.audit.mimicry_sets import captions_of, write_set
from diffkit.audit.mimicry_settings import RECIPES
from diffkit.audit.pictures import AuditPicture
from diffkit.audit.purifiers.plain import from_pillow, to_pillow
from diffkit.audit.request import AuditRequest
from diffkit.audit.subjects import in_pieces
from diffkit.console import say
from diffkit.errors import RunFailed
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
from diffkit.randomness import normal
from diffkit.training.config import TrainConfig
from diffkit.training.launch import train
from diffkit.training.personal import (
    DreamBoothLoraTraining,
    DreamBoothTraining,
    TextualInversionTraining,
)
from diffkit.training.trainer import INTERRUPTED

__all__ = ["Imitation", "Learner", "imitate"]

_TOKEN, _INITIALIZER = "<sks>", "art"
_PRECISION: dict[str, Any] = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Learner:
    """What is needed to know of a model to train imitators of it, without the model.

    Attributes:
        source: where it lies.
        weights: digest of its weights.
        reads: it takes text.
        clip: it has CLIP text encoders, which dreambooth trains too.
        inpaints: its denoiser takes more than latents.
    """

    source: str
    weights: str
    reads: bool
    clip: bool
    inpaints: bool

    @classmethod
    def of(cls, model: LatentDiffusion, weights: str) -> Learner:
        """Of a loaded model and the digest of its weights."""
        return cls(
            model.source,
            weights,
            model.conditioner.classes is None and bool(model.conditioner.encoders),
            bool(clip_encoders(model.conditioner)),
            model.denoiser.geometry.channels != model.codec.channels,
        )

    def refusal(self, kind: str) -> str | None:
        """Why no imitator of this kind can be trained, None where it can."""
        if not self.reads:
            return "it takes no text, and imitators are told captions"
        if self.inpaints:
            return "its denoiser takes a mask or a further picture, which training does not give it"
        if kind == "textual-inversion" and not self.clip:
            return "it has no CLIP text encoder that could learn a word"
        return None


@dataclass(frozen=True)
class Imitation:
    """What one kind of imitator made of every version.

    Attributes:
        kind: a name of `RECIPES`.
        facts: how it was trained, in words.
        captions: what the pictures were learnt as, each once.
        prompts: of the drawn pictures, in order.
        labels: version -> what it learnt from.
        samples: version -> drawn pictures, uint8 (N, 3, H, W).
    """

    kind: str
    facts: str
    captions: tuple[str, ...]
    prompts: tuple[str, ...]
    labels: dict[str, str]
    samples: dict[str, Tensor]


def imitate(
    request: AuditRequest,
    kind: str,
    learner: Learner,
    pictures: Sequence[AuditPicture],
    clean: Path,
    output: Path,
) -> Imitation:
    """Train and ask one imitator a version.

    Arguments:
        learner: the model.
        pictures: the pairs, at least two.
        clean: the folder of clean pictures, for their captions.
        output: of the audit.

    Raises:
        UserError: a model or settings that cannot be trained so.
        RunFailed: a training broke off.
        KeyboardInterrupt: it was interrupted; it goes on from there the next time.
    """
    settings = request.mimicry
    captions = captions_of(settings, pictures, clean)
    work = _Imitators(request, kind, learner, pictures, captions, output)
    labels = {CLEAN: "clean pictures", CONTROL: "random noise", PROTECTED: "protected pictures"}
    labels |= {f"{share} %": f"{share} % protected, the others clean" for share in settings.partial}
    samples = {version: work.samples(version) for version in labels}
    return Imitation(kind, work.facts(), work.learnt(), tuple(work.prompts), labels, samples)


class _Imitators:
    """Imitators of one kind and model."""

    def __init__(
        self,
        request: AuditRequest,
        kind: str,
        learner: Learner,
        pictures: Sequence[AuditPicture],
        captions: Sequence[str],
        output: Path,
    ) -> None:
        self.request, self.kind, self.learner = request, kind, learner
        self.pictures, self.captions, self.output = pictures, captions, output / MIMICRY
        self.recipe, settings = RECIPES[kind], request.mimicry
        self.steps = settings.steps or self.recipe.steps
        self.rate = settings.learning_rate or self.recipe.learning_rate
        asked = settings.sample_prompts or self.learnt()
        self.prompts = [asked[i % len(asked)] for i in range(settings.samples)]

    def learnt(self) -> tuple[str, ...]:
        """What the pictures are learnt as, each text once."""
        if self.kind == "textual-inversion":
            return self._inversion().sentences()
        return tuple(dict.fromkeys(self.captions))

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
        settings, words = self.request.mimicry, [f"training steps: {self.steps}"]
        words.append(f"pictures a step: {self.recipe.batch_size}, learning rate {self.rate:g}")
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
        drawing = {"diffkit": __version__, "prompts": self.prompts, "steps": SAMPLE_STEPS}
        folder = place / f"samples-{parameter_digest(drawing)[:12]}"
        if not folder.is_dir():
            run = place / "run"
            self._train(version, run)
            drawn = self._draw(run)
            with atomic_directory(folder) as parts:
                for number, pixels in enumerate(drawn):
                    with atomic_write(parts / f"{number:05d}.png") as file:
                        to_pillow(pixels).save(file, "PNG")
            shutil.rmtree(run / "checkpoints", ignore_errors=True)  # the result stays
        return torch.stack([_read(path) for path in sorted(folder.glob("*.png"))])

    def _train(self, version: str, run: Path) -> None:
        """Train, go on with, or find the imitator of a version."""
        say(f"{self.kind}: learning from the version {version}")
        request = self.request
        data = write_set(self.output, version, self.pictures, self.captions, request.seed)
        code = train(self._config(data, run))
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise RunFailed(f"{run}: the training ended with code {code}.")

    def _made_of(self, version: str) -> dict[str, Any]:
        """All that decides what is learnt; not what is drawn afterwards."""
        settings, request = self.request.mimicry, self.request
        kept = vars(replace(settings, partial=(), samples=2, sample_prompts=()))
        images = settings.class_images
        return {
            "diffkit": __version__,
            "kind": self.kind,
            "model": [self.learner.weights, request.dtype],
            "version": version,
            "seed": request.seed,
            "settings": {key: str(value) for key, value in kept.items() if key != "class_images"},
            "class images": None if images is None else content_digest(images),
            "captions": list(self.captions),
            "pictures": [picture.identity(request.seed) for picture in self.pictures],
        }

    def _config(self, data: Path, run: Path) -> TrainConfig:
        request, settings = self.request, self.request.mimicry
        common: dict[str, Any] = {
            "data": str(data),
            "output": run,
            "model": self.learner.source,
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
        prior["train_text_encoder"] = self.learner.clip
        return DreamBoothTraining(dreambooth=DreamBoothConfig(**prior), **common)

    def _draw(self, run: Path) -> Tensor:
        """One picture a prompt; picture i starts from the same noise whatever was learnt."""
        request = self.request
        options: dict[str, Any] = {"device": request.device}
        if self.kind == "dreambooth":
            model = LatentDiffusion.load(str(run / "model"), **options)
        else:
            model = LatentDiffusion.load(self.learner.source, **options)
            if self.kind == "lora":
                load_lora(model, run / "lora")
            else:
                load_embedding(model, run / "embedding")
        size = (model.default_size,) * 2
        shape = model.latent_shape(*size)
        guidance = read_card(self.learner.source).guidance(model.family.guidance_scale)
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
