"""RMS normalisation of a gated row as Triton kernels: one pass over memory each way.

Letters: N rows, I inner width (in kernels: of one piece of a row), s programs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.gated_norm.torch_impl import gated_norm_check_arguments
from common.triton_support import (
    kernel_is_interpreted,
    nearest_bf16,
    require_triton,
    sigmoid_fast,
    tl,
    triton,
    triton_kernel,
)

# Rows of one program: backward sums the weight's gradient over them, forward only loads the weight once for all.
GATED_NORM_ROWS = 64
GATED_NORM_FORWARD_ROWS = 8
GATED_NORM_WIDEST = 8192


def gated_rms_norm_triton(y: Tensor, z: Tensor, weight_I: Tensor, *, eps: float = 1e-5) -> Tensor:
    """weight * g / sqrt(mean(g^2) + eps) with g = y * silu(z), over the last dimension, on the GPU.

    Source: Zhang and Sennrich 2019 (RMSNorm), gated before the norm as in Dao and Gu 2024 (Mamba-2).

    Args:
        y, z: (..., I), what is normalised and its gate, of one dtype: float32, bfloat16 or float16. Slices of wider
            rows are read in place.
        weight_I: scale of every column; I at most 8192.
        eps: added to the mean square.
    Returns:
        (..., I) in the dtype of y.
    Raises:
        ValueError: shapes or dtypes do not fit together, or are not among these.

    Numerics: everything between loading and storing is float32, so nothing but the result is rounded. Backward computes
    gate and norm again. Results are the same bits in every run. One backward pass is supported, not the derivative of
    it.
    """
    require_triton("gated_rms_norm_triton")
    gated_norm_check_arguments(y, z, weight_I)
    width = weight_I.shape[0]
    if y.dtype not in (torch.float32, torch.bfloat16, torch.float16) or width > GATED_NORM_WIDEST:
        raise ValueError(
            f"gated_rms_norm_triton: {width} columns of {y.dtype}, expected at most {GATED_NORM_WIDEST} of float32, "
            "bfloat16 or float16; gated_rms_norm_torch takes any"
        )
    out_NI = _GatedRmsNormTriton.apply(y.reshape(-1, width), z.reshape(-1, width), weight_I.float(), eps)
    return out_NI.view(y.shape)


@triton_kernel
def _gated_norm_load(ptr, first, width, BLOCK: tl.constexpr):
    """Some columns of a row in float32, zero outside."""
    column_I = first + tl.arange(0, BLOCK)
    return tl.load(ptr + column_I, mask=column_I < width, other=0.0).to(tl.float32)


@triton_kernel
def _gated_norm_store(ptr, value_I, first, width, BLOCK: tl.constexpr, NEAREST: tl.constexpr):
    """The reverse of `_gated_norm_load`."""
    if NEAREST:
        value_I = nearest_bf16(value_I)
    column_I = first + tl.arange(0, BLOCK)
    tl.store(ptr + column_I, value_I.to(ptr.dtype.element_ty), mask=column_I < width)


@triton_kernel
def _gated_norm_gated(y_ptr, z_ptr, first, width, BLOCK: tl.constexpr):
    """y * silu(z) of some columns."""
    z_I = _gated_norm_load(z_ptr, first, width, BLOCK)
    return _gated_norm_load(y_ptr, first, width, BLOCK) * z_I * sigmoid_fast(z_I)


@triton_kernel
def _gated_norm_forward_kernel(
    y_ptr, z_ptr, weight_ptr, out_ptr, rows, width, eps, stride_y_n, stride_z_n,
    BLOCK: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """ROWS rows, one after the other, each in two pieces of BLOCK and REST columns: one power of two for both would
    waste up to half of all work. Sums are scalars, so the pieces may lie differently over the threads."""
    weight_I = _gated_norm_load(weight_ptr, 0, width, BLOCK)
    if REST > 0:
        weight_rest = _gated_norm_load(weight_ptr, BLOCK, width, REST)
    for row in range(tl.program_id(0) * ROWS, tl.minimum(tl.program_id(0) * ROWS + ROWS, rows)):
        n = tl.cast(row, tl.int64)  # a row may start beyond 2^31 numbers
        gated_I = _gated_norm_gated(y_ptr + n * stride_y_n, z_ptr + n * stride_z_n, 0, width, BLOCK)
        squares = tl.sum(gated_I * gated_I)
        if REST > 0:
            gated_rest = _gated_norm_gated(y_ptr + n * stride_y_n, z_ptr + n * stride_z_n, BLOCK, width, REST)
            squares += tl.sum(gated_rest * gated_rest)
        inverse = tl.rsqrt(squares / width + eps)
        _gated_norm_store(out_ptr + n * width, gated_I * inverse * weight_I, 0, width, BLOCK, NEAREST)
        if REST > 0:
            _gated_norm_store(out_ptr + n * width, gated_rest * inverse * weight_rest, BLOCK, width, REST, NEAREST)


@triton_kernel
def _gated_norm_terms(y_ptr, z_ptr, dout_ptr, weight_I, first, width, BLOCK: tl.constexpr):
    """What the gradients of some columns are made of: y, sigmoid(z), silu(z), dout, and the row's two sums."""
    y_I = _gated_norm_load(y_ptr, first, width, BLOCK)
    z_I = _gated_norm_load(z_ptr, first, width, BLOCK)
    dout_I = _gated_norm_load(dout_ptr, first, width, BLOCK)
    gate_I = sigmoid_fast(z_I)
    silu_I = z_I * gate_I
    gated_I = y_I * silu_I
    return y_I, gate_I, silu_I, dout_I, tl.sum(gated_I * gated_I), tl.sum(dout_I * weight_I * gated_I)


