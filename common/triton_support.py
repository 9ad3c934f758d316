"""Triton where it is installed. Every kernel file of ours takes `triton`, `tl` and `triton_kernel` from here.

The torch forms must run on machines without Triton (it has wheels for Linux only), and the bundle inlines both forms
into one file, so that importing a kernel file may not need it. Without Triton a kernel stays a plain function that
nobody can launch; the launching side says so through `require_triton`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ModuleNotFoundError as _triton_missing:
        if (_triton_missing.name or "").split(".")[0] != "triton":
            raise
        triton = tl = None

# Streaming multiprocessors of an H100 or H200 (SXM): what ahead-of-time compilation and the interpreter plan for.
HOPPER_MULTIPROCESSORS = 132


def triton_kernel(function: Callable) -> Any:
    """`triton.jit`, or the function as it is where Triton is missing.

    Triton reads the variable TRITON_INTERPRET here, when the kernel is decorated: one process either interprets all
    kernels or compiles all of them.
    """
    return function if triton is None else triton.jit(function)


def require_triton(what: str) -> None:
    """Raises RuntimeError where Triton is not installed, naming what needs it."""
    if triton is None:
        raise RuntimeError(f"{what} needs Triton, which is not installed here; install triton or use the torch form")


def triton_obstacle(device: torch.device) -> str:
    """Why kernels cannot run on a device, in words; empty if they can. In Triton's interpreter they run on a CPU."""
    if triton is None:
        return "triton is not installed"
    if device.type != "cuda":
        from triton import knobs

        return "" if knobs.runtime.interpret else f"device is {device.type}, not cuda"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"the GPU has compute capability {major}.{minor}; at least 8.0 is needed"


def kernel_is_interpreted(kernel: Any) -> bool:
    """Whether a decorated kernel runs in Triton's interpreter on a CPU.

    The interpreter's bfloat16 arithmetic is wrong without a message (loads, stores and casts to float32 are right), so
    kernels that compute in bfloat16 take this as a `tl.constexpr` switch and widen to float32 after loading. Its cast
    from float32 to bfloat16 cuts off instead of rounding: pass the value through `nearest_bf16` under the same switch.
    """
    return triton is not None and not isinstance(kernel, triton.JITFunction)


@triton_kernel
def nearest_bf16(x):
    """Inside a kernel: float32 rounded to bfloat16, ties to even, kept as float32. On bit patterns; not for NaN."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton_kernel
def sigmoid_fast(x):
    """Inside a kernel: 1 / (1 + exp(-x)) of float32; 0 and 1 at the infinities.

    Five instructions: exp2 and rsqrt flush numbers below 2^-126 to zero and are one instruction each. With an
    exponential to base e and a division, which keep such numbers, it is twelve. The relative error grows with |x|, as
    that of exp2(x log2 e) does: below 1e-6 for |x| < 10, 4e-6 at -80.
    """
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


def multiprocessors_of(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; for any other device those of the GPU that kernels are tuned for."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return HOPPER_MULTIPROCESSORS
