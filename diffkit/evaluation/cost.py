"""What making a picture with a model costs: its stages, memory and time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffkit.models.cost import Cost, Rates, count, parameter_count
from diffkit.models.latent_diffusion import LatentDiffusion

__all__ = ["ModelCost", "model_cost"]


@dataclass(frozen=True)
class ModelCost:
    """The cost of one picture's stages and of the weights.

    Attributes:
        parameters: by network name, in the pipeline's order.
        text: the text encoders on one prompt.
        denoiser: one call for one picture; guidance makes two of each step.
        decode: the VAE's decoder on one picture.
        width, height: pixels.
    """

    parameters: dict[str, int]
    text: Cost
    denoiser: Cost
    decode: Cost
    width: int
    height: int

    def macs(self, steps: int, guided: bool = True) -> int:
        """Multiply-accumulates of one picture."""
        stages = self._stages(steps, guided)
        return sum(calls * stage.macs for calls, stage in stages)

    def _stages(self, steps: int, guided: bool) -> list[tuple[int, Cost]]:
        passes = 2 if guided else 1
        return [(passes, self.text), (passes * steps, self.denoiser), (1, self.decode)]

    def memory(self, batch_size: int, guided: bool = True, bytes_each: int = 4) -> int:
        """Estimated peak bytes: all weights, and the largest stage's live activations.

        Workspaces of the kernels and the memory of the framework itself are not in it.
        """
        passes = 2 if guided else 1
        stages = (self.text.peak_elements, passes * self.denoiser.peak_elements)
        activations = batch_size * max(*stages, self.decode.peak_elements)
        return bytes_each * (sum(self.parameters.values()) + activations)

    def seconds(self, steps: int, rates: Rates, guided: bool = True) -> float:
        """Estimated seconds a picture at measured `rates`, memory traffic left out."""
        stages = self._stages(steps, guided)
        matmul = sum(calls * stage.matmul_macs for calls, stage in stages)
        conv = sum(calls * stage.conv_macs for calls, stage in stages)
        return matmul / rates.matmul + conv / rates.conv


def model_cost(model: LatentDiffusion, width: int, height: int) -> ModelCost:
    """Count a model (usually a `skeleton`) at one picture size in pixels."""
    channels, h, w = model.codec.channels, height // model.codec.factor, width // model.codec.factor
    device = model.device
    conditioner, denoiser, codec = model.conditioner, model.denoiser, model.codec
    prompt = [conditioner.example]
    cond = conditioner.encode(prompt, (height, width))
    z_0 = torch.empty(1, channels, h, w, device=device, dtype=model.dtype)
    # more channels than z_0 has where a mask goes in
    z_t = z_0.new_empty(1, denoiser.geometry.channels, h, w)
    t = torch.ones(1, device=device)
    guidance = t if model.family.takes_guidance else None
    return ModelCost(
        parameters={name: parameter_count(part) for name, part in model.networks.items()},
        text=count(lambda: conditioner.encode(prompt, (height, width))),
        denoiser=count(lambda: denoiser(z_t, t, cond, guidance)),
        decode=count(lambda: codec.decode(z_0)),
        width=width,
        height=height,
    )
