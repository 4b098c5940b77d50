"""The network that is told z_t, the time and the conditioning, and what its output means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.conditioner import Conditioning
from diffkit.models.families import BlockInput, Family, Geometry
from diffkit.models.schedule import Prediction, Schedule

__all__ = ["Denoiser", "set_attention"]


class Denoiser(nn.Module):
    """A diffusers U-Net or transformer behind one call.

    The output is in the model's own parametrisation, `schedule.prediction_type`. Inputs are cast
    to the network's dtype; `predict` and `guided` compute in at least float32.
    """

    def __init__(self, model: nn.Module, family: Family, schedule: Schedule) -> None:
        super().__init__()
        self.model = model
        self.family = family.of(model)
        self.family.prepare(model)
        self.schedule = schedule

    @property
    def dtype(self) -> torch.dtype:
        """The network's floating dtype."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def forward(
        self, z_t: Tensor, t: Tensor, cond: Conditioning, guidance: Tensor | None = None
    ) -> Tensor:
        """Raw output (B, C, h, w) for z_t (B, C, h, w) at times t (B,) in the model's units.

        `guidance` (B,) are diffusers' `guidance_scale` values for a model with a guidance
        embedding, which needs them; others refuse them. EDM's scaling of the input happens here.
        """
        dtype = self.dtype
        z_t = self.schedule.scale_input(z_t, t)
        return self.family.call(self.model, z_t.to(dtype), t, cond.to(dtype=dtype), guidance)

    def predict(
        self, z_t: Tensor, t: Tensor, cond: Conditioning, guidance: Tensor | None = None
    ) -> Prediction:
        """The output as a `Prediction`: .x0, .eps, .v and .velocity in at least float32."""
        return self.schedule.prediction(self(z_t, t, cond, guidance), z_t, t)

    def guided(
        self,
        z_t: Tensor,
        t: Tensor,
        cond: Conditioning,
        uncond: Conditioning,
        scale: float,
        guidance: Tensor | None = None,
    ) -> Prediction:
        """Classifier-free guidance in diffusers' convention (Ho & Salimans 2022).

        output = o_uncond + scale (o_cond - o_uncond), both in one batch of 2B; scale = 1 is the
        conditional model. `guidance` is told to the network in both halves, see `forward`.
        """
        self.family.require("cfg")
        both = Conditioning.cat([uncond, cond])
        told = None if guidance is None else torch.cat([guidance, guidance])
        outputs = self(torch.cat([z_t, z_t]), torch.cat([t, t]), both, told).float()
        without, given = outputs.chunk(2)
        return self.schedule.prediction(without + scale * (given - without), z_t, t)

    @property
    def geometry(self) -> Geometry:
        """What latents the network takes."""
        return self.family.geometry(self.model)

    @property
    def multiple(self) -> int:
        """Sides of latents at multiples of this pass through every level without padding or
        cropping: the patch size, or for a U-Net all of its downsampling."""
        blocks = self.model.config.get("down_block_types") or ("",)  # type: ignore[union-attr, operator]
        return max(self.geometry.patch, 2 ** (len(blocks) - 1))

    def tokens(self, height: int, width: int) -> int:
        """Number of tokens of latents (B, C, height, width)."""
        patch = self.geometry.patch
        return (height // patch) * (width // patch)

    @property
    def tap_names(self) -> tuple[str, ...]:
        """Names of the features that `taps` can read, in the order of computation."""
        self.family.require("taps")
        return self.family.tap_names(self.model)

    @contextmanager
    def taps(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Within the context every call leaves the named features in the dict.

        Gradients flow through them. Raises `UserError` for a name that is not in `tap_names`.
        """
        unknown = [name for name in names if name not in self.tap_names]
        if unknown:
            raise UserError(f"no block {unknown[0]!r}; there are {', '.join(self.tap_names)}.")
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name in names:
                handle = self.family.tap(self.model, name, partial(found.__setitem__, name))
                hooks.callback(handle.remove)
            yield found

    @property
    def inputs(self) -> tuple[BlockInput, ...]:
        """Where `added` can add something inside the network; nowhere in most."""
        return self.family.inputs(self.model)

    @contextmanager
    def added(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the context every call adds these tensors at the places of `inputs`, by name."""
        with ExitStack() as hooks:
            for name, tensor in tensors.items():
                hooks.callback(self.family.add(self.model, name, tensor).remove)
            yield


def set_attention(model: Any, name: str) -> None:
    """Choose how attention is computed: "sdpa", "xformers", "classic", or a diffusers backend.

    "sdpa" is torch's scaled_dot_product_attention; "classic" the explicit softmax, which has a
    second derivative and is faster for tiny training on a CPU. Any other name goes to diffusers'
    `set_attention_backend` (flash, sage, _native_math ...).

    Raises:
        UserError: the backend is not installed, unknown, or not for this model class.
    """
    if name == "sdpa":
        return
    try:
        if name == "xformers":
            model.enable_xformers_memory_efficient_attention()
        elif name == "classic":
            _set_classic(model)
        else:
            model.set_attention_backend(name)
    except (ImportError, ModuleNotFoundError, ValueError, RuntimeError, NotImplementedError) as e:
        hint = "; install it with: pip install diffkit[xformers]" if name == "xformers" else ""
        raise UserError(f"attention {name!r} cannot be used here: {e}{hint}") from e


def _set_classic(model: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    found = getattr(model, "attn_processors", {})
    if not found or not all(
        isinstance(p, AttnProcessor | AttnProcessor2_0) for p in found.values()
    ):
        raise ValueError("only U-Nets with plain attention processors have the classic form")
    model.set_attn_processor(AttnProcessor())
