"""Run the Triton kernels where there is no GPU; `test_triton.py` starts this by itself.

    TRITON_INTERPRET=1 python tests/kernels/triton_cases.py run
    python tests/kernels/triton_cases.py compile

`run` compares them with the formulas in float64 through Triton's interpreter, which must be chosen
before Triton is imported. `compile` compiles them for CUDA devices, which takes no device; the
interpreter accepts programs that the compiler does not. Both print JSON on their last line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffkit.kernels.choice import forced
from diffkit.perceptual.feature_distance import feature_distance, reference_distance
from diffkit.perceptual.unit_distance import unit_distance

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SETTINGS: dict[str, dict[str, Any]] = {
    "prediction": {},
    "detached": {"stats": "prediction_detached"},
    "target": {"stats": "target"},
    "own": {"stats": "own"},
    "channel norm": {"norm": "channel_norm_target"},
}


def maps(shape: tuple[int, ...], dtype: torch.dtype, last: bool = False) -> list[Tensor]:
    """A prediction, a target and a mask, the mask of one row empty, of others partly."""
    draws = torch.Generator().manual_seed(0)
    target = torch.randn(shape, generator=draws) + 3
    predicted = target + 0.5 * torch.randn(shape, generator=draws)
    keep = torch.rand(shape, generator=draws) > 0.3
    keep[0, 1] = False
    order = torch.channels_last if last else torch.contiguous_format
    found = [x.to(dtype).contiguous(memory_format=order) for x in (predicted, target)]
    return [*found, keep]


def gradient_of(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient, samples weighed differently, in float64."""
    leaf = x.clone().requires_grad_()
    value = call(leaf)
    (value * torch.arange(1, len(value) + 1)).sum().backward()
    assert leaf.grad is not None
    return value.detach().double(), leaf.grad.double()


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """Relative errors of value and gradient."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def compared(predicted: Tensor, target: Tensor, keep: Tensor | None, **setting: Any) -> list[float]:
    """The kernel's errors."""
    exact = gradient_of(
        lambda x: reference_distance(x, target.double(), keep, **setting), predicted.double()
    )
    with forced("triton"):
        found = gradient_of(lambda x: feature_distance(x, target, keep, **setting), predicted)
    return errors(found, exact)


