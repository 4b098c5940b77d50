"""New words for CLIP text encoders: a token of n embedding rows beside the frozen vocabulary.

A token "<cat>" of n rows is "<cat>", "<cat>_1", ..., "<cat>_(n-1)" to the tokenizer. Stock
pipelines with textual inversion write them all where a prompt says "<cat>", so that training reads
prompts as plain diffusers will.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioner
from diffkit.models.text_encoders import clip_encoders
from diffkit.models.weights import read_header

if TYPE_CHECKING:
    from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = [
    "PlaceholderEmbedding",
    "add_placeholder",
    "embedding_file",
    "load_embedding",
    "placeholder_words",
]


class PlaceholderEmbedding(nn.Module):
    """A frozen embedding table with n trainable rows: ids first, ..., first + n - 1.

    Arguments:
        table: the vocabulary's, (V, D); frozen here and never written.
        first: the id of the first new row.
        rows: (n, D) first values; kept in float32.
    """

    def __init__(self, table: nn.Embedding, first: int, rows: Tensor) -> None:
        super().__init__()
        self.table = table.requires_grad_(False)
        self.first = first
        self.rows = nn.Parameter(rows.detach().to(torch.float32, copy=True))

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (..., D) of ids (...), in the dtype of the table."""
        place = ids - self.first
        new = (place >= 0) & (place < len(self.rows))
        old: Tensor = self.table(ids.masked_fill(new, 0))
        rows = nn.functional.embedding(place.clamp(0, len(self.rows) - 1), self.rows)
        return torch.where(new[..., None], rows.to(old.dtype), old)


def placeholder_words(token: str, count: int) -> list[str]:
    """The tokenizer's names of the rows of a token, as stock diffusers names them."""
    return [token, *(f"{token}_{number}" for number in range(1, count))]


def add_placeholder(
    conditioner: Conditioner, token: str, initializer: str, count: int
) -> dict[str, PlaceholderEmbedding]:
    """Teach every text encoder a token of `count` rows; the embeddings by encoder's name.

    Row i begins as the embedding of the initializer's token i mod k, of its k tokens.

    Raises:
        UserError: a model without CLIP or with another encoder too, in which the new word would be
            read letter by letter; a token that is known already; an initializer that no tokenizer
            knows or that has more tokens than there are rows.
    """
    encoders = clip_encoders(conditioner)
    others = sorted(set(conditioner.encoders) - set(encoders))
    if not encoders or others:
        has = f"has {', '.join(others)}, which is none" if others else "has none"
        raise UserError(
            "textual_inversion: needs a model of which all text encoders are CLIP, such as Stable "
            f"Diffusion 1, 2 or XL; this {conditioner.family.name} {has}."
        )
    found = {}
    for name, encoder in encoders.items():
        tokenizer: Any = conditioner.components[name.replace("text_encoder", "tokenizer")]
        found[name] = _add(encoder, tokenizer, token, initializer, count)
    return found


def _add(
    encoder: Any, tokenizer: Any, token: str, initializer: str, count: int
) -> PlaceholderEmbedding:
    words = placeholder_words(token, count)
    vocabulary = tokenizer.get_vocab()
    known = [word for word in words if word in vocabulary]
    if known:
        raise UserError(
            f"textual_inversion.token: {known[0]!r} is a word of this model already; choose a new "
            "one, such as '<my-cat>'."
        )
    start = tokenizer.encode(initializer, add_special_tokens=False)
    if not 1 <= len(start) <= count:
        raise UserError(
            f"textual_inversion.initializer: {initializer!r} is {len(start)} tokens and the new "
            f"word has {count} vector(s); give a shorter word, or more --textual-inversion.vectors."
        )
    tokenizer.add_tokens(words)
    first = tokenizer.convert_tokens_to_ids(words[0])
    table = encoder.get_input_embeddings()
    rows = table.weight.detach()[[start[i % len(start)] for i in range(count)]]
    embedding = PlaceholderEmbedding(table, first, rows)
    encoder.set_input_embeddings(embedding)
    return embedding


def embedding_file(encoder: str) -> str:
    """The file of a text encoder's rows in a saved textual inversion, by component name."""
    return f"learned_embeds{encoder.removeprefix('text_encoder')}.safetensors"


def load_embedding(model: LatentDiffusion, folder: str | os.PathLike[str]) -> str:
    """Teach a model the word of a saved textual inversion, as stock diffusers does; returns it.

    The embedding tables of the text encoders grow by its rows.

    Raises:
        UserError: a text encoder has no file there, or knows the word already.
    """
    pipeline: Any = model.pipeline()
    token = ""
    for name, encoder in clip_encoders(model.conditioner).items():
        path = Path(folder) / embedding_file(name)
        token = next(iter(read_header(path).shapes))
        tokenizer = model.conditioner.components[name.replace("text_encoder", "tokenizer")]
        try:
            pipeline.load_textual_inversion(
                folder, weight_name=path.name, text_encoder=encoder, tokenizer=tokenizer
            )
        except ValueError as error:
            raise UserError(f"{path}: cannot be loaded: {error}") from error
    if not token:
        raise UserError(f"{folder}: {model.family.name} models have no CLIP text encoder.")
    return token
