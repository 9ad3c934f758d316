"""Squared-ReLU feed-forward in few passes: cuBLAS products with fused kernels between them, or kernels that do both.

Letters: N rows, D width in, H hidden width, E width out, K tiles of the hidden width.

With r = 1 / rms(h), one factor a row, y = r (h down^T): the normalised h is never made. Backwards, with g = dy,

    dh = (r g) down - c h,   c = (g . y) r^2 / H        since d loss / d r = g . y / r
    du = dh * 2 relu(u),     relu(u) = sqrt(h)

so what a row contributes through its norm is known from E numbers of the row before the hidden gradient is made, and h
alone (with ReLU) is kept of the hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.relu2_ffn.torch_impl import relu2_check_arguments
from common.triton_support import (
    kernel_is_interpreted,
    multiprocessors_of,
    nearest_bf16,
    require_triton,
    tl,
    triton_kernel,
)


@triton_kernel
def _relu2_narrow(x, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """float32 to the dtype of memory, rounded (the interpreter's cast to bfloat16 cuts off)."""
    if WIDEN and dtype == tl.bfloat16:
        x = nearest_bf16(x)
    return x.to(dtype)


@triton_kernel
def _relu2_slope(kept, negative_slope, LEAKY: tl.constexpr):
    """h and dh / du from what is kept: u if LEAKY, else h."""
    if LEAKY:
        inner = tl.where(kept > 0, 1.0, negative_slope)
        bent = kept * inner
        return bent * bent, 2.0 * bent * inner
    return kept, 2.0 * tl.sqrt(kept)


@triton_kernel
def _relu2_act_kernel(
    u_ptr,
    h_ptr,
    factor_ptr,
    rows,
    hidden,
    negative_slope,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """h = leaky_relu(u)^2 (h may be u) and the row's factor 1 / rms(h), for a few rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64) * hidden
    squares = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for first in range(0, hidden, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        inside = (n < rows)[:, None] & (column < hidden)[None, :]
        u = tl.load(u_ptr + row[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        h, _ = _relu2_slope(u, negative_slope, True)
        squares += h * h
        tl.store(
            h_ptr + row[:, None] + column[None, :], _relu2_narrow(h, h_ptr.dtype.element_ty, WIDEN), mask=inside
        )
    factor = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / hidden + eps)
    tl.store(factor_ptr + n, factor, mask=n < rows)


@triton_kernel
def _relu2_rows_kernel(
    dy_ptr,
    y_ptr,
    factor_ptr,
    scaled_ptr,
    through_ptr,
    rows,
    width,
    hidden,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """r g and c = (g . y) r^2 / H of a few rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64) * width
    factor = tl.load(factor_ptr + n, mask=n < rows, other=0.0)
    dots = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for first in range(0, width, BLOCK_E):
        column = first + tl.arange(0, BLOCK_E)
        inside = (n < rows)[:, None] & (column < width)[None, :]
        place = row[:, None] + column[None, :]
        dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
        dots += dy * tl.load(y_ptr + place, mask=inside, other=0.0).to(tl.float32)
        scaled = _relu2_narrow(dy * factor[:, None], scaled_ptr.dtype.element_ty, WIDEN)
        tl.store(scaled_ptr + place, scaled, mask=inside)
    tl.store(through_ptr + n, tl.sum(dots, axis=1) * factor * factor / hidden, mask=n < rows)


@triton_kernel
def _relu2_back_kernel(
    dh_ptr,
    kept_ptr,
    through_ptr,
    rows,
    hidden,
    negative_slope,
    LEAKY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """du = (dh - c h) dh/du, in place of dh."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (n < rows)[:, None] & (column < hidden)[None, :]
    place = (n.to(tl.int64) * hidden)[:, None] + column[None, :]
    through = tl.load(through_ptr + n, mask=n < rows, other=0.0)
    h, slope = _relu2_slope(tl.load(kept_ptr + place, mask=inside, other=0.0).to(tl.float32), negative_slope, LEAKY)
    dh = tl.load(dh_ptr + place, mask=inside, other=0.0).to(tl.float32)
    du = (dh - through[:, None] * h) * slope
    tl.store(dh_ptr + place, _relu2_narrow(du, dh_ptr.dtype.element_ty, WIDEN), mask=inside)


@triton_kernel
def _relu2_up_kernel(
    x_rows,
    up_rows,
    u_rows,
    h_rows,
    squares_ptr,
    rows,
    hidden,
    width,
    tiles_n,
    tiles_h,
    negative_slope,
    LEAKY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Tiles of h = leaky_relu(x up^T)^2 (and of u if LEAKY), and each tile's row sums of h^2."""
    HALF: tl.constexpr = BLOCK_H // 2
    tiles = tiles_n * tiles_h
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):  # pyright: ignore
        first_n = (tile // tiles_h) * BLOCK_N
        first_h = (tile % tiles_h) * BLOCK_H
        u = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        for d in range(0, width, BLOCK_D):
            a = x_rows.load([first_n, d])
            b = up_rows.load([first_h, d])
            if WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            u = tl.dot(a, b.T, u, input_precision="ieee")
        left, right = u.reshape((BLOCK_N, 2, HALF)).permute(0, 2, 1).split()
        h, _ = _relu2_slope(left, negative_slope, True)
        squares = tl.sum(h * h, axis=1)
        h_rows.store([first_n, first_h], _relu2_narrow(h, h_rows.dtype, WIDEN))
        if LEAKY:
            u_rows.store([first_n, first_h], _relu2_narrow(left, h_rows.dtype, WIDEN))
        h, _ = _relu2_slope(right, negative_slope, True)
        squares += tl.sum(h * h, axis=1)
        h_rows.store([first_n, first_h + HALF], _relu2_narrow(h, h_rows.dtype, WIDEN))
        if LEAKY:
            u_rows.store([first_n, first_h + HALF], _relu2_narrow(right, h_rows.dtype, WIDEN))
        n = first_n + tl.arange(0, BLOCK_N)
        tl.store(squares_ptr + n * tiles_h + tile % tiles_h, squares, mask=n < rows)


@triton_kernel
def _relu2_down_back_kernel(
    scaled_rows,
    down_rows,
    kept_rows,
    du_rows,
    through_ptr,
    rows,
    hidden,
    width,
    tiles_n,
    tiles_h,
    negative_slope,
    LEAKY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Tiles of du = ((r g) down - c h) dh/du."""
    HALF: tl.constexpr = BLOCK_H // 2
    tiles = tiles_n * tiles_h
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):  # pyright: ignore
        first_n = (tile // tiles_h) * BLOCK_N
        first_h = (tile % tiles_h) * BLOCK_H
        dh = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        for e in range(0, width, BLOCK_E):
            a = scaled_rows.load([first_n, e])
            b = down_rows.load([e, first_h])
            if WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            dh = tl.dot(a, b, dh, input_precision="ieee")
        left, right = dh.reshape((BLOCK_N, 2, HALF)).permute(0, 2, 1).split()
        n = first_n + tl.arange(0, BLOCK_N)
        through = tl.load(through_ptr + n, mask=n < rows, other=0.0)
        h, slope = _relu2_slope(kept_rows.load([first_n, first_h]).to(tl.float32), negative_slope, LEAKY)
        du = (left - through[:, None] * h) * slope
        du_rows.store([first_n, first_h], _relu2_narrow(du, du_rows.dtype, WIDEN))
        h, slope = _relu2_slope(kept_rows.load([first_n, first_h + HALF]).to(tl.float32), negative_slope, LEAKY)
        du = (right - through[:, None] * h) * slope
        du_rows.store([first_n, first_h + HALF], _relu2_narrow(du, du_rows.dtype, WIDEN))


def relu2_ffn_triton(
    x_ND: Tensor,
    up_HD: Tensor,
    down_EH: Tensor,
    *,
    negative_slope: float = 0.0,
    eps: float = 1e-6,
    fuse_matmuls: bool = False,
) -> Tensor:
    """y = down (h / rms(h)), h = leaky_relu(up x)^2, as `relu2_ffn_torch`.

    Source: as `relu2_ffn_torch`; how the norm leaves the hidden width, see the head of this file.

    Args:
        x_ND, up_HD, down_EH, negative_slope, eps: as for `relu2_ffn_torch`; bfloat16 or float32.
        fuse_matmuls: activation and its derivative in the epilogues of Triton's own products, instead of passes between
            cuBLAS's; needs D, H and E to be multiples of 16 bytes.
    Returns:
        as `relu2_ffn_torch`, differentiable once.
    Raises:
        ValueError: as `relu2_ffn_torch`, another dtype, or sides that fuse_matmuls cannot take.
        RuntimeError: Triton is not installed.

    Numerics: u (kept in float32 until it is squared, with fuse_matmuls), h, r and the derivative are computed in
    float32; h, r g and du are rounded once to the dtype of x. With ReLU relu(u) is recovered as sqrt(h), whose relative
    error is half that of h. Kept for backward: x, y, h and a factor a row; u as well if the slope is not 0.
    """
    require_triton("relu2_ffn_triton")
    relu2_check_arguments(x_ND, up_HD, down_EH, negative_slope, eps)
    if x_ND.dtype not in (torch.bfloat16, torch.float32) or not x_ND.dtype == up_HD.dtype == down_EH.dtype:
        raise ValueError(
            f"relu2_ffn_triton: x is {x_ND.dtype}, up {up_HD.dtype} and down {down_EH.dtype}; expected all bfloat16 or "
            "all float32; relu2_ffn_torch takes others"
        )
    sides = (*up_HD.shape, down_EH.shape[0])
    if fuse_matmuls and any(side * x_ND.element_size() % 16 for side in sides):
        raise ValueError(f"relu2_ffn_triton: fuse_matmuls with H, D, E = {sides}; expected multiples of 16 bytes")
    y_NE = _Relu2Ffn.apply(
        x_ND.reshape(-1, x_ND.shape[-1]).contiguous(),
        up_HD.contiguous(),
        down_EH.contiguous(),
        negative_slope,
        eps,
        fuse_matmuls,
    )
    return y_NE.view(*x_ND.shape[:-1], y_NE.shape[-1])


def _relu2_blocks(dtype: torch.dtype, interpreted: bool) -> tuple[int, int, int, int, int]:
    """Rows, columns and depth of a tile of a product, warps and stages."""
    if interpreted:
        return 32, 32, 16, 4, 1
    return (64, 64, 16, 8, 2) if dtype == torch.float32 else (128, 256, 64, 8, 3)


class _Relu2Ffn(torch.autograd.Function):
    """Forward and backward over (N, D) rows."""

    @staticmethod
    def forward(ctx, x_ND, up_HD, down_EH, negative_slope, eps, fuse_matmuls):
        rows, hidden = x_ND.shape[0], up_HD.shape[0]
        leaky = negative_slope != 0
        interpreted = kernel_is_interpreted(_relu2_up_kernel)
        if fuse_matmuls:
            from triton.tools.tensor_descriptor import TensorDescriptor

            block_N, block_H, block_D, warps, stages = _relu2_blocks(x_ND.dtype, interpreted)
            h_NH = x_ND.new_empty(rows, hidden)
            u_NH = torch.empty_like(h_NH) if leaky else None
            tiles_n, tiles_h = -(-rows // block_N), -(-hidden // block_H)
            squares_NK = torch.empty(rows, tiles_h, dtype=torch.float32, device=x_ND.device)
            _relu2_up_kernel[(min(tiles_n * tiles_h, multiprocessors_of(x_ND.device)),)](
                TensorDescriptor.from_tensor(x_ND, [block_N, block_D]),
                TensorDescriptor.from_tensor(up_HD, [block_H, block_D]),
                None if u_NH is None else TensorDescriptor.from_tensor(u_NH, [block_N, block_H // 2]),
                TensorDescriptor.from_tensor(h_NH, [block_N, block_H // 2]),
                squares_NK,
                rows,
                hidden,
                x_ND.shape[1],
                tiles_n,
                tiles_h,
                negative_slope,
                LEAKY=leaky,
                BLOCK_N=block_N,
                BLOCK_H=block_H,
                BLOCK_D=block_D,
                WIDEN=interpreted,
                num_warps=warps,
                num_stages=stages,
            )
            factor_N = (squares_NK.sum(dim=1) / hidden + eps).rsqrt()
        else:
            u_NH = torch.mm(x_ND, up_HD.t())
            h_NH = torch.empty_like(u_NH) if leaky else u_NH
            factor_N = torch.empty(rows, dtype=torch.float32, device=x_ND.device)
            _relu2_act_kernel[(-(-rows // 4),)](
                u_NH, h_NH, factor_N, rows, hidden, negative_slope, eps, BLOCK_N=4, BLOCK_H=512, WIDEN=interpreted
            )
        y_NE = torch.mm(h_NH, down_EH.t())
        y_NE.mul_(factor_N[:, None])
        ctx.save_for_backward(x_ND, up_HD, down_EH, h_NH, u_NH if leaky else None, factor_N, y_NE)
        ctx.negative_slope, ctx.fuse_matmuls = negative_slope, fuse_matmuls
        return y_NE

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_NE):
        x_ND, up_HD, down_EH, h_NH, u_NH, factor_N, y_NE = ctx.saved_tensors
        (rows, width), hidden = y_NE.shape, h_NH.shape[1]
        leaky, interpreted = u_NH is not None, kernel_is_interpreted(_relu2_up_kernel)
        kept_NH = h_NH if u_NH is None else u_NH
        dy_NE = dy_NE.contiguous()
        scaled_NE, through_N = torch.empty_like(dy_NE), torch.empty_like(factor_N)
        _relu2_rows_kernel[(-(-rows // 8),)](
            dy_NE,
            y_NE,
            factor_N,
            scaled_NE,
            through_N,
            rows,
            width,
            hidden,
            BLOCK_N=8,
            BLOCK_E=128,
            WIDEN=interpreted,
        )
        if ctx.fuse_matmuls:
            from triton.tools.tensor_descriptor import TensorDescriptor

            block_N, block_H, block_E, warps, stages = _relu2_blocks(h_NH.dtype, interpreted)
            tiles_n, tiles_h = -(-rows // block_N), -(-hidden // block_H)
            du_NH = torch.empty_like(h_NH)
            _relu2_down_back_kernel[(min(tiles_n * tiles_h, multiprocessors_of(h_NH.device)),)](
                TensorDescriptor.from_tensor(scaled_NE, [block_N, block_E]),
                TensorDescriptor.from_tensor(down_EH, [block_E, block_H]),
                TensorDescriptor.from_tensor(kept_NH, [block_N, block_H // 2]),
                TensorDescriptor.from_tensor(du_NH, [block_N, block_H // 2]),
                through_N,
                rows,
                hidden,
                width,
                tiles_n,
                tiles_h,
                ctx.negative_slope,
                LEAKY=leaky,
                BLOCK_N=block_N,
                BLOCK_H=block_H,
                BLOCK_E=block_E,
                WIDEN=interpreted,
                num_warps=warps,
                num_stages=stages,
            )
        else:
            du_NH = torch.mm(scaled_NE, down_EH)
            _relu2_back_kernel[(-(-rows // 4), -(-hidden // 512))](
                du_NH,
                kept_NH,
                through_N,
                rows,
                hidden,
                ctx.negative_slope,
                LEAKY=leaky,
                BLOCK_N=4,
                BLOCK_H=512,
                WIDEN=interpreted,
            )
        dx_ND = torch.mm(du_NH, up_HD) if ctx.needs_input_grad[0] else None
        return dx_ND, torch.mm(du_NH.t(), x_ND), torch.mm(scaled_NE.t(), h_NH), None, None, None
