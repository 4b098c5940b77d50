"""A plain attack step: what the code of Diff-Protect does for AdvDM, and nothing else.

Written from a description of it. The picture and the target are encoded to samples of their
posteriors, and the denoiser runs on both, whatever the loss reads. Only the autoencoder is frozen,
so that the backward pass builds gradients of the denoiser's weights too. The denoiser's blocks are
checkpointed. The prompt is encoded once here; their code does it twice a step.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

__all__ = ["PlainAttack"]

LEVEL = 2 / 255


class PlainAttack:
    """One sign step a call, on the parts of a stock Stable Diffusion pipeline.

    Arguments:
        pipeline: its U-Net is trained by no one, and yet not frozen.
        cond: text states (1, L, D).
        clean, target: (B, 3, H, W) in [-1, 1].
        levels: the budget.
    """

    def __init__(
        self, pipeline: Any, cond: Tensor, clean: Tensor, target: Tensor, levels: int = 8
    ) -> None:
        self.vae = pipeline.vae.requires_grad_(False)
        self.unet = pipeline.unet.requires_grad_(True)
        self.unet.enable_gradient_checkpointing()
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(clean.device)
        self.cond = cond.expand(len(clean), -1, -1)
        self.clean, self.target = clean, target
        self.reach = levels * LEVEL
        self.x = clean.clone()

    @property
    def networks(self) -> list[nn.Module]:
        """The modules that the step runs through."""
        return [self.vae, self.unet]

    def inputs(self, x: Tensor) -> list[Tensor]:
        """What its backward pass builds gradients of."""
        return [x, *(p for p in self.unet.parameters())]

    def components(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(z, denoising loss) of pictures."""
        posterior = self.vae.encode(images).latent_dist
        z = (posterior.mean + posterior.std * torch.randn_like(posterior.mean)).float()
        z = z * self.vae.config.scaling_factor
        noise = torch.randn_like(z)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(z),), device=z.device)
        if z.is_meta:
            noisy = z + noise  # the scheduler looks its coefficients up by value
        else:
            noisy = self.scheduler.add_noise(z, noise, t)
        output = self.unet(noisy.to(self.unet.dtype), t, self.cond, return_dict=False)[0]
        return z, nn.functional.mse_loss(output.float(), noise)

    def loss(self, x: Tensor) -> Tensor:
        """AdvDM's: the target's components are computed and not used."""
        _, semantic = self.components(x)
        self.unused = self.components(self.target)
        return semantic

    def step(self) -> None:
        """x + level * sign of the gradient, in the box."""
        x = self.x.detach().requires_grad_()
        self.loss(x).backward()
        assert x.grad is not None
        moved = x.detach() + LEVEL * x.grad.sign()
        low, high = self.clean - self.reach, self.clean + self.reach
        self.x = moved.clamp(low, high).clamp(-1, 1)
        del self.unused