def unit(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """`unit_distance` as its formula."""
    a, b = (maps / maps.norm(dim=1, keepdim=True) for maps in (x, y))
    return (weights[:, None, None] * (a - b).square()).sum(1).mean((1, 2))


def run() -> dict[str, list[float]]:
    """Errors of every case by name."""
    rows = {}
    for name, setting in SETTINGS.items():
        p, t, keep = maps((2, 3, 7, 5), torch.float32)
        rows[f"{name}, float32"] = compared(p, t, None, **setting)
        for label in DTYPES if name in ("prediction", "own", "channel norm") else ["float32"]:
            p, t, keep = maps((2, 9, 5, 3), DTYPES[label], last=label == "bfloat16")
            rows[f"{name}, masked, {label}"] = compared(p, t, keep, **setting)
    p, t, keep = maps((1, 2, 150, 170), torch.float32)  # two parts a row
    rows["prediction, two parts, float32"] = compared(p, t, keep)
    rows["own, two parts, float32"] = compared(p, t, keep, stats="own")
    p, t, keep = (x[:, :, :, ::2] for x in (p, t, keep))  # rows and columns are not one axis
    rows["prediction, every other column, float32"] = compared(p, t, keep)
    return rows | unit_rows() | zeros()


def unit_rows() -> dict[str, list[float]]:
    """The same of LPIPS's form, for both of its maps."""
    rows = {}
    weights = torch.rand(11, generator=torch.Generator().manual_seed(1))
    for label, dtype in DTYPES.items():
        x, y, _ = maps((2, 11, 6, 7), dtype)
        for name, one, other in (("first", x, y), ("second", y, x)):
            rows[f"unit, {name}, {label}"] = unit_errors(one, other, weights, name == "second")
    return rows


def unit_errors(x: Tensor, y: Tensor, weights: Tensor, swapped: bool) -> list[float]:
    """Of the gradient of x, the first or, swapped, the second map of the distance."""
    exact = gradient_of(lambda z: unit(z, y.double(), weights.double()), x.double())
    with forced("triton"):
        found = gradient_of(lambda z: unit_distance(*((y, z) if swapped else (z, y)), weights), x)
    return errors(found, exact)


def zeros() -> dict[str, list[float]]:
    """Largest value and gradient where both must be exactly 0."""
    x, t, keep = maps((2, 3, 7, 5), torch.float32)
    empty, rows = torch.zeros_like(keep), {}
    with forced("triton"):
        for name, setting in SETTINGS.items():
            for label, p, m in (("equal", t, keep), ("empty", x, empty)):
                call = lambda z, m=m, setting=setting: feature_distance(z, t, m, **setting)  # noqa: E731
                rows[f"{name}, {label}, zero"] = [
                    float(y.abs().max()) for y in gradient_of(call, p)
                ]
        dead = t.clone()
        dead[:, :, 2, 3] = 0
        call = lambda z: unit_distance(z, dead, torch.ones(3))  # noqa: E731
        rows["unit, equal, zero"] = [float(y.abs().max()) for y in gradient_of(call, dead)]
        slope = gradient_of(lambda z: unit_distance(z, x, torch.ones(3)), dead)[1]
        rows["unit, no feature, zero"] = [float(slope[:, :, 2, 3].abs().max())]
    return rows


def compiled(kernel: Any, dtype: str, flags: dict[str, Any], capability: int) -> str:
    """The PTX of a kernel for contiguous maps of sizes that 16 divides."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fixed = {"TILE_C": 1, "TILE_X": 2048, "p_x": 1, "t_x": 1, "m_x": 1, "r_x": 1} | flags
    fixed |= {} if flags["MASKED"] else {"m_map": None}
    types = {"p_map": dtype, "t_map": dtype, "m_map": "*u8", "result": dtype, "eps": "fp32"}
    types |= dict.fromkeys(("sums", "numbers", "norm_p", "norm_t", "scale"), "*fp32")
    names = kernel.arg_names
    fixed = {name: value for name, value in fixed.items() if name in names}
    signature = {name: types.get(name, "i32") for name in names} | dict.fromkeys(fixed, "constexpr")
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (place,): aligned
        for place, name in enumerate(names)
        if name not in fixed and name not in ("channels", "eps")
    }
    source = ASTSource(kernel, signature, fixed, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 8}).asm["ptx"]


def compile_all() -> dict[str, bool]:
    """Whether each compiled kernel reads 16 bytes at a time."""
    from diffkit.kernels import channel_triton, masked_triton

    columns = {"TILE_C": 8, "TILE_X": 256}
    cases = [
        (masked_triton._moments, {"MASKED": True, "OF_P": True, "OF_T": False, "OF_D": False}),
        (masked_triton._moments, {"MASKED": False, "OF_P": True, "OF_T": True, "OF_D": True}),
        (masked_triton._combine, {"MASKED": True}),
        (channel_triton._normed, {"MASKED": True, "OWN": False, "norm_p": None} | columns),
        (channel_triton._normed, {"MASKED": False, "OWN": True} | columns),
        (channel_triton._slope, {"MASKED": True, "OWN": False, "norm_p": None} | columns),
        (channel_triton._slope, {"MASKED": False, "OWN": True} | columns),
    ]
    rows = {}
    for kernel, flags in cases:
        for dtype, capability in (("*bf16", 90), ("*fp16", 75), ("*fp32", 90)):
            ptx = compiled(kernel, dtype, flags, capability)
            rows[f"{kernel.__name__} {flags} {dtype}"] = "ld.global.v4.b32" in ptx
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"run": run, "compile": compile_all}[sys.argv[1]]()))
