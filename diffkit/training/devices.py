"""The accelerator of a run, or a clear word on why this machine cannot be one."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffkit.console import warn
from diffkit.errors import UserError
from diffkit.training.config import TrainConfig

__all__ = ["DTYPES", "block_names", "make_accelerator", "release_accelerator", "shard_by_block"]

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype in which networks compute, by --mixed-precision."""

PATIENCE = timedelta(hours=2)
"""How long processes wait for one another: for a cache to be filled, a checkpoint to be written."""


def _wants(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def sharded() -> bool:
    """Whether `accelerate launch` asks for FSDP."""
    return _wants("ACCELERATE_USE_FSDP")


def make_accelerator(config: TrainConfig) -> Any:
    """An `accelerate.Accelerator` for this process, as `accelerate launch` set it up.

    Raises `UserError` when the launch configuration asks for what this machine or diffkit cannot
    do: FSDP without a GPU, with validation pictures or what the method refuses, FSDP 1, DeepSpeed,
    fp16 on a CPU.
    """
    from accelerate import Accelerator, DistributedType
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradScalerKwargs,
        InitProcessGroupKwargs,
    )

    if _wants("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "accelerate is configured for DeepSpeed, whose checkpoints diffkit cannot resume; "
            "use plain data parallelism or FSDP 2 (accelerate config)."
        )
    fsdp = sharded()
    if fsdp and config.validation_prompts is not None:
        raise UserError(
            "validation_prompts: pictures cannot be made while FSDP shards the model; leave the "
            "prompts out and make the pictures from the result, or use plain data parallelism."
        )
    if fsdp and not torch.cuda.is_available():
        raise UserError(
            "accelerate is configured for FSDP, which needs CUDA GPUs; this machine shows none, so "
            "choose plain data parallelism with accelerate config."
        )
    if fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate is configured for FSDP 1; diffkit needs fsdp_version: 2.")
    if fsdp:
        config.check_sharded()
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", config.mixed_precision):
        raise UserError(
            f"mixed_precision: accelerate was launched with {launched}, the run is configured for "
            f"{config.mixed_precision}; add --mixed-precision {launched}."
        )
    if int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) > 1:
        raise UserError("accumulation: leave it to --accumulation, not to accelerate launch.")
    handlers = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        GradScalerKwargs(growth_interval=500),
        InitProcessGroupKwargs(timeout=PATIENCE),
    ]
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        kwargs_handlers=handlers,
        fsdp_plugin=_fsdp_plugin(config) if fsdp else None,
        step_scheduler_with_optimizer=False,
    )
    if fsdp and accelerator.distributed_type != DistributedType.FSDP:
        raise UserError(
            "FSDP was asked for, but this is not a launched process; accelerate launch."
        )
    if config.mixed_precision == "fp16" and accelerator.device.type != "cuda":
        release_accelerator(accelerator)
        raise UserError("mixed_precision: fp16 needs a CUDA GPU; on this machine use bf16 or no.")
    _warn_slow(config, accelerator)
    return accelerator


def _fsdp_plugin(config: TrainConfig) -> Any:
    """The launch configuration's FSDP settings, with gradients and losses kept in float32.

    Inputs are not cast: FSDP would round times, noise and latents too, even those of a loss that is
    computed in float32. Autocast, under which the trainer calls its players, casts what networks
    take.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.mixed_precision],
        reduce_dtype=torch.float32,
        output_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    wrap = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy, auto_wrap_policy=wrap)


def block_names(module: nn.Module) -> list[str]:
    """Classes of the blocks that networks in `module` call unsplittable, and that occur in it."""
    parts = list(module.modules())
    named = {name for part in parts for name in getattr(part, "_no_split_modules", None) or ()}
    return sorted(named & {type(part).__name__ for part in parts})


def shard_by_block(accelerator: Any, module: nn.Module) -> None:
    """Let FSDP gather the weights of `module` block by block instead of all at once.

    To be called before the module is prepared, since accelerate asks it and not the network inside
    for its blocks. Does nothing without FSDP, or where the launch configuration names the classes.
    """
    if accelerator.is_fsdp2 and "FSDP_TRANSFORMER_CLS_TO_WRAP" not in os.environ:
        plugin = accelerator.state.fsdp_plugin
        plugin.transformer_cls_names_to_wrap = block_names(module)


def _warn_slow(config: TrainConfig, accelerator: Any) -> None:
    if config.mixed_precision == "bf16" and accelerator.device.type == "cpu":
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "bf16"
        if "bf16" not in flags:
            warn("mixed_precision: this CPU has no bf16 instructions and emulates them slowly.")


def release_accelerator(accelerator: Any) -> None:
    """Forget the run's wrapped modules and settings, so that this process can start another."""
    from accelerate.state import AcceleratorState

    accelerator.free_memory()
    AcceleratorState._reset_state()
