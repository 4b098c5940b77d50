"""A tiny model sharded block by block; run by test_processes.py with torch's variables.

accelerate shards on GPUs only, so its policy says what is sharded, and torch's `fully_shard` does
it over CPU processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.denoising import DenoisingConfig, DenoisingObjective
from diffkit.training.devices import _fsdp_plugin, shard_by_block
from tests.objectives.test_denoising import make_batch
from tests.training.toy import Regressor, config_for


def shard(module, config):
    plugin = _fsdp_plugin(config)
    shard_by_block(
        SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin)), module
    )
    wanted = fsdp2_prepare_auto_wrap_policy(plugin, module)
    options = {"mesh": init_device_mesh("cpu", (2,)), "mp_policy": plugin.mixed_precision_policy}
    for part in reversed(list(module.modules())[1:]):
        if wanted(part):
            fully_shard(part, **options)
    fully_shard(module, **options)


def check_blocks(model):
    """The sharded network's loss is the whole one's; returns the classes that were sharded."""
    objective = DenoisingObjective(LatentDiffusion.load(model), DenoisingConfig())
    objective.place(torch.device("cpu"))
    player = objective.players()["denoiser"].requires_grad_(True)
    draws = objective.draw(make_batch(2), 0)
    with torch.no_grad():
        shared = objective.shared(draws)
    plain = player("denoising", draws, shared)
    shard(player, config_for(model))
    sharded = player("denoising", draws, shared)
    sharded["loss"].mean().backward()
    for name, value in plain.items():
        torch.testing.assert_close(sharded[name], value)
    return sorted(
        {type(part).__name__ for part in player.modules() if isinstance(part, FSDPModule)}
    )


def check_bf16(model):
    """Weights are gathered in bf16, but what a loss takes is not rounded to it.

    A toy, since norms in bf16 with float32 inputs need the autocast of GPUs.
    """
    player = Regressor(8).eval()
    shard(player, config_for(model, mixed_precision="bf16"))
    x = torch.linspace(0, 1, 24).reshape(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        terms = player("fit", (x, x), None)
    terms["loss"].mean().backward()
    assert terms["loss"].dtype == torch.float32
    assert torch.equal(terms["time"], x.mean(1))


def main(model: Path) -> None:
    os.environ["FSDP_VERSION"] = "2"
    dist.init_process_group("gloo")
    blocks = check_blocks(model)
    check_bf16(model)
    if dist.get_rank() == 0:
        print(*blocks, file=sys.stderr)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
