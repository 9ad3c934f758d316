"""RMS normalisation of a gated row as Triton kernels: one pass over memory each way.

Letters: N rows, I inner width, R rows that a program works on at once, s programs.
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
def _gated_norm_at(row_R, first, rows, width, stride_n, BLOCK: tl.constexpr):
    """Offsets and existence (R, BLOCK) of some rows' columns. int64: a row may start beyond 2^31 numbers."""
    column_I = first + tl.arange(0, BLOCK)
    at_RI = row_R.to(tl.int64)[:, None] * stride_n + column_I[None, :]
    return at_RI, (row_R < rows)[:, None] & (column_I < width)[None, :]


@triton_kernel
def _gated_norm_load(ptr, row_R, first, rows, width, stride_n, BLOCK: tl.constexpr):
    """(R, BLOCK) in float32, zero outside."""
    at_RI, exists_RI = _gated_norm_at(row_R, first, rows, width, stride_n, BLOCK)
    return tl.load(ptr + at_RI, mask=exists_RI, other=0.0).to(tl.float32)


@triton_kernel
def _gated_norm_weight(weight_ptr, first, width, BLOCK: tl.constexpr):
    """Weights of some columns in float32, zero outside."""
    column_I = first + tl.arange(0, BLOCK)
    return tl.load(weight_ptr + column_I, mask=column_I < width, other=0.0)


@triton_kernel
def _gated_norm_gate(y_ptr, z_ptr, row_R, first, rows, width, stride_y_n, stride_z_n, BLOCK: tl.constexpr):
    """y * silu(z) of some columns, and its row sums of squares."""
    y_RI = _gated_norm_load(y_ptr, row_R, first, rows, width, stride_y_n, BLOCK)
    z_RI = _gated_norm_load(z_ptr, row_R, first, rows, width, stride_z_n, BLOCK)
    gated_RI = y_RI * z_RI * sigmoid_fast(z_RI)
    return gated_RI, tl.sum(gated_RI * gated_RI, 1)


@triton_kernel
def _gated_norm_store(ptr, value_RI, row_R, first, rows, width, BLOCK: tl.constexpr, NEAREST: tl.constexpr):
    """Some columns of a contiguous (N, I)."""
    if NEAREST:
        value_RI = nearest_bf16(value_RI)
    at_RI, exists_RI = _gated_norm_at(row_R, first, rows, width, width, BLOCK)
    tl.store(ptr + at_RI, value_RI.to(ptr.dtype.element_ty), mask=exists_RI)


