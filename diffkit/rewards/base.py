"""What a reward is: a frozen network that scores pictures, most of them against a prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.fingerprint import fingerprint_module

__all__ = ["PooledReward", "Reward", "frozen"]


class Reward(ABC):
    """A frozen scorer of pictures, differentiable in the pictures and in nothing else.

        R(x, c), x = clamp((image + 1) / 2, 0, 1)

    Rewards know pictures in [0, 1] only, so a saturated pixel gets no gradient. The network runs in
    its own dtype outside autocast: the same reward trains and measures. Prompts are read once, by
    `embed_prompts`; what comes out is a tensor with one row a prompt, to be cached, indexed and cut
    into chunks beside the pictures that it belongs to.

    It is no `nn.Module`, so that a player may keep one without training or saving it.

    Attributes:
        name: as it stands in logs and reports, without paths: "hpsv2".
        label: what a report calls it: "HPS v2.1".
        resize: how it brings pictures to its own size.
        logit_scale: the inverse temperature of its own training, by which differences of R become
            log odds; None where there is none.
    """

    name: str
    label: str
    resize: str
    logit_scale: float | None = None

    @property
    @abstractmethod
    def networks(self) -> Sequence[nn.Module]:
        """All its networks."""

    @abstractmethod
    def read(self, prompts: list[str]) -> Tensor:
        """What `rate` needs of at least one prompt, one row each; called without gradient."""

    @abstractmethod
    def rate(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        """R (B,) of pixels (B, 3, H, W) float32 in [0, 1] and rows of `read`."""

    def published(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        """As `rate`, the number that reports give."""
        return self.rate(pixels, embedded)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.networks[0].parameters()).device

    def to(self, device: torch.device | str) -> Reward:
        """Move all networks; returns itself."""
        for network in self.networks:
            network.to(device)
        return self

    def fingerprint(self) -> str:
        """Digest of all weights and rules: values of another one are not comparable."""
        parts = [fingerprint_module(network) for network in self.networks]
        return "-".join([self.name, *parts])

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """What `score` needs of prompts: a tensor with one row each, without gradient.

        A prompt longer than the text tower reads is cut.
        """
        with torch.no_grad(), _without_autocast(self.device):
            return self.read(list(prompts))

    def score(self, images: Tensor, embedded: Tensor) -> Tensor:
        """R (B,), float32, of images (B, 3, H, W) in [-1, 1] and rows of `embed_prompts`.

        What training maximises. Raises `UserError` when the numbers of pictures and rows differ.
        """
        return self._checked(self.rate, images, embedded)

    def measure(self, images: Tensor, embedded: Tensor) -> Tensor:
        """As `score`, the number that is published for this reward, where that is another one."""
        return self._checked(self.published, images, embedded)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """R (B,), float32, of images (B, 3, H, W) in [-1, 1] and one prompt each."""
        return self.score(images, self.embed_prompts(prompts))

    def _checked(
        self, rate: Callable[[Tensor, Tensor], Tensor], images: Tensor, embedded: Tensor
    ) -> Tensor:
        if len(images) != len(embedded):
            raise UserError(
                f"{self.name}: {len(images)} images and {len(embedded)} prompts; "
                "give one prompt an image."
            )
        with _without_autocast(images.device):
            pixels = ((images.float() + 1) / 2).clamp(0, 1)
            return rate(pixels, embedded).float()


class PooledReward(Reward):
    """R(up(down(x)), c): a reward that sees few pixels, brought back to their size: no fine detail.

    The shorter side is averaged down to `side` pixels, the longer one in proportion, and the
    result is enlarged bilinearly. What the reward cannot see it cannot ask for: the rest of the
    picture shows what following this reward does where it is blind.

    Arguments:
        inner: R.
        side: pixels of the shorter side of down(x); smaller pictures are left as they are.
    """

    def __init__(self, inner: Reward, side: int) -> None:
        self.inner, self.side = inner, side
        self.name = f"{inner.name}@{side}"
        self.label = f"{inner.label}, pictures averaged to {side} pixels"
        self.resize = f"averaged to {side} pixels and enlarged again; then {inner.resize}"
        self.logit_scale = inner.logit_scale

    @property
    def networks(self) -> Sequence[nn.Module]:
        """Those of the reward within."""
        return self.inner.networks

    def fingerprint(self) -> str:
        """That of the reward within, and the number of pixels."""
        return f"{self.name}-{self.inner.fingerprint()}"

    def read(self, prompts: list[str]) -> Tensor:
        """As the reward within."""
        return self.inner.read(prompts)

    def rate(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        """R of the pooled pictures."""
        return self.inner.rate(self._pooled(pixels), embedded)

    def published(self, pixels: Tensor, embedded: Tensor) -> Tensor:
        """The reported number of the pooled pictures."""
        return self.inner.published(self._pooled(pixels), embedded)

    def _pooled(self, pixels: Tensor) -> Tensor:
        size = pixels.shape[-2:]
        if min(size) <= self.side:
            return pixels
        height, width = (round(side * self.side / min(size)) for side in size)
        pooled = nn.functional.adaptive_avg_pool2d(pixels, (height, width))
        return nn.functional.interpolate(pooled, size=size, mode="bilinear", align_corners=False)


def frozen(network: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """The network as every reward keeps it: in evaluation mode, without trainable parameters."""
    return network.to(device=device, dtype=dtype).eval().requires_grad_(False)


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
