"""Student and proxy of reward-guided distillation, sharded by FSDP2 over CPU processes.

Run by test_processes.py with torch's variables. The student's step asks the sharded proxy, and the
proxy's step is made of what the student left; the terms are those of whole networks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from diffkit.models.latent_diffusion import LatentDiffusion
from diffkit.objectives.consistency import prepare_student
from diffkit.objectives.consistency_config import ConsistencyConfig
from diffkit.objectives.reward_guided import RewardGuidedObjective
from diffkit.objectives.reward_guided_config import RewardConfig
from diffkit.rewards.spec import load_reward
from tests.objectives.test_denoising import make_batch
from tests.training.blocks import shard
from tests.training.toy import config_for


def route(players, trained):
    """As the trainer does before a phase."""
    for name, player in players.items():
        player.requires_grad_(name == trained)


def terms_of(objective):
    """Both players' terms, after both backward passes."""
    players = objective.players()
    draws = objective.draw(make_batch(2), 0)
    with torch.no_grad():
        shared = objective.shared(draws)
    route(players, "student")
    student = players["student"]("lcd", draws, shared)
    student["loss"].mean().backward()
    route(players, "proxy")
    proxy = players["proxy"]("refit", draws, shared)
    proxy["loss"].mean().backward()
    return [student, proxy]


def main(model: Path) -> None:
    os.environ["FSDP_VERSION"] = "2"
    dist.init_process_group("gloo")
    config = ConsistencyConfig(solver_steps=10, guidance_min=1.0, guidance_max=3.0, target="online")
    student = prepare_student(LatentDiffusion.load(model), config, False)
    reward = RewardConfig(mode="proxy", beta=1.0)
    rewards = [(load_reward("embedded"), 1.0)]
    objective = RewardGuidedObjective(student, config, reward, rewards)
    objective.place(torch.device("cpu"))
    plain = terms_of(objective)
    for player in objective.players().values():
        player.requires_grad_(True)
        shard(player, config_for(model))
    for whole, sharded in zip(plain, terms_of(objective), strict=True):
        for name, value in whole.items():
            torch.testing.assert_close(sharded[name], value, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
