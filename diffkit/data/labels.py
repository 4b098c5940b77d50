"""Labels of a data set in the numbering of the model that is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from diffkit.data.records import Encoded, ImageSource, Sample
from diffkit.errors import UserError
from diffkit.models.classes import Classes

__all__ = ["Relabelled", "match_labels"]


class Relabelled:
    """A source whose labels are those of a model.

    Arguments:
        source: pictures with labels.
        numbers: the model's class number of each of the source's.
        class_names: names of the model's classes.
    """

    def __init__(
        self, source: ImageSource, numbers: Sequence[int], class_names: Sequence[str]
    ) -> None:
        self.source = source
        self.numbers = tuple(numbers)
        self._class_names = tuple(class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the model's classes in the order of their numbers."""
        return self._class_names

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Sample:
        sample = self.source[index]
        assert sample.label is not None
        return replace(sample, label=self.numbers[sample.label])

    def encoded(self, index: int, /) -> Encoded:
        """The picture's file or bytes."""
        return self.source.encoded(index)

    def identity(self, index: int, /) -> str:
        """That of the source: a picture does not change with its label."""
        return self.source.identity(index)


def match_labels(source: ImageSource, classes: Classes) -> tuple[Relabelled, Classes]:
    """The source in the model's numbering, and the model's classes with names where it had none.

    Class names of the source are looked up among the model's names and numbers. A model without
    names takes numbers as they are, and other names in their order, as its own from then on.

    Raises `UserError` for a source without labels, an unknown class, and more classes than the
    model has.
    """
    names = source.class_names
    if not names:
        raise UserError(
            f"the pictures have no classes, and this model is conditioned on {classes.count}: put "
            'them into one folder a class, or name them in a column "label" of the metadata.'
        )
    if not classes.names and not all(name.isdecimal() for name in names):
        if len(names) > classes.count:
            raise UserError(
                f"the pictures have {len(names)} classes and the model has {classes.count}."
            )
        classes = classes.named(names)
    numbers = [_number(classes, name) for name in names]
    known = [classes.name(number) for number in range(classes.count)]
    return Relabelled(source, numbers, known), classes


def _number(classes: Classes, name: str) -> int:
    try:
        return classes.number(name)
    except UserError as error:
        raise UserError(f"the class {error}") from error