@triton_kernel
def _gated_norm_gradients(
    dy_ptr, dz_ptr, y_I, gate_I, silu_I, dout_I, weight_I, inverse, mean, first, width,
    BLOCK: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """Writes dy and dz of some columns and returns what they add to the weight's gradient."""
    normed_I = y_I * silu_I * inverse
    dgated_I = inverse * (dout_I * weight_I - normed_I * mean)
    _gated_norm_store(dy_ptr, dgated_I * silu_I, first, width, BLOCK, NEAREST)
    dz_I = dgated_I * y_I * (gate_I + silu_I * (1.0 - gate_I))
    _gated_norm_store(dz_ptr, dz_I, first, width, BLOCK, NEAREST)
    return dout_I * normed_I


@triton_kernel
def _gated_norm_backward_kernel(
    y_ptr, z_ptr, weight_ptr, dout_ptr, dy_ptr, dz_ptr, partial_ptr, rows, width, eps,
    stride_y_n, stride_z_n, stride_dout_n,
    BLOCK: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS rows, in pieces as forward; partial (s, I) holds each program's sum for the weight."""
    weight_I = _gated_norm_load(weight_ptr, 0, width, BLOCK)
    dweight_I = tl.zeros([BLOCK], tl.float32)
    if REST > 0:
        weight_rest = _gated_norm_load(weight_ptr, BLOCK, width, REST)
        dweight_rest = tl.zeros([REST], tl.float32)
    for row in range(tl.program_id(0) * ROWS, tl.minimum(tl.program_id(0) * ROWS + ROWS, rows)):
        n = tl.cast(row, tl.int64)
        y_row, z_row, dout_row = y_ptr + n * stride_y_n, z_ptr + n * stride_z_n, dout_ptr + n * stride_dout_n
        y_I, gate_I, silu_I, dout_I, squares, through = _gated_norm_terms(
            y_row, z_row, dout_row, weight_I, 0, width, BLOCK
        )
        if REST > 0:
            y_rest, gate_rest, silu_rest, dout_rest, more_squares, more_through = _gated_norm_terms(
                y_row, z_row, dout_row, weight_rest, BLOCK, width, REST
            )
            squares += more_squares
            through += more_through
        inverse = tl.rsqrt(squares / width + eps)
        mean = through * inverse / width
        dy_row, dz_row = dy_ptr + n * width, dz_ptr + n * width
        dweight_I += _gated_norm_gradients(
            dy_row, dz_row, y_I, gate_I, silu_I, dout_I, weight_I, inverse, mean, 0, width, BLOCK, NEAREST
        )
        if REST > 0:
            dweight_rest += _gated_norm_gradients(
                dy_row, dz_row, y_rest, gate_rest, silu_rest, dout_rest, weight_rest, inverse, mean, BLOCK, width,
                REST, NEAREST,
            )  # fmt: skip
    own_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * width
    _gated_norm_store(own_ptr, dweight_I, 0, width, BLOCK, False)
    if REST > 0:
        _gated_norm_store(own_ptr, dweight_rest, BLOCK, width, REST, False)


class _GatedRmsNormTriton(torch.autograd.Function):
    """The norm over rows; saves its inputs only."""

    @staticmethod
    def forward(ctx, y_NI, z_NI, weight_I, eps):
        y_NI, z_NI = (t if t.stride(1) == 1 else t.contiguous() for t in (y_NI, z_NI))
        weight_I = weight_I.contiguous()
        rows, width = y_NI.shape
        out_NI = y_NI.new_empty(rows, width)
        launch = gated_norm_triton_launch(width, y_NI.dtype, backward=False)
        _gated_norm_forward_kernel[(triton.cdiv(rows, launch["ROWS"]),)](
            y_NI, z_NI, weight_I, out_NI, rows, width, eps, y_NI.stride(0), z_NI.stride(0), **launch
        )
        ctx.save_for_backward(y_NI, z_NI, weight_I)
        ctx.eps = eps
        return out_NI

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout_NI):
        y_NI, z_NI, weight_I = ctx.saved_tensors
        if dout_NI.stride(1) != 1:
            dout_NI = dout_NI.contiguous()
        rows, width = y_NI.shape
        programs = triton.cdiv(rows, GATED_NORM_ROWS)
        dy_NI, dz_NI = y_NI.new_empty(rows, width), y_NI.new_empty(rows, width)
        partial_sI = weight_I.new_empty(programs, width)
        _gated_norm_backward_kernel[(programs,)](
            y_NI, z_NI, weight_I, dout_NI, dy_NI, dz_NI, partial_sI, rows, width, ctx.eps,
            y_NI.stride(0), z_NI.stride(0), dout_NI.stride(0),
            **gated_norm_triton_launch(width, y_NI.dtype, backward=True),
        )  # fmt: skip
        return dy_NI, dz_NI, partial_sI.sum(dim=0), None


def gated_norm_triton_launch(width: int, dtype: torch.dtype, backward: bool) -> dict[str, Any]:
    """Columns of the two pieces of a row, rows of a program, and warps.

    A thread takes 16 numbers of a row forward and 8 backward, where it holds more of each: chosen by instructions
    issued and registers, not yet by a clock.
    """
    block = triton.next_power_of_2(width)
    rest = triton.next_power_of_2(max(1, width - block // 2))
    block, rest = (block // 2, rest) if rest < block // 2 else (block, 0)
    return {
        "BLOCK": block,
        "REST": rest,
        "ROWS": GATED_NORM_ROWS if backward else GATED_NORM_FORWARD_ROWS,
        "NEAREST": kernel_is_interpreted(_gated_norm_forward_kernel) and dtype == torch.bfloat16,
        "num_warps": max(1, block // (256 if backward else 512)),
    }
