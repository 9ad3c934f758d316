"""Chunked state-space scan as Triton kernels for NVIDIA GPUs (sm_90 first), forward and backward.

Letters: B batch, T time, H heads, P head width, G groups, N state width, L chunk length, c number of
chunks, s number of segments. In kernels: i the position that reads, j the position that writes, i >= j.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.ssd.torch_impl import _ssd_check
from common.triton_support import kernel_is_interpreted, nearest_bf16, require_triton, tl, triton, triton_kernel

# A sequence is cut into segments that run side by side when batch times heads alone are fewer programs than this. Each
# cut costs one more reading of x and B; 256 is about two programs for each of an H100's 132 multiprocessors.
SSD_TRITON_ENOUGH_PROGRAMS = 256


def ssd_scan_triton(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    D_H: Tensor | None = None,
    *,
    initial_state_BHPN: Tensor | None = None,
    document_ids_BT: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Selective state-space scan S_t = exp(dt_t A) S_{t-1} + dt_t x_t (x) B_t, y_t = S_t C_t + D x_t, on the GPU.

    Source: Dao and Gu 2024, "Transformers are SSMs" (state space duality), section 6. Ours differs from their kernels
    in that one program walks a sequence with the state in registers, so that x is read once and no state is written;
    in that backward recomputes the chunks' states instead of keeping them, sums the heads of a group without atomics
    and without partial results; and in the document resets.

    Args:
        x_BTHP: inputs; float32, bfloat16 or float16. Read in place if the last dimension is contiguous.
        dt_BTH: step sizes, >= 0.
        A_H: decay rates, <= 0. Head h uses group h // (H/G).
        B_BTGN: input directions.
        C_BTGN: output directions.
        D_H: weight of the direct path, or None for none.
        initial_state_BHPN: state before position 0, belonging to the document of position 0; None for zeros.
        document_ids_BT: integers; the state restarts wherever the id differs from the one before. None for one
            document.
        chunk_size: positions that are worked on as one matrix product, rounded to a power of two in [16, 64] (at most
            32 for large states, 16 for float32); changes speed, not the result.
    Returns:
        y_BTHP in the dtype of x, and final_state_BHPN in float32.
    Raises:
        ValueError: shapes do not fit together, or x is float64.

    Numerics: decays, running sums of dt*A (taken inside a chunk only) and states are float32; operands of matrix
    products are rounded to the dtype of x (float32 goes through three TF32 products) and summed in float32. A decay
    between two positions is exp2 of a difference of running sums; a step counts at most 200 in them, which bounds their
    rounding (a parallel running sum need not fall monotonically by the last bit). No atomics: results are the same bits
    in every run. One backward pass is supported, not the derivative of it.
    """
    require_triton("ssd_scan_triton")
    _ssd_check(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_state_BHPN, document_ids_BT, chunk_size)
    dtype = x_BTHP.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"ssd_scan_triton: x is {dtype}, expected float32, bfloat16 or float16; ssd_scan_torch takes any"
        )
    return _SsdScanTriton.apply(
        x_BTHP,
        dt_BTH.float(),
        A_H.float(),
        B_BTGN.to(dtype),
        C_BTGN.to(dtype),
        None if D_H is None else D_H.float(),
        None if initial_state_BHPN is None else initial_state_BHPN.float(),
        document_ids_BT,
        ssd_triton_chunk_length(x_BTHP.shape[1], chunk_size, _ssd_most(dtype, x_BTHP.shape[3], B_BTGN.shape[3])),
    )


def _ssd_most(dtype: torch.dtype, width: int, n: int) -> int:
    """Positions of a chunk at most: of more, pairs and states no longer fit into the backward pass's registers."""
    if dtype == torch.float32:
        return 16
    return 32 if max(width, 16) * max(n, 16) > 64 * 64 else 64


def ssd_triton_chunk_length(length: int, chunk_size: int, most: int) -> int:
    """The power of two in [16, most] nearest below chunk_size, or less if the sequence is shorter than a chunk.

    16 is the least that a tensor-core product takes.
    """
    wanted = min(max(chunk_size, 16), most)
    power = 1 << (wanted.bit_length() - 1)
    while power > 16 and power >= 2 * length:
        power //= 2
    return power


