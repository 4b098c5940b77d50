"""What a frozen network computed, kept on disk: latent moments and text embeddings.

Every entry is one safetensors file named by a hash of everything that decides its content, written
under a temporary name and renamed. So several processes and several runs may fill and read one
folder at once: whoever comes second finds the entry, or replaces it by an equal one. An entry
carries a checksum. A file that broke off is seen by `has`, a damaged one by `read`; both are then
absent, and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffkit.data.transforms import RESAMPLING, View
from diffkit.errors import RunFailed
from diffkit.files import atomic_write

__all__ = ["EmbeddingCache", "LatentCache", "TensorCache", "checksum"]

_CHECKSUM = "blake2b"


class TensorCache:
    """Named tensors by key, in files below `folder`, for one network.

    Arguments: `folder` is made on the first write; `fingerprint` identifies the weights and the
    configuration of the network, so another network never finds these entries.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: str) -> None:
        self.folder = Path(folder)
        self.fingerprint = fingerprint

    def path(self, key: str) -> Path:
        """The file of an entry; 256 subfolders keep each of them small."""
        return self.folder / self.fingerprint[:16] / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """True when the entry is there and complete; only its header is read."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                return _CHECKSUM in (file.metadata() or {})
        except (OSError, SafetensorError):
            return False

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of an entry, bit by bit as they were written; None if absent or damaged.

        A damaged file is deleted, so that the entry can be made again.
        """
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
                expected = (file.metadata() or {}).get(_CHECKSUM)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError):
            expected, tensors = None, {}
        if expected is not None and checksum(tensors) == expected:
            return tensors
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        return None

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store an entry atomically, each tensor in its own dtype."""
        kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        with atomic_write(self.path(key)) as file:
            file.write(save(kept, metadata={_CHECKSUM: checksum(kept)}))

    def lost(self, what: str) -> str:
        """What to say of an entry that was there when the run started."""
        return (
            f"{self.folder}: the cached {what} were damaged or removed, or the picture was "
            "changed, while the run went on. Run the same command again: it makes them anew and "
            "goes on from the last checkpoint."
        )

    def _hash(self, *parts: object) -> str:
        text = json.dumps([self.fingerprint, *parts])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class LatentCache(TensorCache):
    """Moments (2C, h, w) float32 of single pictures: mean and log variance, not samples.

    The noise of the latents is therefore drawn anew at each visit. The key holds the codec, the
    identity of the picture, the resize filter and the whole view: sizes, crop, and flip, since the
    latents of a mirrored picture are not the mirrored latents.
    """

    def key(self, identity: str, view: View) -> str:
        """The name of the entry of one view of one picture."""
        return self._hash(identity, RESAMPLING, astuple(view))


class EmbeddingCache(TensorCache):
    """The conditioning of single captions, without picture sizes, in the dtype of the encoders."""

    def key(self, caption: str) -> str:
        """The name of the entry of one caption."""
        return self._hash(caption)

    def require(self, caption: str) -> dict[str, Tensor]:
        """The entry of a caption that was stored; raises `RunFailed` when it is gone."""
        entry = self.read(self.key(caption))
        if entry is None:
            raise RunFailed(self.lost(f'embedding of "{caption}"'))
        return entry


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and bytes of tensors on the CPU, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
