"""The most memory that drawing one batch takes.

On CUDA the allocator counts. On a CPU a process of its own draws the batch, and its resident set
counts, torch and Python included; that is what `python -m diffkit.evaluation.memory` is for.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffkit.errors import RunFailed

if TYPE_CHECKING:
    from diffkit.evaluation.latency import Subject

__all__ = ["peak_memory"]


def peak_memory(subject: Subject) -> int | None:
    """Bytes; None on a device whose allocator does not count (MPS).

    Raises `RunFailed` with the last words of a process that could not draw the batch.
    """
    device = subject.model.device
    if device.type == "cuda":
        return _of_cuda(subject)
    if device.type != "cpu":
        return None
    first = subject.recipes[0]
    order = {
        "model": first.model,
        "loras": first.loras,
        "dtype": first.dtype,
        "recipes": [recipe.to_json() for recipe in subject.recipes],
    }
    words = [sys.executable, "-m", "diffkit.evaluation.memory"]
    done = subprocess.run(words, input=json.dumps(order), capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise RunFailed(f"peak memory: its process failed ({' '.join(last)}).")
    return int(done.stdout.strip().splitlines()[-1])


def _of_cuda(subject: Subject) -> int:
    import torch

    from diffkit.generation.engine import render

    device = subject.model.device
    parts = subject.model.networks.values()
    weights = sum(
        tensor.nbytes for part in parts for tensor in (*part.parameters(), *part.buffers())
    )
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    render(subject.model, subject.recipes)
    # What else lies on the device, such as the other model, is no part of this one.
    return int(torch.cuda.max_memory_allocated(device) - before + weights)


def _high_water_mark() -> int:
    # Linux hands getrusage's number down from the parent through fork and exec.
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Draw the batch that stdin describes, then print the high-water mark of the resident set."""
    from diffkit.generation.engine import DTYPES, render
    from diffkit.generation.plan import open_model
    from diffkit.generation.recipe import Recipe

    order = json.load(sys.stdin)
    loras = [(path, weight) for path, weight in order["loras"]]
    model = open_model(order["model"], loras, DTYPES[order["dtype"]], "cpu")
    render(model, [Recipe.from_json(line) for line in order["recipes"]])
    print(_high_water_mark())


if __name__ == "__main__":
    main()
