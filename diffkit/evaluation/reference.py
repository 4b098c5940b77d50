"""Saved statistics of a data set, so that its pictures are read once."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffkit.errors import UserError
from diffkit.evaluation.extractors import Extractor
from diffkit.evaluation.moments import Moments
from diffkit.files import atomic_write

__all__ = ["Reference"]

_KIND = "diffkit reference 1"
_ROWS = 4096  # rows a write
MOMENT_ROWS = 1024
"""Rows that are float64 at a time; more would outweigh the features of a small set."""


@dataclass(frozen=True)
class Reference:
    """What a set of pictures is compared with.

    Attributes:
        features: (n, d) float32, perhaps a memory map.
        moments: their mean and covariance, float64.
        extractor, key: name and key of the network, see `Extractor`.
        resize: the rules by which pictures came to the network's size.
        source: where the pictures came from.
    """

    features: npt.NDArray[np.float32]
    moments: Moments
    extractor: str
    key: str
    resize: str
    source: str

    @property
    def n(self) -> int:
        """Number of pictures."""
        return len(self.features)

    @classmethod
    def of(
        cls, features: npt.NDArray[np.float32], extractor: Extractor, resize: str, source: str
    ) -> Reference:
        """The reference of `extractor`'s features (n, d); `resize` is their `PictureSet`'s."""
        rules = f"{resize}; {extractor.resize}"
        moments = Moments.of(as_tensor(features), block=MOMENT_ROWS)
        return cls(features, moments, extractor.name, extractor.key, rules, source)

    def check(self, extractor: Extractor, resize: str) -> None:
        """Raise `UserError` unless features of `extractor` and this resize rule are comparable."""
        if self.key != extractor.key:
            raise UserError(
                f"{self.source}: a reference made with the extractor {self.extractor}; this run's "
                f"is {extractor.name}"
                + (" of other weights" if self.extractor == extractor.name else "")
                + ". Use the same, or give the pictures instead."
            )
        if self.resize != (rules := f"{resize}; {extractor.resize}"):
            raise UserError(
                f"{self.source}: a reference made by another resize rule, {self.resize!r}; "
                f"this run's is {rules!r}. Give the pictures instead."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with the features, their moments and where they come from.

        The features are written in pieces: a map of them is never read into memory as a whole.
        """
        mean, cov = (getattr(self.moments, name).double().numpy() for name in ("mean", "cov"))
        tensors = {"mean": mean, "cov": cov, "features": self.features}
        metadata = {
            "kind": _KIND,
            "extractor": self.extractor,
            "key": self.key,
            "resize": self.resize,
            "source": self.source,
        }
        header = _header(tensors, metadata)
        with atomic_write(path) as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for array in tensors.values():
                for start in range(0, len(array), _ROWS):
                    file.write(np.ascontiguousarray(array[start : start + _ROWS]).tobytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Reference:
        """Read what `save` wrote. Raises `UserError` for a missing, broken or other file."""
        name = os.fspath(path)
        if not Path(path).is_file():
            raise UserError(f"{name}: no such file; a reference written by diffkit evaluate.")
        try:
            with safe_open(name, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("kind") != _KIND:
                    raise UserError(
                        f"{name}: is not a reference; one is written by diffkit evaluate "
                        "--data FOLDER as reference.safetensors."
                    )
                features, mean, cov = (file.get_tensor(k) for k in ("features", "mean", "cov"))
        except SafetensorError as error:
            raise UserError(f"{name}: is torn or not a safetensors file ({error}).") from error
        return cls(
            features=features.numpy(),
            moments=Moments(len(features), mean, cov),
            extractor=metadata["extractor"],
            key=metadata["key"],
            resize=metadata["resize"],
            source=metadata["source"],
        )


def as_tensor(features: npt.NDArray[np.float32]) -> Tensor:
    """The same memory as a tensor."""
    return torch.from_numpy(features)


def _header(tensors: Mapping[str, npt.NDArray[np.floating]], metadata: Mapping[str, str]) -> bytes:
    """The JSON of a safetensors file, padded to 8 bytes, for tensors that follow in this order."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        kind = {"f4": "F32", "f8": "F64"}[array.dtype.str[1:]]
        entries[name] = {"dtype": kind, "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)
