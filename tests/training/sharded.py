"""A player sharded by FSDP2 over CPU processes; run by test_processes.py with torch's variables.

accelerate shards on GPUs only, so torch's own `fully_shard` stands in for it here. Both processes
take part in gathering the state; only the one that writes it keeps any of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.training.toy import Regressor, config_for


class Shards:
    """The two calls of accelerate that a player makes."""

    def prepare(self, module, optimizer):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(module, mesh=mesh)
        optimizer.param_groups[0]["params"] = [p for p in module.parameters() if p.requires_grad]
        return module, optimizer

    def unwrap_model(self, module):
        return module


def steps(player, count):
    x = torch.arange(24.0).reshape(4, 6) / 24
    player.plain.eval()  # no dropout
    for n in range(count):
        player.module("fit", (x, x), None)["loss"].mean().backward()
        player.optimizer.step()
        player.optimizer.zero_grad()
        player.ema.update(n)


def main(folder: Path, mode: str) -> None:
    from diffkit.training.players import Player

    if mode != "plain":
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    player = Player("net", Regressor(8), config_for(folder), average=True)
    if mode == "plain":
        player.wrap(Plain())
    else:
        player.wrap(Shards())
    if mode == "resume":
        player.load_weights(load_file(folder / "weights.safetensors"))
        player.load_optimizer_state(load_file(folder / "optimizer.safetensors"), {})
        player.load_average(load_file(folder / "average.safetensors"))
    steps(player, 3)
    writes = mode == "plain" or dist.get_rank() == 0
    tensors, numbers = player.optimizer_state(writes)
    assert not numbers
    weights, average = player.weights(writes), player.average(writes)
    files = {"weights": weights, "optimizer": tensors, "average": average}
    assert all(bool(content) == writes for content in files.values())
    with player.result(writes):
        if writes:
            files["result"] = {k: v.detach().clone() for k, v in player.plain.state_dict().items()}
    back = player.weights()
    assert all(torch.equal(back[k], v) for k, v in files["weights"].items())
    if writes:
        target = folder / "sharded" if mode == "sharded" else folder
        target.mkdir(exist_ok=True)
        prefix = "resumed-" if mode == "resume" else ""
        for name, content in files.items():
            save_file(content, target / f"{prefix}{name}.safetensors")


class Plain(Shards):
    def prepare(self, module, optimizer):
        return module, optimizer


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
