"""RMS normalisation of a gated row as Triton kernels: one pass over memory each way.

Letters: N rows, I inner width, R rows that a program works on at once, s programs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.gated_norm.torch_impl import gated_norm_check_arguments
from common.triton_support import kernel_is_interpreted, nearest_bf16, require_triton, tl, triton, triton_kernel

# Rows that one program of the backward pass sums the weight's gradient over: a power of two, and a multiple of those it
# works on at once.
GATED_NORM_ROWS = 64
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
def _gated_norm_load(ptr, row_R, column_I, rows, width, stride_n):
    """(R, I) in float32, zero outside. int64: a row's offset may pass 2^31 numbers."""
    at_RI = ptr + row_R.to(tl.int64)[:, None] * stride_n + column_I[None, :]
    return tl.load(at_RI, mask=(row_R < rows)[:, None] & (column_I < width)[None, :], other=0.0).to(tl.float32)


@triton_kernel
def _gated_norm_forward_kernel(
    y_ptr, z_ptr, weight_ptr, out_ptr, rows, width, eps, stride_y_n, stride_z_n,
    R: tl.constexpr, BLOCK: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    column_I = tl.arange(0, BLOCK)
    y_RI = _gated_norm_load(y_ptr, row_R, column_I, rows, width, stride_y_n)
    z_RI = _gated_norm_load(z_ptr, row_R, column_I, rows, width, stride_z_n)
    weight_I = tl.load(weight_ptr + column_I, mask=column_I < width, other=0.0)
    gated_RI = y_RI * z_RI / (1.0 + tl.exp(-z_RI))
    inverse_R = tl.rsqrt(tl.sum(gated_RI * gated_RI, 1) / width + eps)
    out_RI = gated_RI * inverse_R[:, None] * weight_I[None, :]
    if NEAREST:
        out_RI = nearest_bf16(out_RI)
    at_RI = out_ptr + row_R.to(tl.int64)[:, None] * width + column_I[None, :]
    tl.store(
        at_RI, out_RI.to(out_ptr.dtype.element_ty), mask=(row_R < rows)[:, None] & (column_I < width)[None, :]
    )


@triton_kernel
def _gated_norm_backward_kernel(
    y_ptr, z_ptr, weight_ptr, dout_ptr, dy_ptr, dz_ptr, partial_ptr, rows, width, eps,
    stride_y_n, stride_z_n, stride_dout_n,
    R: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS rows; partial (s, I) holds each program's sum for the weight."""
    column_I = tl.arange(0, BLOCK)
    weight_I = tl.load(weight_ptr + column_I, mask=column_I < width, other=0.0)
    dweight_RI = tl.zeros([R, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, tl.minimum(tl.program_id(0) * ROWS + ROWS, rows), R):
        row_R = first + tl.arange(0, R)
        y_RI = _gated_norm_load(y_ptr, row_R, column_I, rows, width, stride_y_n)
        z_RI = _gated_norm_load(z_ptr, row_R, column_I, rows, width, stride_z_n)
        dout_RI = _gated_norm_load(dout_ptr, row_R, column_I, rows, width, stride_dout_n)
        gate_RI = 1.0 / (1.0 + tl.exp(-z_RI))
        silu_RI = z_RI * gate_RI
        gated_RI = y_RI * silu_RI
        inverse_R = tl.rsqrt(tl.sum(gated_RI * gated_RI, 1) / width + eps)
        normed_RI = gated_RI * inverse_R[:, None]
        dweight_RI += dout_RI * normed_RI
        scaled_RI = dout_RI * weight_I[None, :]
        mean_R = tl.sum(scaled_RI * normed_RI, 1) / width
        dgated_RI = inverse_R[:, None] * (scaled_RI - normed_RI * mean_R[:, None])
        at_RI = row_R.to(tl.int64)[:, None] * width + column_I[None, :]
        exists_RI = (row_R < rows)[:, None] & (column_I < width)[None, :]
        dy_RI = dgated_RI * silu_RI
        dz_RI = dgated_RI * y_RI * (gate_RI + silu_RI * (1.0 - gate_RI))
        if NEAREST:
            dy_RI, dz_RI = nearest_bf16(dy_RI), nearest_bf16(dz_RI)
        tl.store(dy_ptr + at_RI, dy_RI.to(dy_ptr.dtype.element_ty), mask=exists_RI)
        tl.store(dz_ptr + at_RI, dz_RI.to(dz_ptr.dtype.element_ty), mask=exists_RI)
    at_I = partial_ptr + tl.program_id(0).to(tl.int64) * width + column_I
    tl.store(at_I, tl.sum(dweight_RI, 0), mask=column_I < width)


class _GatedRmsNormTriton(torch.autograd.Function):
    """The norm over rows; saves its inputs only."""

    @staticmethod
    def forward(ctx, y_NI, z_NI, weight_I, eps):
        y_NI, z_NI = (t if t.stride(1) == 1 else t.contiguous() for t in (y_NI, z_NI))
        weight_I = weight_I.contiguous()
        rows, width = y_NI.shape
        out_NI = y_NI.new_empty(rows, width)
        launch = gated_norm_triton_launch(width, y_NI.dtype)
        _gated_norm_forward_kernel[(triton.cdiv(rows, launch["R"]),)](
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
            ROWS=GATED_NORM_ROWS, **gated_norm_triton_launch(width, y_NI.dtype),
        )  # fmt: skip
        return dy_NI, dz_NI, partial_sI.sum(dim=0), None


def gated_norm_triton_launch(width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Rows at once, columns and warps: at most 16 numbers of a tile a thread, so that backward fits into registers."""
    block = triton.next_power_of_2(width)
    return {
        "R": min(GATED_NORM_ROWS, max(1, 2048 // block)),
        "BLOCK": block,
        "NEAREST": kernel_is_interpreted(_gated_norm_forward_kernel) and dtype == torch.bfloat16,
        "num_warps": max(4, block // 512),
    }
