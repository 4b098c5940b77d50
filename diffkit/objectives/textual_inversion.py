"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): a new word for what pictures show.

    v* = argmin_v E ||eps - eps_theta(z_t, t, c(v))||^2                     (their equation 2)

Only the n rows v of the new word in each text encoder's embedding table train; the denoiser, the
rest of the encoders and all other rows are frozen. The prompts are neutral sentences about the
word, one drawn at each visit of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffkit.errors import UserError
from diffkit.files import atomic_directory
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.placeholder import add_placeholder, embedding_file, placeholder_words
from diffkit.models.weights import save_safetensors
from diffkit.objectives.denoising import DenoisingConfig
from diffkit.objectives.personal import PersonalObjective

__all__ = ["TEMPLATES", "TextualInversionConfig", "TextualInversionObjective"]

TEMPLATES: dict[str, tuple[str, ...]] = {
    "object": (
        "a photo of {}",
        "a picture of {}",
        "a photo of one {}",
        "a good photo of {}",
        "a bright photo of {}",
        "a dark photo of {}",
        "a close photo of {}",
        "a cropped photo of {}",
        "a clean photo of {}",
        "a rendering of {}",
        "a photo of a small {}",
        "a photo of the {}",
    ),
    "style": (
        "a painting in the style of {}",
        "a picture in the style of {}",
        "a drawing in the style of {}",
        "a rendering in the style of {}",
        "a scene in the style of {}",
        "a close-up in the style of {}",
        "a bright picture in the style of {}",
        "a dark picture in the style of {}",
        "a large painting in the style of {}",
        "a small painting in the style of {}",
    ),
}
"""Sentences about the new word, which stands for {}."""


@dataclass
class TextualInversionConfig:
    """The new word and the sentences that it is learnt in."""

    token: str = ""
    """The new word, such as "<my-cat>"; needed."""
    initializer: str = ""
    """A known word that is near, such as "cat": the first value of the embedding; needed."""
    vectors: int = 1
    """Embedding rows of the new word: more remember more and obey prompts less."""
    template: Literal["object", "style"] = "object"
    """Sentences of an object or of a style."""
    prompts: tuple[str, ...] = ()
    """Own sentences in place of the template's, with {} for the new word."""

    def check(self) -> None:
        """Raise `UserError` for impossible values."""
        for name in ("token", "initializer"):
            if not getattr(self, name).strip():
                raise UserError(f"textual_inversion.{name}: is missing; give a word.")
        if any(letter.isspace() for letter in self.token) or self.token != self.token.lower():
            raise UserError(
                f"textual_inversion.token: {self.token!r} must be one word in lower case, such as "
                "'<my-cat>'."
            )
        if self.vectors < 1:
            raise UserError(f"textual_inversion.vectors: {self.vectors} must be at least 1.")
        if self.prompts and self.template != "object":
            raise UserError(
                "textual_inversion.template: --textual-inversion.prompts take its place; leave one "
                "of the two out."
            )
        for prompt in self.prompts:
            if prompt.count("{}") != 1:
                raise UserError(
                    f"textual_inversion.prompts: {prompt!r} must hold {{}} once, where the new "
                    "word goes."
                )

    def sentences(self) -> tuple[str, ...]:
        """The prompts, with the new word in them."""
        return tuple(
            sentence.replace("{}", self.token)
            for sentence in self.prompts or TEMPLATES[self.template]
        )


class TextualInversionObjective(PersonalObjective):
    """Training of the rows of one new word.

    Arguments:
        model: its tokenizers and text encoders learn the word in place; nothing else of it trains.
        config: see `TextualInversionConfig`.
        denoising: noise, times, weights and dropout of the loss.

    Raises `UserError` for a model whose encoders are not all CLIP, a word that it knows already,
    and a sentence so long that the new word would be cut off.
    """

    name = "embedding"

    def __init__(
        self, model: LatentDiffusion, config: TextualInversionConfig, denoising: DenoisingConfig
    ) -> None:
        config.check()
        self.config = config
        conditioner = model.conditioner
        self.embeddings = add_placeholder(
            conditioner, config.token, config.initializer, config.vectors
        )
        _check_lengths(model, config)
        super().__init__(model, denoising, None, conditioner.encoders)

    def save(self, folder: Path) -> None:
        """Write what stock `load_textual_inversion` reads: {token: rows (n, D)} a text encoder.

        The file of `text_encoder` is learned_embeds.safetensors, that of `text_encoder_2`
        learned_embeds_2.safetensors.
        """
        with atomic_directory(folder, overwrite=True) as place:
            for name, embedding in self.embeddings.items():
                rows = embedding.rows.detach().float().cpu().contiguous()
                save_safetensors(place / embedding_file(name), {self.config.token: rows})


def _check_lengths(model: LatentDiffusion, config: TextualInversionConfig) -> None:
    spoken = " ".join(placeholder_words(config.token, config.vectors))
    for name, tokenizer in model.conditioner.components.items():
        if not name.startswith("tokenizer"):
            continue
        reader: Any = tokenizer
        for sentence in config.sentences():
            before = sentence.partition(config.token)[0]
            # The start of the text and the new word have to fit before its end.
            needed = len(reader(before + spoken).input_ids)
            if needed > reader.model_max_length:
                raise UserError(
                    f"textual_inversion: {sentence!r} with {config.vectors} vector(s) needs "
                    f"{needed} tokens and {name} reads {reader.model_max_length}; give fewer "
                    "--textual-inversion.vectors or shorter --textual-inversion.prompts."
                )