@triton_kernel
def _gated_norm_forward_kernel(
    y_ptr, z_ptr, weight_ptr, out_ptr, rows, width, eps, stride_y_n, stride_z_n,
    R: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """R rows in two pieces of BLOCK and REST columns: one power of two for both would waste up to half of all work."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    gated_RI, squares_R = _gated_norm_gate(y_ptr, z_ptr, row_R, 0, rows, width, stride_y_n, stride_z_n, BLOCK)
    if REST > 0:
        more_RI, more_R = _gated_norm_gate(y_ptr, z_ptr, row_R, BLOCK, rows, width, stride_y_n, stride_z_n, REST)
        squares_R += more_R
    inverse_R1 = tl.rsqrt(squares_R / width + eps)[:, None]
    out_RI = gated_RI * inverse_R1 * _gated_norm_weight(weight_ptr, 0, width, BLOCK)[None, :]
    _gated_norm_store(out_ptr, out_RI, row_R, 0, rows, width, BLOCK, NEAREST)
    if REST > 0:
        rest_RI = more_RI * inverse_R1 * _gated_norm_weight(weight_ptr, BLOCK, width, REST)[None, :]
        _gated_norm_store(out_ptr, rest_RI, row_R, BLOCK, rows, width, REST, NEAREST)


@triton_kernel
def _gated_norm_terms(
    y_ptr, z_ptr, dout_ptr, weight_I, row_R, first, rows, width, stride_y_n, stride_z_n, stride_dout_n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the gradients of some columns are made of: y, sigmoid(z), silu(z), dout, and the two row sums."""
    y_RI = _gated_norm_load(y_ptr, row_R, first, rows, width, stride_y_n, BLOCK)
    z_RI = _gated_norm_load(z_ptr, row_R, first, rows, width, stride_z_n, BLOCK)
    dout_RI = _gated_norm_load(dout_ptr, row_R, first, rows, width, stride_dout_n, BLOCK)
    gate_RI = sigmoid_fast(z_RI)
    silu_RI = z_RI * gate_RI
    gated_RI = y_RI * silu_RI
    squares_R = tl.sum(gated_RI * gated_RI, 1)
    through_R = tl.sum(dout_RI * weight_I[None, :] * gated_RI, 1)
    return y_RI, gate_RI, silu_RI, dout_RI, squares_R, through_R


@triton_kernel
def _gated_norm_gradients(
    dy_ptr, dz_ptr, y_RI, gate_RI, silu_RI, dout_RI, weight_I, inverse_R, mean_R, row_R, first, rows, width,
    BLOCK: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """Writes dy and dz of some columns and returns what they add to the weight's gradient, (R, BLOCK)."""
    normed_RI = y_RI * silu_RI * inverse_R[:, None]
    dgated_RI = inverse_R[:, None] * (dout_RI * weight_I[None, :] - normed_RI * mean_R[:, None])
    dz_RI = dgated_RI * y_RI * (gate_RI + silu_RI * (1.0 - gate_RI))
    _gated_norm_store(dy_ptr, dgated_RI * silu_RI, row_R, first, rows, width, BLOCK, NEAREST)
    _gated_norm_store(dz_ptr, dz_RI, row_R, first, rows, width, BLOCK, NEAREST)
    return dout_RI * normed_RI


@triton_kernel
def _gated_norm_backward_kernel(
    y_ptr, z_ptr, weight_ptr, dout_ptr, dy_ptr, dz_ptr, partial_ptr, rows, width, eps,
    stride_y_n, stride_z_n, stride_dout_n,
    R: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, NEAREST: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS rows; partial (s, I) holds each program's sum for the weight. Two pieces, as forward."""
    weight_I = _gated_norm_weight(weight_ptr, 0, width, BLOCK)
    dweight_RI = tl.zeros([R, BLOCK], tl.float32)
    if REST > 0:
        rest_I = _gated_norm_weight(weight_ptr, BLOCK, width, REST)
        drest_RI = tl.zeros([R, REST], tl.float32)
    for start in range(tl.program_id(0) * ROWS, tl.minimum(tl.program_id(0) * ROWS + ROWS, rows), R):
        row_R = start + tl.arange(0, R)
        y_RI, gate_RI, silu_RI, dout_RI, squares_R, through_R = _gated_norm_terms(
            y_ptr, z_ptr, dout_ptr, weight_I, row_R, 0, rows, width, stride_y_n, stride_z_n, stride_dout_n, BLOCK
        )
        if REST > 0:
            y_more, gate_more, silu_more, dout_more, squares_more, through_more = _gated_norm_terms(
                y_ptr, z_ptr, dout_ptr, rest_I, row_R, BLOCK, rows, width, stride_y_n, stride_z_n, stride_dout_n, REST
            )
            squares_R += squares_more
            through_R += through_more
        inverse_R = tl.rsqrt(squares_R / width + eps)
        mean_R = through_R * inverse_R / width
        dweight_RI += _gated_norm_gradients(
            dy_ptr, dz_ptr, y_RI, gate_RI, silu_RI, dout_RI, weight_I, inverse_R, mean_R, row_R, 0, rows, width,
            BLOCK, NEAREST,
        )  # fmt: skip
        if REST > 0:
            drest_RI += _gated_norm_gradients(
                dy_ptr, dz_ptr, y_more, gate_more, silu_more, dout_more, rest_I, inverse_R, mean_R, row_R, BLOCK, rows,
                width, REST, NEAREST,
            )  # fmt: skip
    own_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * width
    column_I = tl.arange(0, BLOCK)
    tl.store(own_ptr + column_I, tl.sum(dweight_RI, 0), mask=column_I < width)
    if REST > 0:
        column_I = BLOCK + tl.arange(0, REST)
        tl.store(own_ptr + column_I, tl.sum(drest_RI, 0), mask=column_I < width)


class _GatedRmsNormTriton(torch.autograd.Function):
    """The norm over rows; saves its inputs only."""

    @staticmethod
    def forward(ctx, y_NI, z_NI, weight_I, eps):
        y_NI, z_NI = (t if t.stride(1) == 1 else t.contiguous() for t in (y_NI, z_NI))
        weight_I = weight_I.contiguous()
        rows, width = y_NI.shape
        out_NI = y_NI.new_empty(rows, width)
        launch = gated_norm_triton_launch(width, y_NI.dtype, backward=False)
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
            ROWS=GATED_NORM_ROWS, **gated_norm_triton_launch(width, y_NI.dtype, backward=True),
        )  # fmt: skip
        return dy_NI, dz_NI, partial_sI.sum(dim=0), None


def gated_norm_triton_launch(width: int, dtype: torch.dtype, backward: bool) -> dict[str, Any]:
    """Rows at once, columns of the two pieces of a row, and warps.

    A thread takes about 32 numbers of a tensor forward and 8 backward, where it holds more of each: by instructions
    issued and registers (LOG.md), not yet by a clock.
    """
    block = triton.next_power_of_2(width)
    rest = triton.next_power_of_2(max(1, width - block // 2))
    block, rest = (block // 2, rest) if rest < block // 2 else (block, 0)
    per_warp = 256 if backward else 1024
    warps = max(1, block // (256 if backward else 512))
    return {
        "R": min(GATED_NORM_ROWS, max(1, per_warp * warps // block)),
        "BLOCK": block,
        "REST": rest,
        "NEAREST": kernel_is_interpreted(_gated_norm_forward_kernel) and dtype == torch.bfloat16,
        "num_warps": warps,
    }
