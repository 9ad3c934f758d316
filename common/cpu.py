"""What a process that trains on a CPU sets once, so that PyTorch's own operators run at the machine's speed."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MALLOPT_TRIM_THRESHOLD, _MALLOPT_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_MADV_HUGEPAGE, _HUGE_PAGE_BYTES = 14, 2**21  # of <sys/mman.h>, and on x86-64
_HUGE_HEAP_BYTES = 2**30 - 2**20  # of address space: memory is taken as it is used
# Float32 products of this size err by about 5e-7 of their largest value, those of bfloat16 operands by 2e-3.
_FLOAT32_PRODUCT_ERROR = 1e-5
_products_by_onednn = False  # what `tune_cpu_process` chose; torch.compile cannot ask PyTorch for its setting


def processor_name() -> str:
    """The processor as Linux or Python calls it and the instructions that PyTorch's products use, for records of runs.

    Runs are equal bit for bit on one such processor only: blocks of products follow caches, too. Two that both have
    AVX-512 ended 0.003 bpb apart (LOG.md, 2026-11-29).
    """
    return f"{_cpuinfo('model name') or platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def _cpuinfo(field: str) -> str:
    """What Linux says of the first processor; "" where it says nothing."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def tune_cpu_process() -> str:
    """Fast float32 products and memory that stays with the process; both for the rest of the process.

    Source: ours, measured (LOG.md, "The CPU step"). PyTorch multiplies float32 matrices with MKL, which takes its AVX2
    path on AMD: half of what an AVX-512 machine can do. With leave to round operands to bfloat16, PyTorch hands them to
    oneDNN instead, which makes no use of that leave where it has no such kernels (AVX-512 without AMX) and is twice
    as fast. Whether products stayed float32 is measured here, and the leave withdrawn if they did not. On Intel MKL is
    as fast, and faster where products are small: it stays (by the vendor's name, not by a stopwatch, so that two runs
    on one machine round alike; for the small products of other machines see `in_default_products`).

    The C library returns every large tensor to the system when it is freed and has it zeroed page by page when the next
    one is made: a sixth of a training step. It is told to keep them, and the first gigabyte of its heap asks for huge
    pages: another tenth where page tables are those of a virtual machine.

    Returns:
        what was chosen and why, a line for a log.

    Numerics: float32 products as before, summed in another order. No effect on float64. Nothing is set where CUDA is
    available, because the leave would hold for CUDA's products too.
    """
    return f"float32 products by {_choose_cpu_products()}; freed memory is {_keep_freed_memory()}"


def _choose_cpu_products() -> str:
    global _products_by_onednn
    if torch.cuda.is_available():
        return "PyTorch's default (CUDA is there too)"
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return f"PyTorch's default (this CPU runs its {torch.backends.cpu.get_cpu_capability()} code)"
    if _cpuinfo("vendor_id") == "GenuineIntel" and torch.backends.mkl.is_available():
        return "PyTorch's default (MKL on its vendor's AVX-512)"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    error = float32_product_error()
    if error > _FLOAT32_PRODUCT_ERROR:
        torch.set_float32_matmul_precision(before)
        return f"PyTorch's default (oneDNN would round them: error {error:.1e})"
    _products_by_onednn = True
    return f"oneDNN (AVX-512, error {error:.1e})"


def compile_obstacle(device: torch.device) -> str:
    """Why torch.compile cannot make code for a CPU, in words; empty if it can, and for other devices.

    Found out by compiling one line, some seconds: it takes a C++ compiler and Python's headers.
    """
    if device.type != "cpu":
        return ""
    try:
        torch.compile(_one_line, dynamic=False)(torch.ones(2))
    except RuntimeError as error:  # of the compiler's: torch.compile's own errors are kinds of it
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


def _one_line(x: Tensor) -> Tensor:
    return x.sin() + 1


@contextlib.contextmanager
def _default_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _InDefaultProducts(torch.autograd.Function):
    """The graph of the operation is built inside and kept, so that its backward can run under the same setting."""

    @staticmethod
    def forward(ctx: Any, operation: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
        with _default_products(), torch.enable_grad():
            ctx.output = operation(*ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [t for t in ctx.inputs if t.requires_grad]
        with _default_products():
            found = iter(torch.autograd.grad(ctx.output, wanted, dy))
        return None, *(next(found) if t.requires_grad else None for t in ctx.inputs)


def in_default_products(operation: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """operation(*inputs), forward and backward with PyTorch's own products whatever `tune_cpu_process` chose.

    Source: ours, measured (LOG.md, 2026-11-29). PyTorch's attention on a CPU is made of small products, and setting
    each of them up costs oneDNN more than computing it: 52 ms against 10 for 64 heads of 128 x 32 forward and backward.

    Args:
        operation: from tensors to one tensor; other tensors that it uses get no gradient.
        inputs: any shapes and dtypes. Once differentiable.

    Under torch.compile the operation stays in the compiler's graph where PyTorch's products were left as they are.
    """
    if torch.compiler.is_compiling() and not _products_by_onednn:
        return operation(*inputs)
    if inputs[0].device.type != "cpu" or torch.get_float32_matmul_precision() == "highest":
        return operation(*inputs)
    return _InDefaultProducts.apply(operation, *inputs)  # type: ignore[return-value]


def float32_product_error() -> float:
    """Largest error of a product of float32 matrices as this process computes it, over its largest value."""
    left, right = (torch.linspace(0.0, 1e4, 256 * 256).sin_().view(256, 256).roll(shift, 1) for shift in (0, 7))
    exact = left.double() @ right.double()
    return float(((left @ right).double() - exact).abs().max() / exact.abs().max())


def _keep_freed_memory() -> str:
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if libc is None or not hasattr(libc, "mallopt"):
        return "the C library's matter (not glibc)"
    # Older versions of glibc take 32 MiB at most.
    kept = libc.mallopt(_MALLOPT_TRIM_THRESHOLD, 2**31 - 1) and (
        libc.mallopt(_MALLOPT_MMAP_THRESHOLD, 2**30) or libc.mallopt(_MALLOPT_MMAP_THRESHOLD, 2**25)
    )
    if not kept:
        return "the C library's matter (mallopt refused)"
    return f"kept by the process{', in huge pages' if _ask_for_huge_pages(libc) else ''}"


def _ask_for_huge_pages(libc: ctypes.CDLL) -> bool:
    """Grow the heap once, ask for huge pages there, and leave it to later allocations; False where that is refused."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(_HUGE_HEAP_BYTES)
    if not start:
        return False
    first, last = -(-start // _HUGE_PAGE_BYTES), (start + _HUGE_HEAP_BYTES) // _HUGE_PAGE_BYTES
    refused = libc.madvise(first * _HUGE_PAGE_BYTES, (last - first) * _HUGE_PAGE_BYTES, _MADV_HUGEPAGE)
    libc.free(start)
    return not refused
