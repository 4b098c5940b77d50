"""Configurations of the methods that teach a model a subject or a style from a few pictures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from diffkit.errors import UserError
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.denoising import DenoisingConfig
from diffkit.objectives.dreambooth import DreamBoothConfig, DreamBoothObjective
from diffkit.objectives.textual_inversion import TextualInversionConfig, TextualInversionObjective
from diffkit.training.companions import Companions
from diffkit.training.config import TrainConfig, Trained

__all__ = [
    "DreamBoothLoraTraining",
    "DreamBoothTraining",
    "TextualInversionTraining",
    "build_dreambooth",
    "build_textual_inversion",
]


def _every_prompt() -> DenoisingConfig:
    """Denoising that drops no prompt: with a handful of pictures it would unlearn the null."""
    return DenoisingConfig(condition_dropout=0.0)


def _check_few(config: TrainConfig) -> None:
    if config.streaming:
        raise UserError(
            "streaming: is for data too large for the disk, not for the few pictures of a subject; "
            "leave it out."
        )


@dataclass
class DreamBoothTraining(TrainConfig):
    """Teach a model a word for a subject: all weights, from a few pictures (DreamBooth)."""

    max_steps: int = 800
    """Training steps in all."""
    batch_size: int = 1
    """Samples of one optimizer step, over all processes; as many class pictures come on top."""
    learning_rate: float = 5e-6
    """Peak learning rate."""
    dreambooth: DreamBoothConfig = field(default_factory=DreamBoothConfig)
    denoising: DenoisingConfig = field(default_factory=_every_prompt)

    def needs_captions(self) -> bool:
        """Unless all pictures have one prompt, or all prompts are dropped."""
        return self.dreambooth.instance_prompt is None and self.denoising.condition_dropout != 1

    def trained(self) -> frozenset[Trained]:
        """The denoiser, and the text encoders on request."""
        both: frozenset[Trained] = frozenset({"denoiser", "text encoders"})
        return both if self.dreambooth.train_text_encoder else super().trained()

    def captions(self) -> tuple[str, ...]:
        """The instance prompt."""
        prompt = self.dreambooth.instance_prompt
        return () if prompt is None else (prompt,)

    def companions(self) -> Companions | None:
        """The class pictures of prior preservation."""
        config = self.dreambooth
        if config.class_prompt is None:
            return None
        making = config.class_count, config.class_steps, config.class_guidance
        return Companions(config.class_prompt, config.class_images, *making)

    def canonical(self) -> DreamBoothTraining:
        """With the canonical form of the denoising values."""
        return replace(self, denoising=self.denoising.canonical())

    def check(self) -> None:
        """Raise `UserError` for values and combinations that cannot work."""
        self.dreambooth.check()
        self.denoising.check()
        _check_few(self)
        self._check_lora()
        super().check()

    def _check_lora(self) -> None:
        if self.lora_rank is not None:
            raise UserError(
                "lora_rank: dreambooth trains all weights; `diffkit train dreambooth_lora` trains "
                "a LoRA."
            )


@dataclass
class DreamBoothLoraTraining(DreamBoothTraining):
    """Train a LoRA of a subject or a style on a few pictures (DreamBooth with LoRA)."""

    max_steps: int = 500
    """Training steps in all."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    lora_rank: int | None = 4
    """Rank of the LoRA."""

    def _check_lora(self) -> None:
        if self.lora_rank is None:
            raise UserError(
                "lora_rank: dreambooth_lora trains a LoRA; `diffkit train dreambooth` trains all "
                "weights."
            )


@dataclass
class TextualInversionTraining(TrainConfig):
    """Teach a model's text encoders a new word for what a few pictures show."""

    max_steps: int = 3000
    """Training steps in all."""
    batch_size: int = 4
    """Samples of one optimizer step, over all processes."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the new embedding rows; no other row is ever touched."""
    textual_inversion: TextualInversionConfig = field(default_factory=TextualInversionConfig)
    denoising: DenoisingConfig = field(default_factory=_every_prompt)

    def needs_captions(self) -> bool:
        """The sentences about the new word take their place."""
        return False

    def trained(self) -> frozenset[Trained]:
        """None of the networks: the objective adds rows to frozen embedding tables."""
        return frozenset()

    def changes_prompts(self) -> bool:
        """Those with the new word."""
        return True

    def captions(self) -> tuple[str, ...]:
        """Sentences about the new word."""
        return self.textual_inversion.sentences()

    def result_name(self) -> str:
        """The embedding of the new word."""
        return "embedding"

    def card(self, model: LatentDiffusion) -> dict[str, Any]:
        """A textual inversion, and how stock diffusers loads it."""
        lines = ['pipeline.load_textual_inversion("THIS")  # this folder, or its hub id']
        if "text_encoder_2" in model.conditioner.encoders:
            first, second = "pipeline.text_encoder", "pipeline.text_encoder_2"
            lines = [
                "# THIS is this folder, or its hub id",
                f'pipeline.load_textual_inversion("THIS", text_encoder={first}, '
                "tokenizer=pipeline.tokenizer)",
                f'pipeline.load_textual_inversion("THIS", text_encoder={second}, '
                "tokenizer=pipeline.tokenizer_2,\n"
                '                                 weight_name="learned_embeds_2.safetensors")',
            ]
        lines.append(f'pipeline("a photo of {self.textual_inversion.token}").images[0]')
        return {"relation": "adapter", "adapter": "textual_inversion", "loading": tuple(lines)}

    def canonical(self) -> TextualInversionTraining:
        """With the canonical form of the denoising values."""
        return replace(self, denoising=self.denoising.canonical())

    def check(self) -> None:
        """Raise `UserError` for values and combinations that cannot work."""
        self.textual_inversion.check()
        self.denoising.check()
        _check_few(self)
        if self.caption_column is not None:
            raise UserError(
                "caption_column: captions are not read, sentences about the new word take their "
                "place; leave it out, or give --textual-inversion.prompts."
            )
        if self.lora_rank is not None:
            raise UserError("lora_rank: textual inversion trains a word and no LoRA; leave it out.")
        super().check()


def build_dreambooth(
    model: LatentDiffusion, config: DreamBoothTraining, lora: str | None
) -> DreamBoothObjective:
    """The objective of `dreambooth` and `dreambooth_lora`."""
    return DreamBoothObjective(model, config.dreambooth, config.denoising, lora)


def build_textual_inversion(
    model: LatentDiffusion, config: TextualInversionTraining, lora: str | None
) -> TextualInversionObjective:
    """The objective of `textual_inversion`."""
    return TextualInversionObjective(model, config.textual_inversion, config.denoising)
