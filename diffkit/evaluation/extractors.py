"""Networks that turn pictures into the vectors that set distances are computed on.

Only numbers on Inception features are called FID or KID, see `Extractor.inception`. Nothing is
downloaded unless the specification names it:

    embedded               the feature network of `diffkit.assets`
    inception              torch-fidelity's Inception-v3, from torch hub's cache folder
    inception:PATH         the same, its weights from a file
    clip:ARCH:TAG          open_clip's image tower, fetched by open_clip
    clip:ARCH:PATH         the same from a file, with OpenAI's normalisation
    clip:ARCH:TAG=PATH     the same from a file, with the normalisation of TAG
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.evaluation.pictures import to_uint8
from diffkit.models.feature_network import FeatureNetwork
from diffkit.models.fingerprint import fingerprint_module
from diffkit.models.named_weights import load_named_weights, optional_module

__all__ = ["EMBEDDED_RESIZE", "Extractor", "load_extractor"]

EMBEDDED_RESIZE = "the network resizes to 64x64 (bilinear, antialiased)"
_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_INCEPTION_FILE}"
)


@dataclass(frozen=True)
class Extractor:
    """A frozen network from pictures to vectors.

    Attributes:
        name: its specification without paths: "embedded", "inception", "clip:ViT-B-32".
        label: what the report calls it.
        dim: length d of a vector.
        resize: how the network brings pictures to its own size.
        key: changes with every weight and rule; features of different keys are not comparable.
        encode: images (B, 3, H, W) in [-1, 1] on `device` -> (B, d).
        device: where it runs.
    """

    name: str
    label: str
    dim: int
    resize: str
    key: str
    encode: Callable[[Tensor], Tensor]
    device: torch.device

    @property
    def inception(self) -> bool:
        """Whether numbers on these features may be called FID and KID."""
        return self.name == "inception"

    def __call__(self, images: Tensor) -> Tensor:
        """Vectors (B, d), float32 on the CPU, of images (B, 3, H, W) in [-1, 1]."""
        with torch.no_grad():
            return self.encode(images.to(self.device)).float().cpu()


def load_extractor(spec: str = "embedded", device: str | torch.device = "cpu") -> Extractor:
    """The extractor of a specification, see the module.

    Raises `UserError` for an unknown one, a missing optional package, or weights that are missing
    or do not fit.
    """
    kind, _, rest = spec.partition(":")
    place = torch.device(device)
    if spec == "embedded":
        return _embedded(place)
    if kind == "inception":
        return _inception(rest, place)
    if kind == "clip":
        from diffkit.models.clip import load_clip

        clip = load_clip(spec, place)
        return Extractor(
            clip.name, clip.label, clip.dim, clip.resize, clip.key, clip.embed_images, place
        )
    raise UserError(
        f"extractor {spec!r}: unknown. Known: embedded, inception, inception:PATH, clip:ARCH:TAG, "
        "clip:ARCH:PATH."
    )


def _embedded(device: torch.device) -> Extractor:
    from diffkit.assets import path

    network = FeatureNetwork.load(path("features")).to(device)
    return Extractor(
        name="embedded",
        label="diffkit feature network",
        dim=network.feature_size,
        resize=EMBEDDED_RESIZE,
        key=fingerprint_module(network),
        encode=network.features,
        device=device,
    )


def _inception(path: str, device: torch.device) -> Extractor:
    fidelity = optional_module(
        "torch_fidelity.feature_extractor_inceptionv3", "evaluate", "the extractor inception"
    )
    state = load_named_weights(path or _cached_inception())
    # Its constructor unpickles a file without restraint or downloads one: it gets the bytes of
    # the tensors that have just been read safely.
    safe = io.BytesIO()
    torch.save(dict(state), safe)
    safe.seek(0)
    try:
        network: nn.Module = fidelity.FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=safe
        )
    except RuntimeError as error:
        raise UserError(
            f"{path}: are not the weights of torch-fidelity's Inception-v3; "
            f"they are published as {_INCEPTION_URL}. ({str(error).splitlines()[0]})"
        ) from error
    network.to(device)

    def encode(images: Tensor) -> Tensor:
        features: Tensor = network(to_uint8(images))[0]
        return features

    return Extractor(
        name="inception",
        label="Inception-v3 of torch-fidelity",
        dim=2048,
        resize="the network resizes to 299x299 (bilinear as TensorFlow 1, not antialiased)",
        key=fingerprint_module(network),
        encode=encode,
        device=device,
    )


def _cached_inception() -> Path:
    file = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
    if not file.is_file():
        raise UserError(
            f"extractor inception: its weights are not on this machine. Download {_INCEPTION_URL} "
            "and give the file as inception:PATH."
        )
    return file
