"""The accelerator of a run, or a clear word on why this machine cannot be one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from diffkit.console import warn
from diffkit.errors import UserError
from diffkit.training.config import TrainConfig

__all__ = ["DTYPES", "make_accelerator", "release_accelerator"]

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype in which networks compute, by --mixed-precision."""


def _wants(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def make_accelerator(config: TrainConfig) -> Any:
    """An `accelerate.Accelerator` for this process, as `accelerate launch` set it up.

    Raises `UserError` when the launch configuration asks for what this machine or diffkit cannot
    do: FSDP without a GPU, FSDP 1, DeepSpeed, fp16 on a CPU.
    """
    from accelerate import Accelerator, DistributedType
    from accelerate.utils import DistributedDataParallelKwargs, GradScalerKwargs

    if _wants("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "accelerate is configured for DeepSpeed, whose checkpoints diffkit cannot resume; "
            "use plain data parallelism or FSDP 2 (accelerate config)."
        )
    fsdp = _wants("ACCELERATE_USE_FSDP")
    if fsdp and not torch.cuda.is_available():
        raise UserError(
            "accelerate is configured for FSDP, which needs CUDA GPUs; this machine shows none, so "
            "choose plain data parallelism with accelerate config."
        )
    if fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("accelerate is configured for FSDP 1; diffkit needs fsdp_version: 2.")
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
    """The launch configuration's FSDP settings, with gradients and losses kept in float32."""
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[config.mixed_precision],
        reduce_dtype=torch.float32,
        output_dtype=torch.float32,
    )
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


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
