"""A folder of pairs as `diffkit trajectories` leaves it, with numbers that say which pair it is."""

from __future__ import annotations

from pathlib import Path

import torch

from diffkit.data.trajectory_store import (
    Header,
    Prompt,
    Shard,
    Stamp,
    prompts_digest,
    shard_path,
    write_header,
    write_prompt_rows,
    write_shard,
)

PROMPTS = (Prompt("a red cat"), Prompt("a blue dog"), Prompt("a bird"))


def header(**values):
    common = {
        "model": "tiny",
        "weights": "w",
        "scheduler": {"class": "DDIMScheduler"},
        "times": (999.0, 499.0, -1.0),
        "steps": 2,
        "guidance": 2.0,
        "seed": 7,
        "dtype": "fp32",
        "size": (32, 32),
        "shape": (4, 16, 16),
        "space": {"codec": "Codec", "scaling_factor": 0.5},
        "shard": 4,
        "prompts": prompts_digest(PROMPTS),
        "count": 10,
    }
    return Header(**(common | values))


def build(folder: Path, prompts=PROMPTS, bad=(), **values) -> Path:
    """Pairs whose latents are all equal to their index; those in `bad` were not finite."""
    folder.mkdir(exist_ok=True)
    head = header(prompts=prompts_digest(prompts), **values)
    write_header(folder, head)
    write_prompt_rows(folder, prompts)
    for number in range(head.shards):
        rows = head.rows(number)
        indices = torch.tensor([i for i in rows if i not in bad], dtype=torch.int64)
        latents = indices.half().view(-1, 1, 1, 1).expand(-1, *head.shape)
        stamp = Stamp(head.digest(), rows.stop, len(indices), 2, "cpu", "")
        write_shard(shard_path(folder, number), Shard(latents, indices), stamp)
    return folder