def ssd_triton_segment_length(length: int, chunk: int, programs: int) -> int:
    """Positions that one program walks through: all of them if `programs` (batch * heads) are enough by themselves.

    Returns:
        a multiple of `chunk`.
    """
    chunks = -(-length // chunk)
    segments = min(-(-SSD_TRITON_ENOUGH_PROGRAMS // programs), -(-chunks // 4))
    return -(-chunks // segments) * chunk


def ssd_triton_launch(kernel: str, dtype: torch.dtype, width: int, n: int) -> dict[str, Any]:
    """Warps and pipeline stages of a kernel ("scan", "states" or "gradient") for a head width and a state width."""
    if dtype == torch.float32:
        return {"num_warps": 8 if kernel == "gradient" else 4, "num_stages": 2}
    if _ssd_most(dtype, width, n) < 64:
        return {"num_warps": 4 if kernel == "states" else 8, "num_stages": 3 if kernel == "gradient" else 2}
    if kernel == "states":
        # Five blocks share a multiprocessor: 660 places on an H100, for the 640 programs of seed_bpe.
        return {"num_warps": 4, "num_stages": 2, "maxnreg": 96}
    return {"num_warps": 4, "num_stages": 3}


@triton_kernel
def _ssd_decays_kernel(
    dt_ptr, A_ptr, ids_ptr, sums_ptr, added_ptr, runs_ptr,
    length, chunks, heads, stride_dt_b, stride_dt_t, stride_ids_b,
    L: tl.constexpr, BLOCK_H: tl.constexpr, DOCUMENTS: tl.constexpr, LOGARITHMIC: tl.constexpr,
):  # fmt: skip
    """Of one chunk of some heads, in whole chunks of padded time: running sums of dt*rate, and what they say of dt.

    All other kernels read these: a running sum in each of them would put a dozen barriers before its first product. The
    second tensor is dt, or (LOGARITHMIC) the running sum less log2(dt), so that exp2 of a difference holds dt as well.
    runs counts the changes of document so far in the chunk. Positions outside of the sequence have dt = 0: they neither
    decay nor add.
    """
    b = (tl.program_id(0) // chunks).to(tl.int64)
    position_L = tl.program_id(0) % chunks * L + tl.arange(0, L)
    h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside_L = position_L < length
    exists_H = h_H < heads
    rate_H = tl.load(A_ptr + h_H, mask=exists_H, other=0.0) * 1.4426950408889634  # log2(e): exp2 is the GPU's own
    dt_HL = tl.load(
        dt_ptr + b * stride_dt_b + h_H[:, None] + position_L[None, :].to(tl.int64) * stride_dt_t,
        mask=exists_H[:, None] & inside_L[None, :], other=0.0,
    )  # fmt: skip
    # Below exp2(-150) a step leaves nothing in float32 anyway; the bound keeps the sums, and so their rounding, small.
    sums_HL = tl.cumsum(tl.maximum(dt_HL * rate_H[:, None], -200.0), 1)
    at_HL = ((b * heads + h_H) * chunks * L)[:, None] + position_L[None, :]
    tl.store(sums_ptr + at_HL, sums_HL, mask=exists_H[:, None])
    if LOGARITHMIC:
        dt_HL = sums_HL - tl.log2(dt_HL)  # dt = 0: infinite, and exp2 of less than that 0
    tl.store(added_ptr + at_HL, dt_HL, mask=exists_H[:, None])
    if DOCUMENTS:
        known_L = inside_L & (position_L > 0)
        here_L = tl.load(ids_ptr + b * stride_ids_b + position_L, mask=known_L, other=0)
        before_L = tl.load(ids_ptr + b * stride_ids_b + position_L - 1, mask=known_L, other=0)
        run_L = tl.cumsum((here_L != before_L).to(tl.int32), 0)
        # All programs of a chunk write the same numbers.
        tl.store(runs_ptr + b * chunks * L + position_L, run_L)


@triton_kernel
def _ssd_to_end(sums_L, added_L, total, run_L, last_run, DOCUMENTS: tl.constexpr, LOGARITHMIC: tl.constexpr):
    """dt times what is left at the chunk's end of what a position adds."""
    if LOGARITHMIC:
        kept_L = tl.exp2(total - added_L)
    else:
        kept_L = added_L * tl.exp2(total - sums_L)
    if DOCUMENTS:
        kept_L = tl.where(run_L == last_run, kept_L, 0.0)
    return kept_L


@triton_kernel
def _ssd_from_start(sums_L, run_L, DOCUMENTS: tl.constexpr):
    """What is left at a position of the state that enters the chunk."""
    decay_L = tl.exp2(sums_L)
    if DOCUMENTS:
        decay_L = tl.where(run_L == 0, decay_L, 0.0)
    return decay_L


@triton_kernel
def _ssd_through(total, last_run, DOCUMENTS: tl.constexpr):
    """What is left after the chunk of the state that enters it."""
    decay = tl.exp2(total)
    if DOCUMENTS:
        decay = tl.where(last_run == 0, decay, 0.0)
    return decay


@triton_kernel
def _ssd_load_rows(
    ptr, first, length, stride_t,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, L: tl.constexpr, EVEN: tl.constexpr,
    WIDEN: tl.constexpr, zero=0,
):  # fmt: skip
    """L positions of a tensor, zero outside of it, (L, BLOCK).

    zero: 0, but in a form that the compiler does not see through where it had better not keep the offsets in registers.
    """
    offset_L = tl.arange(0, L) + zero
    column_K = tl.arange(0, BLOCK)
    # int64: the offset inside a long sequence may pass 2^31 numbers.
    at_LK = ptr + tl.cast(first, tl.int64) * stride_t + (offset_L[:, None] * stride_t + column_K[None, :])
    if EVEN and WIDTH == BLOCK:
        value_LK = tl.load(at_LK)
    else:
        value_LK = tl.load(at_LK, mask=(first + offset_L < length)[:, None] & (column_K < WIDTH)[None, :], other=0.0)
    if WIDEN:
        value_LK = value_LK.to(tl.float32)
    return value_LK


@triton_kernel
def _ssd_store_rows(
    ptr, value_LK, first, length, stride_t,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, L: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr, zero=0,
):  # fmt: skip
    """The reverse of `_ssd_load_rows`."""
    offset_L = tl.arange(0, L) + zero
    column_K = tl.arange(0, BLOCK)
    at_LK = ptr + tl.cast(first, tl.int64) * stride_t + (offset_L[:, None] * stride_t + column_K[None, :])
    if WIDEN:
        value_LK = nearest_bf16(value_LK)
    value_LK = value_LK.to(ptr.dtype.element_ty)
    if EVEN and WIDTH == BLOCK:
        tl.store(at_LK, value_LK)
    else:
        tl.store(at_LK, value_LK, mask=(first + offset_L < length)[:, None] & (column_K < WIDTH)[None, :])


@triton_kernel
def _ssd_state_offsets(P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of a contiguous (P, N) state read as (N, P), and which of them exist."""
    row_N = tl.arange(0, BLOCK_N)
    column_P = tl.arange(0, BLOCK_P)
    return column_P[None, :] * N + row_N[:, None], (row_N < N)[:, None] & (column_P < P)[None, :]


@triton_kernel
def _ssd_kept_offsets(P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of a state between chunks, (N, P) in memory as in registers, and which of them exist."""
    row_N = tl.arange(0, BLOCK_N)
    column_P = tl.arange(0, BLOCK_P)
    return row_N[:, None] * P + column_P[None, :], (row_N < N)[:, None] & (column_P < P)[None, :]


@triton_kernel
def _ssd_scan_kernel(
    x_ptr, sums_ptr, added_ptr, B_ptr, C_ptr, D_ptr, runs_ptr, start_ptr, y_ptr, final_ptr,
    length, segment, segments, chunks, heads, per_group,
    stride_x_b, stride_x_t, stride_x_h, stride_B_b, stride_B_t, stride_B_g, stride_C_b, stride_C_t, stride_C_g,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, L: tl.constexpr,
    EVEN: tl.constexpr, DOCUMENTS: tl.constexpr, HAS_D: tl.constexpr, HAS_START: tl.constexpr,
    LOGARITHMIC: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y of one segment of one head, the state walking along in registers; the last segment writes the final state.

    Heads are the fastest index of the grid: those of a group read the same B and C at the same time, out of L2.
    """
    program = tl.program_id(0)
    h = program % heads
    part = (program // heads) % segments
    b = (program // heads // segments).to(tl.int64)
    g = h // per_group
    x_ptr += b * stride_x_b + h * stride_x_h
    y_ptr += (b * length * heads + h) * P
    B_ptr += b * stride_B_b + g * stride_B_g
    C_ptr += b * stride_C_b + g * stride_C_g
    sums_ptr += (b * heads + h) * chunks * L
    added_ptr += (b * heads + h) * chunks * L
    if DOCUMENTS:
        runs_ptr += b * chunks * L
    offset_L = tl.arange(0, L)
    run_L = tl.zeros([L], tl.int32)
    last_run = 0

    offset_NP, exists_NP = _ssd_state_offsets(P, N, BLOCK_P, BLOCK_N)
    state_NP = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if HAS_START:
        start_ptr += ((b * segments + part) * heads + h) * P * N
        state_NP = tl.load(start_ptr + offset_NP, mask=exists_NP, other=0.0)
    if HAS_D:
        direct = tl.load(D_ptr + h)

    for first in range(part * segment, tl.minimum(part * segment + segment, length), L):
        x_LP = _ssd_load_rows(x_ptr, first, length, stride_x_t, P, BLOCK_P, L, EVEN, WIDEN)
        B_LN = _ssd_load_rows(B_ptr, first, length, stride_B_t, N, BLOCK_N, L, EVEN, WIDEN)
        C_LN = _ssd_load_rows(C_ptr, first, length, stride_C_t, N, BLOCK_N, L, EVEN, WIDEN)
        sums_L = tl.load(sums_ptr + first + offset_L)
        added_L = tl.load(added_ptr + first + offset_L)
        total = tl.load(sums_ptr + first + L - 1)
        if DOCUMENTS:
            run_L = tl.load(runs_ptr + first + offset_L)
            last_run = tl.load(runs_ptr + first + L - 1)

        # From the state that enters the chunk. What the state needs comes first: B and x then leave their registers.
        y_LP = tl.dot(C_LN, state_NP.to(x_LP.dtype), input_precision=PRECISION)
        y_LP *= _ssd_from_start(sums_L, run_L, DOCUMENTS)[:, None]
        if HAS_D:
            y_LP += direct * x_LP.to(tl.float32)
        # The state that leaves it.
        kept_L = _ssd_to_end(sums_L, added_L, total, run_L, last_run, DOCUMENTS, LOGARITHMIC)
        kept_LN = (B_LN.to(tl.float32) * kept_L[:, None]).to(x_LP.dtype)
        state_NP *= _ssd_through(total, last_run, DOCUMENTS)
        state_NP = tl.dot(tl.trans(kept_LN), x_LP, state_NP, input_precision=PRECISION)
        # Inside the chunk.
        weight_LL = tl.dot(C_LN, tl.trans(B_LN), input_precision=PRECISION)
        if LOGARITHMIC:
            weight_LL *= tl.exp2(sums_L[:, None] - added_L[None, :])
        else:
            weight_LL *= tl.exp2(sums_L[:, None] - sums_L[None, :]) * added_L[None, :]
        # Zero, but not to the compiler, which would keep the mask of 4096 pairs in registers from chunk to chunk.
        row_L = offset_L + tl.minimum(first, 0)
        reaches_LL = row_L[:, None] >= offset_L[None, :]
        if DOCUMENTS:
            reaches_LL = reaches_LL & (run_L[:, None] == run_L[None, :])
        weight_LL = tl.where(reaches_LL, weight_LL, 0.0)
        y_LP = tl.dot(weight_LL.to(x_LP.dtype), x_LP, y_LP, input_precision=PRECISION)
        _ssd_store_rows(y_ptr, y_LP, first, length, heads * P, P, BLOCK_P, L, EVEN, WIDEN)

    if part == segments - 1:
        tl.store(final_ptr + (b * heads + h) * P * N + offset_NP, state_NP, mask=exists_NP)


@triton_kernel
def _ssd_states_kernel(
    u_ptr, v_ptr, sums_ptr, added_ptr, runs_ptr, start_ptr, states_ptr, end_ptr, decay_ptr,
    length, segment, segments, chunks, heads, per_group,
    stride_u_b, stride_u_t, stride_u_h, stride_v_b, stride_v_t, stride_v_g,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, L: tl.constexpr,
    EVEN: tl.constexpr, DOCUMENTS: tl.constexpr, HAS_START: tl.constexpr, REVERSE: tl.constexpr,
    SUMMARY: tl.constexpr, LOGARITHMIC: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The states between the chunks of one segment of one head.

    Forward, u = x and v = B: the state that enters each chunk. REVERSE, u = dy and v = C: the gradient of the state
    that leaves each chunk, from the last chunk to the first. Either way end receives what the walk ends with. SUMMARY:
    only that, and what is left across the whole segment of the state it started with.
    """
    program = tl.program_id(0)
    h = program % heads
    part = (program // heads) % segments
    b = (program // heads // segments).to(tl.int64)
    g = h // per_group
    u_ptr += b * stride_u_b + h * stride_u_h
    v_ptr += b * stride_v_b + g * stride_v_g
    sums_ptr += (b * heads + h) * chunks * L
    added_ptr += (b * heads + h) * chunks * L
    if DOCUMENTS:
        runs_ptr += b * chunks * L
    offset_L = tl.arange(0, L)
    run_L = tl.zeros([L], tl.int32)
    last_run = 0

    offset_NP, exists_NP = _ssd_state_offsets(P, N, BLOCK_P, BLOCK_N)
    kept_NP, _ = _ssd_kept_offsets(P, N, BLOCK_P, BLOCK_N)
    own = ((b * segments + part) * heads + h) * P * N
    state_NP = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if HAS_START:
        state_NP = tl.load(start_ptr + own + offset_NP, mask=exists_NP, other=0.0)
    begin = part * segment
    count = tl.cdiv(tl.minimum(segment, length - begin), L)
    left = 1.0
    for step in range(count):
        first = begin + step * L
        if REVERSE:
            first = begin + (count - 1 - step) * L
        if not SUMMARY:
            at = states_ptr + ((b * chunks + first // L) * heads + h) * P * N
            stored_NP = state_NP
            if WIDEN:
                stored_NP = nearest_bf16(stored_NP)
            tl.store(at + kept_NP, stored_NP.to(states_ptr.dtype.element_ty), mask=exists_NP)
        u_LP = _ssd_load_rows(u_ptr, first, length, stride_u_t, P, BLOCK_P, L, EVEN, WIDEN)
        v_LN = _ssd_load_rows(v_ptr, first, length, stride_v_t, N, BLOCK_N, L, EVEN, WIDEN)
        total = tl.load(sums_ptr + first + L - 1)
        if DOCUMENTS:
            run_L = tl.load(runs_ptr + first + offset_L)
            last_run = tl.load(runs_ptr + first + L - 1)
        sums_L = tl.load(sums_ptr + first + offset_L)
        if REVERSE:
            kept_L = _ssd_from_start(sums_L, run_L, DOCUMENTS)
        else:
            added_L = tl.load(added_ptr + first + offset_L)
            kept_L = _ssd_to_end(sums_L, added_L, total, run_L, last_run, DOCUMENTS, LOGARITHMIC)
        kept_LN = (v_LN.to(tl.float32) * kept_L[:, None]).to(u_LP.dtype)
        through = _ssd_through(total, last_run, DOCUMENTS)
        state_NP *= through
        left *= through
        state_NP = tl.dot(tl.trans(kept_LN), u_LP, state_NP, input_precision=PRECISION)
    tl.store(end_ptr + own + offset_NP, state_NP, mask=exists_NP)
    if SUMMARY:
        tl.store(decay_ptr + (b * segments + part) * heads + h, left)


@triton_kernel
def _ssd_join_kernel(
    ends_ptr, decay_ptr, initial_ptr, starts_ptr, segments, heads, size,
    HAS_INITIAL: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """States that the segments start with, from what each adds and leaves: one program a head and BLOCK numbers."""
    h = tl.program_id(0) % heads
    b = (tl.program_id(0) // heads).to(tl.int64)
    offset_K = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists_K = offset_K < size
    state_K = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        state_K = tl.load(initial_ptr + (b * heads + h) * size + offset_K, mask=exists_K, other=0.0)
    for step in range(segments):
        part = segments - 1 - step if REVERSE else step
        at = (b * segments + part) * heads + h
        tl.store(starts_ptr + at * size + offset_K, state_K, mask=exists_K)
        added_K = tl.load(ends_ptr + at * size + offset_K, mask=exists_K, other=0.0)
        state_K = tl.load(decay_ptr + at) * state_K + added_K


@triton_kernel
def _ssd_gradient_kernel(
    x_ptr, dt_ptr, sums_ptr, B_ptr, C_ptr, D_ptr, runs_ptr, dy_ptr, entering_ptr, leaving_ptr,
    dx_ptr, dB_ptr, dC_ptr, read_ptr, shares_ptr, through_ptr,
    length, chunks, heads, per_group, groups,
    stride_x_b, stride_x_t, stride_x_h, stride_dt_b, stride_dt_t,
    stride_B_b, stride_B_t, stride_B_g, stride_C_b, stride_C_t, stride_C_g,
    stride_dy_b, stride_dy_t, stride_dy_h,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, L: tl.constexpr,
    EVEN: tl.constexpr, DOCUMENTS: tl.constexpr, HAS_D: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dx, dB and dC of one chunk of one group: the heads one after the other, dB and dC summed over them in registers.

    Matrices of pairs have the writing position j in their rows and the reading one i in their columns, so that the
    product with dy takes them from registers as they are. What the gradients of dt, A and D are made of goes to memory
    as sums of rows or columns (`_ssd_decay_gradients_kernel`): running sums and sums over all threads would cost dozens
    of barriers a head here.
    """
    program = tl.program_id(0)
    g = program % groups
    chunk = (program // groups) % chunks
    b = (program // groups // chunks).to(tl.int64)
    first = chunk * L
    offset_L = tl.arange(0, L)
    x_ptr += b * stride_x_b
    dy_ptr += b * stride_dy_b
    dt_ptr += b * stride_dt_b
    run_L = tl.zeros([L], tl.int32)
    last_run = 0
    if DOCUMENTS:
        run_L = tl.load(runs_ptr + b * chunks * L + first + offset_L)
        last_run = tl.load(runs_ptr + b * chunks * L + first + L - 1)
    position_L = first + offset_L
    offset_NP, exists_NP = _ssd_kept_offsets(P, N, BLOCK_P, BLOCK_N)
    B_LN = _ssd_load_rows(
        B_ptr + b * stride_B_b + g * stride_B_g, first, length, stride_B_t, N, BLOCK_N, L, EVEN, WIDEN
    )
    C_LN = _ssd_load_rows(
        C_ptr + b * stride_C_b + g * stride_C_g, first, length, stride_C_t, N, BLOCK_N, L, EVEN, WIDEN
    )
    dB_LN = tl.zeros([L, BLOCK_N], tl.float32)
    dC_LN = tl.zeros([L, BLOCK_N], tl.float32)
    for h in range(g * per_group, (g + 1) * per_group):
        # h is never negative: zero, but not to the compiler, which would keep offsets and the masks of 4096 pairs in
        # registers from head to head.
        zero = tl.multiple_of(tl.minimum(h, 0), 16)
        x_LP = _ssd_load_rows(x_ptr + h * stride_x_h, first, length, stride_x_t, P, BLOCK_P, L, EVEN, WIDEN, zero)
        dy_LP = _ssd_load_rows(dy_ptr + h * stride_dy_h, first, length, stride_dy_t, P, BLOCK_P, L, EVEN, WIDEN, zero)
        partial = (b * chunks + chunk) * heads + h
        at = partial * P * N
        if P == BLOCK_P and N == BLOCK_N:
            entering_NP = tl.load(entering_ptr + at + (offset_NP + zero))
            leaving_NP = tl.load(leaving_ptr + at + (offset_NP + zero))
        else:
            entering_NP = tl.load(entering_ptr + at + offset_NP, mask=exists_NP, other=0.0)
            leaving_NP = tl.load(leaving_ptr + at + offset_NP, mask=exists_NP, other=0.0)
        if WIDEN:
            entering_NP, leaving_NP = entering_NP.to(tl.float32), leaving_NP.to(tl.float32)
        dt_L = tl.load(dt_ptr + h + position_L * stride_dt_t, mask=position_L < length, other=0.0)
        own = ((b * heads + h) * chunks + chunk) * L
        sums_L = tl.load(sums_ptr + own + offset_L)
        total = tl.load(sums_ptr + own + L - 1)
        from_start_L = _ssd_from_start(sums_L, run_L, DOCUMENTS)
        to_end_L = tl.exp2(total - sums_L)
        if DOCUMENTS:
            to_end_L = tl.where(run_L == last_run, to_end_L, 0.0)

        through_N = tl.sum(entering_NP.to(tl.float32) * leaving_NP.to(tl.float32), 1)
        through_N *= _ssd_through(total, last_run, DOCUMENTS)
        tl.store(through_ptr + partial * BLOCK_N + tl.arange(0, BLOCK_N), through_N)

        # From the state that enters the chunk.
        dy_wide_LP = dy_LP.to(tl.float32)
        seen_LP = dy_wide_LP * from_start_L[:, None]
        carried_L = tl.sum(tl.dot(C_LN, entering_NP, input_precision=PRECISION) * seen_LP, 1)
        dC_LN = tl.dot(seen_LP.to(x_LP.dtype), tl.trans(entering_NP), dC_LN, input_precision=PRECISION)
        # Into the state that leaves it.
        x_wide_LP = x_LP.to(tl.float32)
        dx_LP = tl.dot(B_LN, leaving_NP, input_precision=PRECISION) * to_end_L[:, None]
        written_L = tl.sum(dx_LP * x_wide_LP, 1)
        kept_LP = (x_wide_LP * (dt_L * to_end_L)[:, None]).to(x_LP.dtype)
        dB_LN = tl.dot(kept_LP, tl.trans(leaving_NP), dB_LN, input_precision=PRECISION)
        dx_LP *= dt_L[:, None]
        if HAS_D:
            dx_LP += dy_wide_LP * tl.load(D_ptr + h)
        # Inside the chunk. dx comes last: a product whose sum the next head goes on with would be left running across
        # the loop's end, and then ptxas has all products wait for one another.
        row_L = offset_L + zero
        reaches_LL = row_L[:, None] <= offset_L[None, :]
        if DOCUMENTS:
            reaches_LL = reaches_LL & (run_L[:, None] == run_L[None, :])
        decay_LL = tl.where(reaches_LL, tl.exp2(sums_L[None, :] - sums_L[:, None]), 0.0)
        weight_LL = tl.dot(B_LN, tl.trans(C_LN), input_precision=PRECISION)
        raw_LL = tl.dot(x_LP, tl.trans(dy_LP), input_precision=PRECISION)
        same_LL = row_L[:, None] == offset_L[None, :]
        trace_L = tl.sum(tl.where(same_LL, raw_LL, 0.0), 1)
        raw_LL *= decay_LL
        exchange_LL = (raw_LL * dt_L[:, None]).to(x_LP.dtype)
        dB_LN = tl.dot(exchange_LL, C_LN, dB_LN, input_precision=PRECISION)
        dC_LN = tl.dot(tl.trans(exchange_LL), B_LN, dC_LN, input_precision=PRECISION)
        raw_LL *= weight_LL
        weight_LL = (weight_LL * decay_LL * dt_L[:, None]).to(x_LP.dtype)
        direct_L = tl.sum(raw_LL, 1) + written_L
        raw_LL = tl.where(same_LL, 0.0, raw_LL) * dt_L[:, None]
        tl.store(read_ptr + own + offset_L, tl.sum(raw_LL, 0))
        # One store, net reading, writing into the state, direct, trace: a join's own index is the fastest.
        net_L2 = tl.join(carried_L - tl.sum(raw_LL, 1), direct_L)
        shares_L4 = tl.join(net_L2, tl.join(written_L * dt_L, trace_L)).reshape((L, 4))
        tl.store(shares_ptr + (own + offset_L)[:, None] * 4 + tl.arange(0, 4)[None, :], shares_L4)
        dx_LP = tl.dot(weight_LL, dy_LP, dx_LP, input_precision=PRECISION)
        _ssd_store_rows(
            dx_ptr + (b * length * heads + h) * P, dx_LP, first, length, heads * P, P, BLOCK_P, L, EVEN, WIDEN, zero
        )
    row = (b * length * groups + g) * N
    _ssd_store_rows(dB_ptr + row, dB_LN, first, length, groups * N, N, BLOCK_N, L, EVEN, WIDEN)
    _ssd_store_rows(dC_ptr + row, dC_LN, first, length, groups * N, N, BLOCK_N, L, EVEN, WIDEN)


@triton_kernel
def _ssd_decay_gradients_kernel(
    dt_ptr, A_ptr, read_ptr, shares_ptr, through_ptr, ddt_ptr, dA_ptr, dD_ptr,
    length, chunks, heads, stride_dt_b, stride_dt_t,
    L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, HAS_D: tl.constexpr,
):  # fmt: skip
    """Gradients of dt, and a chunk's share of those of A and D, of one chunk of some heads.

    The gradient of a step's dt*A is the sum over all writers before it and readers from it on of what they exchange:
    inside the chunk, from the state that enters it, into the one that leaves it, and through it whole. Every term is an
    exchange between different positions (README.md): nothing is subtracted that had to cancel.
    """
    b = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    exists_H = h_H < heads
    position_L = chunk * L + tl.arange(0, L)
    exists_HL = exists_H[:, None] & (position_L < length)[None, :]
    own_HL = ((b * heads + h_H) * chunks * L)[:, None] + position_L[None, :]
    read_HL = tl.load(read_ptr + own_HL, mask=exists_H[:, None], other=0.0)
    shares_HL4 = tl.load(
        shares_ptr + own_HL[:, :, None] * 4 + tl.arange(0, 4)[None, None, :], mask=exists_H[:, None, None], other=0.0
    )
    even_HL2, odd_HL2 = shares_HL4.reshape((BLOCK_H, L, 2, 2)).split()
    net_HL, direct_HL = even_HL2.split()
    written_HL, trace_HL = odd_HL2.split()
    partial_H = (b * chunks + chunk) * heads + h_H
    at_HN = partial_H[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    through_H = tl.sum(tl.load(through_ptr + at_HN, mask=exists_H[:, None], other=0.0), 1)
    dlog_HL = tl.cumsum(read_HL + net_HL, 1, reverse=True) + tl.cumsum(written_HL, 1) - written_HL
    dlog_HL += through_H[:, None]
    step_HL = position_L[None, :].to(tl.int64) * stride_dt_t + h_H[:, None]
    dt_HL = tl.load(dt_ptr + b * stride_dt_b + step_HL, mask=exists_HL, other=0.0)
    tl.store(dA_ptr + partial_H, tl.sum(dlog_HL * dt_HL, 1), mask=exists_H)
    A_H = tl.load(A_ptr + h_H, mask=exists_H, other=0.0)
    at_HL = (b * length + position_L)[None, :] * heads + h_H[:, None]
    tl.store(ddt_ptr + at_HL, direct_HL + dlog_HL * A_H[:, None], mask=exists_HL)
    if HAS_D:
        tl.store(dD_ptr + partial_H, tl.sum(trace_HL, 1), mask=exists_H)


class _SsdScanTriton(torch.autograd.Function):
    """The scan; saves its inputs only."""

    @staticmethod
    def forward(ctx, x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_BHPN, ids_BT, chunk):
        x_BTHP, B_BTGN, C_BTGN = (_ssd_unit_stride(t) for t in (x_BTHP, B_BTGN, C_BTGN))
        dt_BTH, ids_BT = _ssd_unit_stride(dt_BTH), None if ids_BT is None else _ssd_unit_stride(ids_BT)
        A_H, D_H = A_H.contiguous(), None if D_H is None else D_H.contiguous()
        initial_BHPN = None if initial_BHPN is None else initial_BHPN.contiguous()
        batch, length, heads, width = x_BTHP.shape
        groups, n = B_BTGN.shape[2:]
        segment = ssd_triton_segment_length(length, chunk, batch * heads)
        segments = triton.cdiv(length, segment)
        decays = _ssd_triton_decays(dt_BTH, A_H, ids_BT, chunk, x_BTHP.dtype)
        starts = initial_BHPN
        if segments > 1:
            starts = _ssd_segment_starts(x_BTHP, B_BTGN, decays, initial_BHPN, chunk, segment, reverse=False)
        y_BTHP = x_BTHP.new_empty(batch, length, heads, width)
        final_BHPN = dt_BTH.new_empty(batch, heads, width, n)
        _ssd_scan_kernel[(batch * segments * heads,)](
            x_BTHP, decays[0], decays[1], B_BTGN, C_BTGN, D_H, decays[2], starts, y_BTHP, final_BHPN,
            length, segment, segments, triton.cdiv(length, chunk), heads, heads // groups,
            *x_BTHP.stride()[:3], *B_BTGN.stride()[:3], *C_BTGN.stride()[:3],
            HAS_D=D_H is not None, HAS_START=starts is not None, LOGARITHMIC=_ssd_logarithmic(x_BTHP.dtype),
            **_ssd_constants("scan", x_BTHP, n, decays, chunk),
        )  # fmt: skip
        ctx.save_for_backward(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_BHPN, *decays)
        ctx.chunk = chunk
        return y_BTHP, final_BHPN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_BTHP, dfinal_BHPN):
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_BHPN, *decays = ctx.saved_tensors
        chunk = ctx.chunk
        batch, length, heads = dt_BTH.shape
        groups, n = B_BTGN.shape[2:]
        chunks = triton.cdiv(length, chunk)
        dy_BTHP, dfinal_BHPN = _ssd_unit_stride(dy_BTHP), dfinal_BHPN.contiguous()
        entering, _ = _ssd_chunk_states(x_BTHP, B_BTGN, decays, initial_BHPN, chunk, reverse=False)
        leaving, dinitial_BHPN = _ssd_chunk_states(dy_BTHP, C_BTGN, decays, dfinal_BHPN, chunk, reverse=True)
        dx_BTHP, ddt_BTH = x_BTHP.new_empty(x_BTHP.shape), dt_BTH.new_empty(dt_BTH.shape)
        dB_BTGN, dC_BTGN = B_BTGN.new_empty(B_BTGN.shape), C_BTGN.new_empty(C_BTGN.shape)
        dA_BcH = dt_BTH.new_empty(batch, chunks, heads)
        dD_BcH = None if D_H is None else dt_BTH.new_empty(batch, chunks, heads)
        read_BHT, shares_BHT4 = torch.empty_like(decays[0]), decays[0].new_empty(*decays[0].shape, 4)
        constants = _ssd_constants("gradient", x_BTHP, n, decays, chunk)
        through_BcHN = dt_BTH.new_empty(batch, chunks, heads, constants["BLOCK_N"])
        _ssd_gradient_kernel[(batch * chunks * groups,)](
            x_BTHP, dt_BTH, decays[0], B_BTGN, C_BTGN, D_H, decays[2], dy_BTHP, entering, leaving,
            dx_BTHP, dB_BTGN, dC_BTGN, read_BHT, shares_BHT4, through_BcHN,
            length, chunks, heads, heads // groups, groups,
            *x_BTHP.stride()[:3], *dt_BTH.stride()[:2], *B_BTGN.stride()[:3], *C_BTGN.stride()[:3],
            *dy_BTHP.stride()[:3],
            HAS_D=D_H is not None, **constants,
        )  # fmt: skip
        block = _ssd_heads_block(heads)
        _ssd_decay_gradients_kernel[(batch * chunks, triton.cdiv(heads, block))](
            dt_BTH, A_H, read_BHT, shares_BHT4, through_BcHN, ddt_BTH, dA_BcH, dD_BcH,
            length, chunks, heads, *dt_BTH.stride()[:2],
            L=chunk, BLOCK_N=constants["BLOCK_N"], BLOCK_H=block, HAS_D=D_H is not None, num_warps=4,
        )  # fmt: skip
        dA_H = dA_BcH.sum(dim=(0, 1))
        dD_H = None if dD_BcH is None else dD_BcH.sum(dim=(0, 1))
        dinitial_BHPN = None if initial_BHPN is None else dinitial_BHPN
        return dx_BTHP, ddt_BTH, dA_H, dB_BTGN, dC_BTGN, dD_H, dinitial_BHPN, None, None


def _ssd_unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, as the kernels take it; else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _ssd_heads_block(heads: int) -> int:
    """Heads that a program works on at once in kernels over dt, whose last dimension they are."""
    return min(16, 1 << (heads - 1).bit_length())


def _ssd_logarithmic(dtype: torch.dtype) -> bool:
    """Whether dt enters as an exponent. That saves registers, and its rounding is far below that of 16 bits."""
    return dtype != torch.float32


def _ssd_triton_decays(
    dt_BTH: Tensor, A_H: Tensor, ids_BT: Tensor | None, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Running sums, dt beside them (both (B, H, c L) in float32), and changes of document (B, c L); for all kernels."""
    batch, length, heads = dt_BTH.shape
    chunks = -(-length // chunk)
    sums_BHT = dt_BTH.new_empty(batch, heads, chunks * chunk)
    added_BHT = torch.empty_like(sums_BHT)
    runs_BT = None if ids_BT is None else dt_BTH.new_empty(batch, chunks * chunk, dtype=torch.int32)
    block = _ssd_heads_block(heads)
    _ssd_decays_kernel[(batch * chunks, triton.cdiv(heads, block))](
        dt_BTH, A_H, ids_BT, sums_BHT, added_BHT, runs_BT, length, chunks, heads,
        *dt_BTH.stride()[:2], 0 if ids_BT is None else ids_BT.stride(0),
        L=chunk, BLOCK_H=block, DOCUMENTS=ids_BT is not None, LOGARITHMIC=_ssd_logarithmic(dtype), num_warps=4,
    )  # fmt: skip
    return sums_BHT, added_BHT, runs_BT


def _ssd_constants(kernel: str, x_BTHP: Tensor, n: int, decays: Sequence[Tensor | None], chunk: int) -> dict[str, Any]:
    """What the three large kernels are compiled for."""
    width = x_BTHP.shape[3]
    return {
        "P": width,
        "N": n,
        "BLOCK_P": max(16, triton.next_power_of_2(width)),
        "BLOCK_N": max(16, triton.next_power_of_2(n)),
        "L": chunk,
        "EVEN": x_BTHP.shape[1] % chunk == 0,
        "DOCUMENTS": decays[2] is not None,
        "WIDEN": kernel_is_interpreted(_ssd_scan_kernel) and x_BTHP.dtype == torch.bfloat16,
        "PRECISION": "tf32x3" if x_BTHP.dtype == torch.float32 else "tf32",
        **ssd_triton_launch(kernel, x_BTHP.dtype, width, n),
    }


def _ssd_walk(u, v, decays, starts, states, ends, lefts, chunk, segment, reverse) -> None:
    """Launch `_ssd_states_kernel`; states None for the summary of each segment."""
    batch, length, heads, _ = u.shape
    segments = ends.shape[1]
    _ssd_states_kernel[(batch * segments * heads,)](
        u, v, *decays, starts, states, ends, lefts,
        length, segment, segments, triton.cdiv(length, chunk), heads, heads // v.shape[2],
        *u.stride()[:3], *v.stride()[:3],
        HAS_START=starts is not None, REVERSE=reverse, SUMMARY=states is None, LOGARITHMIC=_ssd_logarithmic(u.dtype),
        **_ssd_constants("states", u, v.shape[3], decays, chunk),
    )  # fmt: skip


def _ssd_segment_starts(u, v, decays, initial_BHPN, chunk, segment, reverse) -> Tensor:
    """States (B, s, H, P, N) that the segments start from (reverse: gradients that they end with)."""
    batch, length, heads, width = u.shape
    segments = triton.cdiv(length, segment)
    ends = decays[0].new_empty(batch, segments, heads, width, v.shape[3])
    lefts = decays[0].new_empty(batch, segments, heads)
    _ssd_walk(u, v, decays, None, None, ends, lefts, chunk, segment, reverse)
    starts = torch.empty_like(ends)
    size = width * v.shape[3]
    _ssd_join_kernel[(batch * heads, triton.cdiv(size, 512))](
        ends, lefts, initial_BHPN, starts, segments, heads, size,
        HAS_INITIAL=initial_BHPN is not None, REVERSE=reverse, BLOCK=512, num_warps=4,
    )  # fmt: skip
    return starts


def _ssd_chunk_states(u, v, decays, initial_BHPN, chunk, reverse) -> tuple[Tensor, Tensor]:
    """States between the chunks, and that after the last (reverse: before the first): (B, c, H, N, P) and (B, H, P, N).

    The former are in the dtype of u: the kernels use a state as an operand of a product only, and keep it in the dtype
    that it would be rounded to.
    """
    batch, length, heads, width = u.shape
    n = v.shape[3]
    chunks = triton.cdiv(length, chunk)
    segment = ssd_triton_segment_length(length, chunk, batch * heads)
    segments = triton.cdiv(length, segment)
    starts = initial_BHPN
    if segments > 1:
        starts = _ssd_segment_starts(u, v, decays, initial_BHPN, chunk, segment, reverse)
    states = u.new_empty(batch, chunks, heads, n, width)
    ends = decays[0].new_empty(batch, segments, heads, width, n)
    _ssd_walk(u, v, decays, starts, states, ends, None, chunk, segment, reverse)
    return states, ends[:, 0 if reverse else -1]
