"""Views of one network: other weights for a while, of sharded networks too."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from diffkit.objectives.views import snapshot, weights_exchanged


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_view_of_a_sharded_network(alone):
    """FSDP keeps the root's weights gathered after a pass, for the backward pass that usually
    follows: the pass after a change of weights then failed, or went on with those before it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(network[0], mesh=alone)
    fully_shard(network, mesh=alone)
    x, start = torch.randn(2, 4), snapshot(network)
    first = network(x)
    first.sum().backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 1
    moved = network(x).detach()
    with torch.no_grad(), weights_exchanged(network, start):
        view = network(x)
    assert torch.equal(view, first) and torch.equal(network(x), moved)
    assert not torch.allclose(view, moved)


def test_a_view_under_autocast():
    """Autocast keeps low-precision copies of weights that want a gradient, for as long as its
    region lasts: within one, every view after the first computed with the first one's weights, so
    that two annotators of Adaptive-DPO were one."""
    torch.manual_seed(0)
    network = nn.Linear(4, 4)
    x, start = torch.randn(2, 4), snapshot(network)
    shifted = [{name: weight + shift for name, weight in start.items()} for shift in (1.0, 2.0)]
    views = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own = network(x)
        for weights in shifted:
            with weights_exchanged(network, weights):
                views.append(network(x))
        again = network(x)
    assert torch.equal(own, again)
    for view, weights in zip(views, shifted, strict=True):
        exact = x @ weights["weight"].T + weights["bias"]
        torch.testing.assert_close(view.float(), exact, rtol=0.02, atol=0.02)
