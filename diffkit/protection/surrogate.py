"""The model that an attack goes through: its parts, one condition, and its time axis."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffkit.errors import UserError
from diffkit.models.codec import Codec
from diffkit.models.conditioner import Conditioner, Conditioning, Sizes
from diffkit.models.denoiser import Denoiser
from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.models.schedule import Prediction, Schedule

__all__ = ["Surrogate", "aside", "frozen"]


@dataclass(frozen=True)
class Surrogate:
    """What a loss sees of a model. Encoder methods need the codec alone.

    Attributes:
        codec: images <-> latents.
        denoiser: the network with its schedule, or None.
        conditioner: for sizes that change from view to view (SDXL), or None.
        cond: the prompt, a batch of one, encoded once; or None.
        null: the empty prompt, a batch of one, for classifier-free guidance; or None.
        told: guidance scale told to a network with a guidance embedding, or None.
        prompted: the prompt is not the empty one.
    """

    codec: Codec
    denoiser: Denoiser | None = None
    conditioner: Conditioner | None = None
    cond: Conditioning | None = None
    null: Conditioning | None = None
    told: float | None = None
    prompted: bool = True

    @classmethod
    def of(cls, model: LatentDiffusion, prompt: str) -> Surrogate:
        """All of a model, told one prompt (of a model of classes: the name or number of one)."""
        conditioner, family = model.conditioner, model.family
        sizes = (model.default_size, model.default_size)
        cond = conditioner.encode([prompt], sizes)
        null = conditioner.null(1, sizes) if "cfg" in family.capabilities else None
        told = family.guidance_scale if family.takes_guidance else None
        if told is not None and family.train_guidance is not None:
            told = family.train_guidance
        device = model.denoiser.device
        return cls(
            model.codec,
            model.denoiser,
            conditioner,
            cond.to(device),
            None if null is None else null.to(device),
            told,
            prompt != "",
        )

    @property
    def network(self) -> Denoiser:
        """The denoiser; `UserError` for a surrogate that has none."""
        if self.denoiser is None:
            raise UserError("this method needs a denoiser, and an autoencoder alone was given.")
        return self.denoiser

    @property
    def inpaints(self) -> bool:
        """True for a denoiser that takes a mask and the picture around it: 2C + 1 channels."""
        taken = 0 if self.denoiser is None else self.denoiser.geometry.channels
        return taken == 2 * self.codec.channels + 1

    @property
    def schedule(self) -> Schedule:
        """The noise schedule of the denoiser."""
        return self.network.schedule

    def times(self, u: Tensor) -> Tensor:
        """Times (B,) at the fractions u (B,) in [0, 1) of the model's axis, 1 being noise.

        DDPM: floor(u T). Flow: u before the scheduler's shift. EDM: the quantile of its training
        density.
        """
        # a flow's training times run from noise to data
        return self.schedule.train_timesteps(1 - u if self.schedule.kind == "flow" else u)

    def conditioning(self, sizes: Sequence[Sizes], empty: bool = False) -> Conditioning:
        """The condition of B views: the prompt or the empty one, with the sizes of each view."""
        assert self.conditioner is not None
        cond = self.null if empty else self.cond
        assert cond is not None
        cond = replace(cond, time_ids=None).expand(len(sizes))
        return self.conditioner.with_sizes(cond, sizes)

    def output(self, z_t: Tensor, t: Tensor, sizes: Sequence[Sizes], empty: bool = False) -> Tensor:
        """The network's own output (B, C, h, w) at z_t, float32 at least, without guidance.

        `empty`: told the empty prompt.
        """
        told = None if self.told is None else torch.full((len(z_t),), self.told).to(z_t)
        output = self.network(z_t, t, self.conditioning(sizes, empty), told)
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def predict(self, z_t: Tensor, t: Tensor, sizes: Sequence[Sizes]) -> Prediction:
        """`output` as a `Prediction`."""
        return self.schedule.prediction(self.output(z_t, t, sizes), z_t, t)

    def networks(self) -> list[nn.Module]:
        """The modules that an attack runs through."""
        found = [self.codec.vae, None if self.denoiser is None else self.denoiser.model]
        return [module for module in found if isinstance(module, nn.Module)]


@contextlib.contextmanager
def aside(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, these networks wait in the memory of the CPU; then they are where they were.

    Networks that are spread over devices, or that others move about (offloading, quantisation),
    stay where they are.
    """
    places = [_place(network) for network in networks]
    moved = [(net, place) for net, place in zip(networks, places, strict=True) if place is not None]
    try:
        for network, _ in moved:
            nn.Module.to(network, "cpu")
        if moved and torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield
    finally:
        for network, place in moved:
            nn.Module.to(network, place)


def _place(network: nn.Module) -> torch.device | None:
    """The device that a network can be moved from and back to; None where there is none."""
    bound = ("_hf_hook", "hf_device_map", "hf_quantizer")
    devices = {tensor.device for tensor in (*network.parameters(), *network.buffers())}
    if any(hasattr(network, name) for name in bound) or len(devices) != 1:
        return None
    (device,) = devices
    return None if device.type in ("cpu", "meta") else device


@contextlib.contextmanager
def frozen(networks: Sequence[nn.Module], checkpointed: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Inside: no parameter requires a gradient and nothing is in training mode; then as before.

    Arguments:
        networks: all of them.
        checkpointed: those (of `networks`) that recompute activations in their backward pass.
    """
    modules = [module for network in networks for module in network.modules()]
    training = [module.training for module in modules]
    parameters = [p for network in networks for p in network.parameters()]
    required = [p.requires_grad for p in parameters]
    switched = [n for n in checkpointed if not getattr(n, "is_gradient_checkpointing", False)]
    try:
        for network in networks:
            network.eval().requires_grad_(False)
        for network in switched:
            network.enable_gradient_checkpointing()  # type: ignore[operator]
        yield
    finally:
        for network in switched:
            network.disable_gradient_checkpointing()  # type: ignore[operator]
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
        for parameter, state in zip(parameters, required, strict=True):
            parameter.requires_grad_(state)
