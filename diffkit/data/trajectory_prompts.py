"""What pairs are made for: texts, captions or labels of a data set, or classes."""

from __future__ import annotations

from collections.abc import Sequence

from diffkit.data.hub import open_source
from diffkit.data.labels import match_labels
from diffkit.data.trajectory_store import Prompt
from diffkit.errors import UserError
from diffkit.models.classes import Classes

__all__ = ["prompts_of_data", "prompts_of_texts"]


def prompts_of_texts(texts: Sequence[str] | None, classes: Classes | None) -> list[Prompt]:
    """A prompt a text; for a model with classes these are names or numbers.

    Without texts every class in turn, of an unconditional model the only prompt that it takes.
    Raises `UserError` for an unknown class, and for a model of text that is given none.
    """
    if classes is None:
        if texts is None:
            raise UserError("no prompts: give --prompts FILE, or --data for its captions.")
        return [Prompt(text) for text in texts]
    if texts is None:
        numbers = list(range(classes.count)) or [0]
    else:
        numbers = classes.numbers(texts)
    return [_of_class(classes, number) for number in numbers]


def prompts_of_data(
    data: str, classes: Classes | None, split: str = "train", caption_column: str | None = None
) -> list[Prompt]:
    """Every caption of every picture in their order, or the class of every picture.

    So a caption, or class, has as many pairs as the data set has of it. Raises `UserError` for data
    without captions or labels, and what `open_source` and `match_labels` raise.
    """
    source = open_source(data, split=split, caption_column=caption_column)
    samples = (source[i] for i in range(len(source)))
    if classes is None:
        texts = [caption for sample in samples for caption in sample.captions]
        if not texts:
            raise UserError(f"{data}: has no captions, which are the prompts; give --prompts.")
        return [Prompt(text) for text in texts]
    if not classes.count:
        raise UserError(
            "--data: this model is unconditional, so it takes no prompts; leave it out."
        )
    matched, known = match_labels(source, classes)
    labels = [matched[i].label for i in range(len(matched))]
    return [_of_class(known, label) for label in labels if label is not None]


def _of_class(classes: Classes, number: int) -> Prompt:
    return Prompt(classes.prompt(number) if classes.count else "", number)
