"""Newton-Schulz with the symmetry of X X^T: a Triton kernel computes tiles on and above the diagonal and mirrors them.

Letters: B matrices of one shape, M rows, N columns, S the shorter side, L the longer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.optim.muon import JORDAN_POLYNOMIALS, Polynomials, iterations_of, newton_schulz_torch
from common.triton_support import (
    kernel_is_interpreted,
    multiprocessors_of,
    nearest_bf16,
    require_triton,
    tl,
    triton_kernel,
)

# Tiles are 128 x 128 if there are at least so many of them a multiprocessor, else 64 x 64. Large ones read half as much
# out of L2, which takes several times as long as their products; fewer than multiprocessors would leave some idle.
MUON_LARGE_TILES_FROM = 1.0


@triton_kernel
def _mirrored_product_kernel(
    x_rows,
    added_ptr,
    out_ptr,
    side,
    length,
    tiles,
    pairs,
    alpha,
    beta,
    ADD: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile (i, j), i <= j, of alpha X X^T + beta added (itself symmetric), and its mirror image."""
    matrix = tl.program_id(0) // pairs
    pair = tl.program_id(0) % pairs
    # Pairs are counted down the columns of the upper triangle: column j holds j + 1 of them.
    j = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    j = tl.where(j * (j + 1) // 2 > pair, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= pair, j + 1, j)
    i = pair - j * (j + 1) // 2
    first_i = matrix * side + i * BLOCK_S
    first_j = matrix * side + j * BLOCK_S
    total = tl.zeros((BLOCK_S, BLOCK_S), tl.float32)
    for first in range(0, length, BLOCK_L):
        a = x_rows.load([first_i, first])
        b = x_rows.load([first_j, first])
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b.T, total, input_precision="ieee")
    # A tile may reach into the next matrix: those rows and columns are not stored.
    row = i * BLOCK_S + tl.arange(0, BLOCK_S)
    column = j * BLOCK_S + tl.arange(0, BLOCK_S)
    base = matrix.to(tl.int64) * side * side
    inside = (row < side)[:, None] & (column < side)[None, :]
    place = (row * side)[:, None] + column[None, :]
    total = total * alpha
    if ADD:
        total += beta * tl.load(added_ptr + base + place, mask=inside, other=0.0).to(tl.float32)
    if WIDEN and out_ptr.dtype.element_ty == tl.bfloat16:
        total = nearest_bf16(total)
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + base + place, out, mask=inside)
    if i != j:
        mirrored = (column * side)[:, None] + row[None, :]
        tl.store(out_ptr + base + mirrored, out.T, mask=(column < side)[:, None] & (row < side)[None, :])


def _mirrored_product(X_BSL: Tensor, added_BSS: Tensor | None, alpha: float, beta: float) -> Tensor:
    """alpha X X^T + beta added; tiles off the diagonal are mirrored to the bit. Sides are multiples of 16 bytes."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    count, side, length = X_BSL.shape
    interpreted = kernel_is_interpreted(_mirrored_product_kernel)
    if interpreted:
        block_S, block_L, warps, stages = 16, 16, 4, 1
    elif X_BSL.dtype == torch.float32:
        block_S, block_L, warps, stages = 64, 16, 8, 2
    else:
        tiles = -(-side // 128)
        large = count * tiles * (tiles + 1) // 2 >= MUON_LARGE_TILES_FROM * multiprocessors_of(X_BSL.device)
        block_S, block_L, warps, stages = (128, 64, 8, 3) if large else (64, 64, 4, 4)
    tiles = -(-side // block_S)
    pairs = tiles * (tiles + 1) // 2
    out_BSS = X_BSL.new_empty(count, side, side)
    _mirrored_product_kernel[(count * pairs,)](
        TensorDescriptor.from_tensor(X_BSL.view(count * side, length), [block_S, block_L]),
        added_BSS,
        out_BSS,
        side,
        length,
        tiles,
        pairs,
        alpha,
        beta,
        ADD=added_BSS is not None,
        BLOCK_S=block_S,
        BLOCK_L=block_L,
        WIDEN=interpreted,
        num_warps=warps,
        num_stages=stages,
    )
    return out_BSS


def newton_schulz_triton(
    G_BMN: Tensor, steps: int, *, dtype: torch.dtype | None = None, polynomials: Polynomials = JORDAN_POLYNOMIALS
) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly, as `newton_schulz_torch`, whose first two products cost half.

    Source: as `newton_schulz_torch`. Both X X^T and its polynomial are symmetric, so only their upper triangles are
    computed, in tiles, and mirrored.

    Args and Returns: as `newton_schulz_torch`; the products are in bfloat16 or float32.
    Raises:
        ValueError: as `newton_schulz_torch`, or another dtype of the products.
        RuntimeError: Triton is not installed.

    Numerics: as `newton_schulz_torch`, with products of float32 in full precision. Equal runs give equal bits.
    """
    require_triton("newton_schulz_triton")
    if G_BMN.dim() != 3 or steps < 1:
        if G_BMN.dim() == 2 and steps >= 1:
            return newton_schulz_triton(G_BMN[None], steps, dtype=dtype, polynomials=polynomials)[0]
        return newton_schulz_torch(G_BMN, steps, dtype=dtype, polynomials=polynomials)
    if dtype is None:
        dtype = torch.bfloat16 if G_BMN.is_cuda else G_BMN.dtype
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"newton_schulz_triton: products in {dtype}; expected bfloat16 or float32, or the torch form")
    step = 16 // (2 if dtype == torch.bfloat16 else 4)  # rows of descriptors are multiples of 16 bytes
    wide_BSL = G_BMN if G_BMN.dtype == torch.float64 else G_BMN.float()
    factor_B11 = 1.0 / (wide_BSL.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = G_BMN.shape[1] > G_BMN.shape[2]
    if tall:
        wide_BSL = wide_BSL.mT
    count, side, length = wide_BSL.shape
    # Rows and columns of zeros change nothing.
    X_BSL = torch.zeros(count, -(-side // step) * step, -(-length // step) * step, dtype=dtype, device=G_BMN.device)
    torch.mul(wide_BSL, factor_B11, out=X_BSL[:, :side, :length])
    for a, b, c in iterations_of(polynomials, steps):
        gram_BSS = _mirrored_product(X_BSL, None, 1.0, 0.0)
        mix_BSS = _mirrored_product(gram_BSS, gram_BSS, c, b)
        X_BSL = torch.baddbmm(X_BSL, mix_BSS, X_BSL, beta=a)
    X_BSL = X_BSL[:, :side, :length]
    return (X_BSL.mT if tall else X_BSL).to(G_BMN.dtype)
