"""SIGReg in Triton: projection, sines and cosines and their sums over samples in one kernel each way.

Letters: N samples, T positions, D width, M projections, K knots, S slices of the samples, F moments (2 K: cosines, then
sines), X terms that A is the sum of.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from common.sigreg.torch_impl import sigreg_check_arguments, sigreg_quadrature
from common.triton_support import kernel_is_interpreted, nearest_bf16, require_triton, tl, triton, triton_kernel


@triton_kernel
def _sigreg_terms_kernel(A_ptr, terms_ptr, width, projections, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """A (D, M) as its transpose, or as two of bfloat16 whose sum it is (SPLIT): what products read without detours."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (d < width)[:, None] & (m < projections)[None, :]
    A = tl.load(A_ptr + (d * projections)[:, None] + m[None, :], mask=inside, other=0.0)
    at = terms_ptr + (m * width)[:, None] + d[None, :]
    if SPLIT:
        high = nearest_bf16(A)
        tl.store(at, high.to(tl.bfloat16).T, mask=inside.T)
        tl.store(at + projections * width, nearest_bf16(A - high).to(tl.bfloat16).T, mask=inside.T)
    else:
        tl.store(at, A.T, mask=inside.T)


@triton_kernel
def _sigreg_project(
    z_ptr,
    terms_ptr,
    n,
    m,
    samples,
    projections,
    width,
    stride_n,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """p = A^T z^T, (M, N), at one position. Projections in rows: sums over samples then stay inside a warp."""
    p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, width, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        z = tl.load(
            z_ptr + (n.to(tl.int64) * stride_n)[:, None] + d[None, :],
            mask=(n < samples)[:, None] & (d < width)[None, :],
            other=0.0,
        )
        at = terms_ptr + (m * width)[:, None] + d[None, :]
        inside = (m < projections)[:, None] & (d < width)[None, :]
        A = tl.load(at, mask=inside, other=0.0)
        if SPLIT:
            low = tl.load(at + projections * width, mask=inside, other=0.0)
            if WIDEN:
                z, A, low = z.to(tl.float32), A.to(tl.float32), low.to(tl.float32)
            p = tl.dot(A, z.T, p, input_precision="ieee")
            p = tl.dot(low, z.T, p, input_precision="ieee")
        else:
            p = tl.dot(A, z.T, p, input_precision="tf32x3")
    return p


@triton_kernel
def _sigreg_wave(angle):
    """cos and sin of float32 angles, both from one reduction to about +-pi/4: within 1e-7 up to angles of 1e6.

    Source: Cody and Waite 1980, "Software Manual for the Elementary Functions"; minimax polynomials of the Cephes
    library. Angles above 6e6, whose float32 neighbours lie half a radian apart, come out as some point near the circle,
    infinities as NaN. The library's sine and cosine bring a reduction each, and a loop on the stack for huge angles.
    """
    turns = angle * 0.6366197723675814 + 12582912.0  # quarter turns, rounded into the low bits
    quarter = turns.to(tl.int32, bitcast=True)
    turns -= 12582912.0
    rest = tl.fma(turns, -1.5703125, angle)  # pi/2 in three parts, the first two short: exact products
    rest = tl.fma(turns, -4.837512969970703125e-4, rest)
    rest = tl.fma(turns, -7.54978995489188e-8, rest)
    rest = tl.maximum(rest, -1.1, propagate_nan=tl.PropagateNan.ALL)
    rest = tl.minimum(rest, 1.1, propagate_nan=tl.PropagateNan.ALL)
    square = rest * rest
    sin = rest + rest * square * (-1.6666654611e-1 + square * (8.3321608736e-3 - square * 1.9515295891e-4))
    cos = -1.388731625493765e-3 + square * 2.443315711809948e-5
    cos = 1.0 - 0.5 * square + square * square * (4.166664568298827e-2 + square * cos)
    odd = (quarter & 1) == 1
    cos, sin = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    # The sign bits: cosine is negative in the second and third quarter, sine in the third and fourth.
    cos_sign = ((quarter + 1) & 2) << 30
    sin_sign = (quarter & 2) << 30
    cos = (cos.to(tl.int32, bitcast=True) ^ cos_sign).to(tl.float32, bitcast=True)
    sin = (sin.to(tl.int32, bitcast=True) ^ sin_sign).to(tl.float32, bitcast=True)
    return cos, sin


@triton_kernel
def _sigreg_knot(k, knots, first_knot, step):
    """t, exp(-t^2/2) and the weight of one knot, as `sigreg_quadrature`; a table would come from the host each time."""
    t = first_knot + k * step
    phi = tl.exp(-0.5 * t * t)
    half = tl.where((k == 0) | (k == knots - 1), 0.5, 1.0)
    return t, phi, 2.0 * step * phi * half


@triton_kernel
def _sigreg_moments_kernel(
    z_ptr,
    terms_ptr,
    sums_ptr,
    samples,
    positions,
    projections,
    width,
    stride_n,
    stride_t,
    tiles_each,
    first_knot,
    step,
    KNOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Sums of cos(t p) and sin(t p) over one slice of the samples, at one position, for some projections."""
    position = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    knot = tl.arange(0, ROWS)
    cosines = tl.zeros((BLOCK_M, ROWS), tl.float32)
    sines = tl.zeros((BLOCK_M, ROWS), tl.float32)
    for tile in range(tiles_each):
        n = (tl.program_id(2) * tiles_each + tile) * BLOCK_N + tl.arange(0, BLOCK_N)
        z_here = z_ptr + position.to(tl.int64) * stride_t
        p = _sigreg_project(
            z_here, terms_ptr, n, m, samples, projections, width, stride_n, BLOCK_N, BLOCK_M, BLOCK_D, SPLIT, WIDEN
        )
        # Samples that are not there turn as nothing: cosine and sine 0 at every knot.
        here = tl.where(n < samples, 1.0, 0.0)[None, :]
        cos, sin = _sigreg_wave(p * first_knot)
        cos *= here
        sin *= here
        cos_step, sin_step = _sigreg_wave(p * step)
        for k in range(KNOTS):
            cosines += tl.where((knot == k)[None, :], tl.sum(cos, axis=1)[:, None], 0.0)
            sines += tl.where((knot == k)[None, :], tl.sum(sin, axis=1)[:, None], 0.0)
            turned = cos * cos_step - sin * sin_step
            sin = sin * cos_step + cos * sin_step
            cos = turned
    # (S, 2 K, T, M)
    row = (tl.program_id(2) * 2 * KNOTS + knot).to(tl.int64) * positions + position
    inside = (knot < KNOTS)[None, :] & (m < projections)[:, None]
    place = sums_ptr + (row * projections)[None, :] + m[:, None]
    tl.store(place, cosines, mask=inside)
    tl.store(place + KNOTS * positions * projections, sines, mask=inside)


@triton_kernel
def _sigreg_compare_kernel(
    moments_ptr,
    count_ptr,
    parts_ptr,
    numbers,
    knots,
    first_knot,
    step,
    BLOCK: tl.constexpr,
):
    """Sums to averages less the Gaussian's, in place, and the statistic's part of one block of T M."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    count = tl.load(count_ptr)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(knots):
        _, phi, weight = _sigreg_knot(k, knots, first_knot, step)
        cos_place = moments_ptr + k * numbers + at
        sin_place = moments_ptr + (knots + k) * numbers + at
        cos = tl.load(cos_place, mask=inside, other=0.0) / count - phi
        sin = tl.load(sin_place, mask=inside, other=0.0) / count
        tl.store(cos_place, cos, mask=inside)
        tl.store(sin_place, sin, mask=inside)
        total += weight * (cos * cos + sin * sin)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(tl.where(inside, total, 0.0), axis=0))


@triton_kernel
def _sigreg_gradient_kernel(
    z_ptr,
    terms_ptr,
    errors_ptr,
    scale_ptr,
    dp_ptr,
    samples,
    positions,
    projections,
    width,
    stride_n,
    stride_t,
    first_knot,
    step,
    KNOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """dp = scale * sum_k w_k t_k (sin error cos(t p) - cos error sin(t p)) of a tile at one position."""
    position = tl.program_id(1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    z_here = z_ptr + position.to(tl.int64) * stride_t
    p = _sigreg_project(
        z_here, terms_ptr, n, m, samples, projections, width, stride_n, BLOCK_N, BLOCK_M, BLOCK_D, SPLIT, WIDEN
    )
    cos, sin = _sigreg_wave(p * first_knot)
    cos_step, sin_step = _sigreg_wave(p * step)
    dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    errors = errors_ptr + position * projections + m
    for k in range(KNOTS):
        t, _, weight = _sigreg_knot(k, KNOTS, first_knot, step)
        by_sin = tl.load(errors + k * positions * projections, mask=m < projections, other=0.0) * (weight * t)
        by_cos = tl.load(errors + (KNOTS + k) * positions * projections, mask=m < projections, other=0.0) * (weight * t)
        dp += cos * by_cos[:, None] - sin * by_sin[:, None]
        turned = cos * cos_step - sin * sin_step
        sin = sin * cos_step + cos * sin_step
        cos = turned
    dp *= tl.load(scale_ptr)
    place = dp_ptr + ((n.to(tl.int64) * positions + position) * projections)[None, :] + m[:, None]
    tl.store(place, dp, mask=(n < samples)[None, :] & (m < projections)[:, None])


def sigreg_triton(
    z: Tensor,
    A_DM: Tensor,
    *,
    knots: int = 17,
    per_timestep: bool,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Mean over projections (and positions) of sum_k w_k |phi_hat(t_k) - phi(t_k)|^2, as `sigreg_torch`.

    Source, Args and Returns: as `sigreg_torch`; z is bfloat16 or float32, the result float32.
    Raises:
        ValueError: as `sigreg_torch`, or another dtype of z.
        RuntimeError: Triton is not installed.

    Numerics: as `sigreg_torch`; a projection of bfloat16 z is made with A as a sum of two bfloat16 numbers (relative
    error 2^-17), of float32 z as three TF32 products, which is as good as float32. The gradient's product with A^T is
    torch.matmul's (TF32 if that is allowed). Of N T M numbers only backward makes a tensor, of N T M K nobody. No
    atomics: equal runs give equal bits.
    """
    require_triton("sigreg_triton")
    sigreg_check_arguments(z, A_DM, per_timestep)
    if z.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"sigreg_triton: z is {z.dtype}, expected bfloat16 or float32; sigreg_torch takes others")
    z_NTD = z if per_timestep else z[:, None]
    return _SigregTriton.apply(z_NTD, A_DM.detach().float().contiguous(), knots, process_group)


class _SigregTriton(torch.autograd.Function):
    """The statistic of (N, T, D)."""

    @staticmethod
    def forward(ctx, z_NTD, A_DM, knots, process_group):
        z_NTD = z_NTD if z_NTD.stride(2) == 1 else z_NTD.contiguous()
        samples, positions, width = z_NTD.shape
        projections = A_DM.shape[1]
        t_K, _, _ = sigreg_quadrature(knots)
        first_knot, step = t_K[0], t_K[1] - t_K[0]
        tile = _sigreg_tile(z_NTD)
        blocks_m = -(-projections // tile["BLOCK_M"])
        # Enough slices of the samples to fill a GPU several times, each of whole tiles.
        tiles = -(-samples // tile["BLOCK_N"])
        tiles_each = max(1, tiles * blocks_m * positions // 2048)
        slices = -(-tiles // tiles_each)
        terms_XMD = torch.empty(
            2 if tile["SPLIT"] else 1, projections, width, dtype=z_NTD.dtype, device=z_NTD.device
        )
        block = 32 if tile["WIDEN"] else 64
        _sigreg_terms_kernel[(-(-width // block), -(-projections // block))](
            A_DM, terms_XMD, width, projections, SPLIT=tile["SPLIT"], BLOCK=block
        )
        sums_SFTM = A_DM.new_empty(slices, 2 * knots, positions, projections)
        _sigreg_moments_kernel[(blocks_m, positions, slices)](
            z_NTD,
            terms_XMD,
            sums_SFTM,
            samples,
            positions,
            projections,
            width,
            z_NTD.stride(0),
            z_NTD.stride(1),
            tiles_each,
            first_knot,
            step,
            KNOTS=knots,
            ROWS=triton.next_power_of_2(knots),
            **tile,
        )
        # One buffer, so that one all-reduce carries the sums and the count.
        buffer = A_DM.new_empty(sums_SFTM[0].numel() + 1)
        torch.sum(sums_SFTM, dim=0, out=buffer[:-1].view(sums_SFTM.shape[1:]))
        buffer[-1:].fill_(samples)
        ranks = 1
        if dist.is_available() and dist.is_initialized():
            ranks = dist.get_world_size(process_group)
            if ranks > 1:
                dist.all_reduce(buffer, group=process_group)
        numbers = positions * projections
        block = 1024
        parts = A_DM.new_empty(-(-numbers // block))
        _sigreg_compare_kernel[(parts.numel(),)](
            buffer, buffer[-1:], parts, numbers, knots, first_knot, step, BLOCK=block
        )
        ctx.save_for_backward(z_NTD, A_DM, terms_XMD, buffer)
        ctx.knots, ctx.ranks, ctx.tile = knots, ranks, tile
        return parts.sum() / numbers

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        z_NTD, A_DM, terms_XMD, buffer = ctx.saved_tensors
        samples, positions, width = z_NTD.shape
        projections, knots = A_DM.shape[1], ctx.knots
        t_K, _, _ = sigreg_quadrature(knots)
        # As in the torch form: times the ranks, because the caller averages over them what belongs to one sum.
        scale = dloss * (2.0 * ctx.ranks / (positions * projections)) / buffer[-1]
        dp_NTM = A_DM.new_empty(samples, positions, projections)
        tile = ctx.tile
        grid = (-(-projections // tile["BLOCK_M"]), positions, -(-samples // tile["BLOCK_N"]))
        _sigreg_gradient_kernel[grid](
            z_NTD,
            terms_XMD,
            buffer,
            scale,
            dp_NTM,
            samples,
            positions,
            projections,
            width,
            z_NTD.stride(0),
            z_NTD.stride(1),
            t_K[0],
            t_K[1] - t_K[0],
            KNOTS=knots,
            **tile,
        )
        return torch.matmul(dp_NTM, A_DM.t()).to(z_NTD.dtype), None, None, None


def _sigreg_tile(z_NTD: Tensor) -> dict[str, int | bool]:
    """Block sizes and options of a launch."""
    interpreted = kernel_is_interpreted(_sigreg_moments_kernel)
    small = z_NTD.shape[0] <= 16
    return {
        "BLOCK_N": 16 if small else 32 if interpreted else 64,
        "BLOCK_M": 32 if interpreted else 64,
        # Pooled, sums over many tiles wait in registers beside the waves: those of 64 would spill there.
        "BLOCK_D": 32 if interpreted or z_NTD.shape[1] == 1 or z_NTD.dtype == torch.float32 else 64,
        "SPLIT": z_NTD.dtype == torch.bfloat16,
        "WIDEN": interpreted,
        "num_warps": 4,
        "num_stages": 2,
    }
