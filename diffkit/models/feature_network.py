"""A small convolutional classifier whose features stand in for Inception's when offline.

It is trained on the pictures the embedded model is trained on, so a distance between its features
compares pictures of that kind only. Such a distance is never called FID.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.files import atomic_directory, read_json

__all__ = ["FeatureNetwork", "FeatureNetworkConfig", "ImageTrunk"]

IMAGE_SIZE = 64


class _Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut: y = relu(x' + f(x)), x' pooled and projected."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut.append(nn.AvgPool2d(stride))
        if channels_in != channels_out:
            self.shortcut.append(nn.Conv2d(channels_in, channels_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ImageTrunk(nn.Module):
    """A residual network from pictures to one vector each.

    Arguments:
        widths: channels of the stem (at half resolution) and of each stage; every stage halves
            the resolution again. The last width is the size of the output vector.
        depths: residual blocks of each stage, one number fewer than `widths`.
    """

    def __init__(self, widths: Iterable[int], depths: Iterable[int]) -> None:
        super().__init__()
        self.widths, self.depths = tuple(widths), tuple(depths)
        self.stem = nn.Conv2d(3, self.widths[0], 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(self.widths[0])
        self.blocks = nn.Sequential()
        for channels_in, channels_out, depth in zip(
            self.widths[:-1], self.widths[1:], self.depths, strict=True
        ):
            self.blocks.append(_Residual(channels_in, channels_out, 2))
            for _ in range(depth - 1):
                self.blocks.append(_Residual(channels_out, channels_out, 1))

    @property
    def pooled_sizes(self) -> list[int]:
        """Channels of the stem and of every block, in order."""
        repeats = zip(self.widths[1:], self.depths, strict=True)
        return [self.widths[0], *(width for width, depth in repeats for _ in range(depth))]

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to vectors (B, widths[-1]), float32.

        Pictures of another size than 64 x 64 are resized with an antialiasing bilinear filter.
        Raises `UserError` for integer pixels or another number of channels than three.
        """
        return self.pooled(self.prepare(images))[-1]

    def prepare(self, images: Tensor) -> Tensor:
        """Check images, and bring them to float32 and 64 x 64 pixels; raises as `forward` does."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise UserError(
                f"images: shape {tuple(images.shape)} and dtype {images.dtype} cannot be scored; "
                "give a float tensor of shape (B, 3, H, W) with values in [-1, 1]."
            )
        x = images.float()
        if x.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE):
            return x
        size = (IMAGE_SIZE, IMAGE_SIZE)
        return F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)

    def pooled(self, x: Tensor) -> list[Tensor]:
        """Spatial means (B, C) after the stem and after every block, at the resolution of `x`.

        Training begins with smaller, cheaper pictures, so nothing is resized here.
        """
        return [maps.mean((2, 3)) for maps in self.maps(x)]

    def maps(self, x: Tensor) -> list[Tensor]:
        """Features (B, C, h, w) after the stem and after every block, of `x` as it is."""
        x = torch.relu(self.norm(self.stem(x)))
        maps = [x]
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps


@dataclass(frozen=True)
class FeatureNetworkConfig:
    """Class names and sizes of a `FeatureNetwork`, kept in its `config.json`."""

    concepts: tuple[str, ...]
    styles: tuple[str, ...]
    widths: tuple[int, ...] = (24, 48, 96, 192)
    depths: tuple[int, ...] = (1, 2, 2)


class FeatureNetwork(nn.Module):
    """Features, concept and style of small pictures.

    `features` gives the vector a set distance is computed on. Two linear heads name what a picture
    shows (`concepts`, read from the features) and how it is drawn (`styles`, read from the means
    of all blocks: a style shows in textures, which the last block has forgotten).
    """

    def __init__(self, config: FeatureNetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = ImageTrunk(config.widths, config.depths)
        self.concept_head = nn.Linear(config.widths[-1], len(config.concepts))
        size = sum(self.trunk.pooled_sizes)
        # Means of different blocks differ a lot in scale; unscaled, the head hardly learns.
        self.style_norm = nn.BatchNorm1d(size, affine=False)
        self.style_head = nn.Linear(size, len(config.styles))

    @property
    def feature_size(self) -> int:
        """Length d of a feature vector."""
        return self.config.widths[-1]

    def features(self, images: Tensor) -> Tensor:
        """Feature vectors (B, d), float32, of images (B, 3, H, W) in [-1, 1] of any size."""
        features: Tensor = self.trunk(images)
        return features

    def classify(self, images: Tensor) -> dict[str, Tensor]:
        """Unnormalised log-probabilities {"concept": (B, K), "style": (B, S)}, float32."""
        return self.heads(self.trunk.pooled(self.trunk.prepare(images)))

    def heads(self, pooled: list[Tensor]) -> dict[str, Tensor]:
        """The logits of `classify` from the means that `ImageTrunk.pooled` gives."""
        style = self.style_head(self.style_norm(torch.cat(pooled, -1)))
        return {"concept": self.concept_head(pooled[-1]), "style": style}

    forward = classify

    def concept_indices(self, names: Iterable[str]) -> Tensor:
        """Columns of the concept logits for class names, int64 (len(names),).

        Selecting them restricts the classifier to these concepts. Raises `UserError` for a name
        the network was not trained on.
        """
        return _indices("concept", self.config.concepts, names)

    def style_indices(self, names: Iterable[str]) -> Tensor:
        """Columns of the style logits for style names; raises as `concept_indices` does."""
        return _indices("style", self.config.styles, names)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `config.json` and `model.safetensors`: float16 weights, float32 statistics.

        Raises `UserError` when `folder` exists and `overwrite` is false.
        """
        with atomic_directory(folder, overwrite=overwrite) as temporary:
            text = json.dumps(asdict(self.config), indent=1, ensure_ascii=False)
            (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
            save_file(half_parameters(self), temporary / "model.safetensors")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> FeatureNetwork:
        """Read what `save` wrote, in float32 and evaluation mode, every weight required.

        Raises `UserError` when the folder, a file, a key of the configuration or a weight is
        missing or does not fit.
        """
        path = Path(folder)
        names = read_config(path, FeatureNetworkConfig)
        network = cls(FeatureNetworkConfig(**{key: tuple(value) for key, value in names.items()}))
        load_strictly(network, path / "model.safetensors")
        return network.eval()


def _indices(kind: str, known: tuple[str, ...], names: Iterable[str]) -> Tensor:
    position = {name: index for index, name in enumerate(known)}
    wanted = list(names)
    unknown = [name for name in wanted if name not in position]
    if unknown:
        raise UserError(
            f"{kind} {unknown[0]!r}: not a class of this feature network; it knows {len(known)}, "
            f"such as {', '.join(map(repr, known[:4]))}."
        )
    return torch.tensor([position[name] for name in wanted], dtype=torch.int64)


def half_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The state of `module` for disk: parameters in float16, buffers as they are.

    Batch statistics stay in float32: a small variance would round to zero.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    state.update({name: state[name].half() for name, _ in module.named_parameters()})
    return state


def read_config(folder: Path, config: type[Any]) -> Mapping[str, Any]:
    """Read `folder/config.json` and demand exactly the fields of the dataclass `config`.

    Raises `UserError` naming the missing folder or the keys that differ.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; one with config.json and weights is needed.")
    values = read_json(folder / "config.json")
    expected = set(config.__dataclass_fields__)
    if not isinstance(values, dict) or set(values) != expected:
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{folder / 'config.json'}: has {found}, must have {sorted(expected)}.")
    return values


def load_strictly(module: nn.Module, path: Path) -> None:
    """Load every parameter and buffer of `module` from a safetensors file, keeping its dtypes.

    Raises `UserError` when the file is missing or broken, or its names or shapes do not fit.
    """
    try:
        module.load_state_dict(load_file(path))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{path}: does not hold the weights its config asks for: {error}"
        ) from error
