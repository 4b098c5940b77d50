"""A plain training loop: the steps of diffusers' text-to-image script, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from diffkit import assets
from diffkit.files import read_jsonl

__all__ = ["PlainLoop"]

Draws = tuple[Tensor, Tensor, Tensor]


class Pictures(Dataset[dict[str, Any]]):
    """Pictures of a folder with metadata.jsonl, resized, cropped and scaled to [-1, 1]."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.rows = read_jsonl(folder / "metadata.jsonl")
        self.transform = v2.Compose(
            [
                v2.Resize(size),
                v2.CenterCrop(size),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5], [0.5]),
            ]
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        image = Image.open(self.folder / row["file_name"]).convert("RGB")
        return {"pixels": self.transform(image), "text": row["text"]}


class PlainLoop:
    """One optimizer step a call: encode, add noise, predict, mean squared error, clip, AdamW.

    Arguments:
        model: a Stable Diffusion folder, or "embedded".
        data: a folder of pictures with metadata.jsonl.
        order: the indices of each step's samples.
        precision: "no", or "bf16" with frozen networks in bf16 and autocast.
        workers: processes that read pictures.
    """

    def __init__(
        self, model: str, data: str, order: Sequence[list[int]], precision: str, workers: int
    ) -> None:
        folder = assets.path("model") if model == "embedded" else Path(model)
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        self.accelerator = Accelerator(mixed_precision=precision)
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        device = self.accelerator.device
        self.vae = pipeline.vae.to(device, self.dtype).requires_grad_(False)
        self.text_encoder = pipeline.text_encoder.to(device, self.dtype).requires_grad_(False)
        self.tokenizer = pipeline.tokenizer
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        unet = pipeline.unet.train()
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, weight_decay=1e-2)
        rates = get_scheduler("constant", optimizer)
        size = unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        loader = DataLoader(
            Pictures(Path(data), size),
            batch_sampler=order,
            collate_fn=self.collate,
            num_workers=workers,
        )
        self.unet, self.optimizer, loader, self.rates = self.accelerator.prepare(
            unet, optimizer, loader, rates
        )
        self.batches = iter(loader)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Stack pictures and tokenize captions."""
        ids = self.tokenizer(
            [row["text"] for row in rows],
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return {"pixels": torch.stack([row["pixels"] for row in rows]), "ids": ids}

    def batch(self) -> dict[str, Tensor]:
        """The next batch on the device."""
        return next(self.batches)

    @torch.no_grad()
    def encode(
        self, batch: dict[str, Tensor], posterior: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Latents and text states; `posterior` replaces the drawn noise of the latents."""
        moments = self.vae.encode(batch["pixels"].to(self.dtype)).latent_dist
        if posterior is None:
            latents = moments.sample()
        else:
            latents = moments.mean + moments.std * posterior.to(moments.mean)
        states = self.text_encoder(batch["ids"], return_dict=False)[0]
        return latents * self.vae.config.scaling_factor, states

    def train(
        self,
        latents: Tensor,
        states: Tensor,
        noise: Tensor | None = None,
        t: Tensor | None = None,
    ) -> float:
        """The optimizer step; `noise` and `t` replace the drawn ones. Returns the loss."""
        if noise is None or t is None:
            noise = torch.randn_like(latents)
            steps = self.scheduler.config.num_train_timesteps
            t = torch.randint(0, steps, (len(latents),), device=latents.device)
        noise, t = noise.to(latents), t.long().to(latents.device)
        noisy = self.scheduler.add_noise(latents, noise, t)
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, t)
        else:
            target = noise
        output = self.unet(noisy, t, states, return_dict=False)[0]
        loss = F.mse_loss(output.float(), target.float())
        mean = self.accelerator.gather(loss.repeat(len(latents))).mean().item()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        return mean

    def step(self, draws: Draws | None = None) -> float:
        """One whole step, on the given (posterior noise, noise, t) or on its own draws."""
        batch = self.batch()
        if draws is None:
            return self.train(*self.encode(batch))
        posterior, noise, t = draws
        return self.train(*self.encode(batch, posterior), noise, t)
