"""Chunked state-space scan in plain torch operations, with a hand-written backward pass.

Letters: B batch, T time, H heads, P head width, G groups, R heads of a group (H/G), N state width, L chunk length, c number of
chunks, m = B*c chunks of the whole batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_chunk_length(length: int, chunk_size: int) -> int:
    """Length of the chunks that a sequence is cut into: `chunk_size`, or a little less where that saves padding.

    The result of the scan does not depend on it, so a sequence shorter than a chunk is one chunk, and the largest divisor of
    `length` in [chunk_size/2, chunk_size] is taken when there is one (500 = 10 * 50): then nothing has to be copied.

    Args:
        length: positions of the sequence, >= 1.
        chunk_size: wanted positions of a chunk, >= 1.
    Returns:
        positions of a chunk, in [1, chunk_size].
    """
    if length <= chunk_size:
        return length
    for candidate in range(chunk_size, (chunk_size - 1) // 2, -1):
        if length % candidate == 0:
            return candidate
    return chunk_size


def ssd_scan_torch(
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
    """Selective state-space scan S_t = exp(dt_t A) S_{t-1} + dt_t x_t (x) B_t, y_t = S_t C_t + D x_t.

    Source: Dao and Gu 2024, "Transformers are SSMs" (state space duality), section 6. Ours differs in that B and C stay shared
    by the heads of a group in every product between chunks (one wide matrix product instead of one a head), that a loop over
    heads keeps the L x L matrices in cache, and in the document resets.

    Args:
        x_BTHP: inputs; float64, float32, bfloat16 or float16.
        dt_BTH: step sizes, >= 0.
        A_H: decay rates, <= 0. Head h uses group h // (H/G).
        B_BTGN: input directions.
        C_BTGN: output directions.
        D_H: weight of the direct path, or None for none.
        initial_state_BHPN: state before position 0, belonging to the document of position 0; None for zeros.
        document_ids_BT: integers; the state restarts wherever the id differs from the one before. None for one document.
        chunk_size: positions that are worked on as one matrix product; changes speed, not the result.
    Returns:
        y_BTHP in the dtype of x, and final_state_BHPN in the accumulation dtype.
    Raises:
        ValueError: shapes do not fit together.

    Numerics: decays, sums of decays and states are float64 for float64 inputs and float32 otherwise. A decay between two
    positions is always exp of a difference of running sums taken inside one chunk, never a quotient of exponentials, so that
    arbitrarily strong decay underflows to zero and nothing overflows. The running sum is taken in a chunk only, which bounds
    its rounding by 6e-8 times the chunk's total of |dt A|. 16-bit inputs are multiplied as they are on CUDA, with float32
    results; on a CPU they are widened first. One backward pass is supported, not the derivative of it.
    """
    _ssd_check(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_state_BHPN, document_ids_BT, chunk_size)
    in_dtype = x_BTHP.dtype
    acc_dtype = torch.float64 if in_dtype == torch.float64 else torch.float32
    product_dtype = in_dtype if x_BTHP.is_cuda else acc_dtype
    x_BTHP, B_BTGN, C_BTGN = (t.to(product_dtype) for t in (x_BTHP, B_BTGN, C_BTGN))
    dt_BTH, A_H = dt_BTH.to(acc_dtype), A_H.to(acc_dtype)
    D_H = None if D_H is None else D_H.to(acc_dtype)
    state_BHPN = None if initial_state_BHPN is None else initial_state_BHPN.to(acc_dtype)
    length = x_BTHP.shape[1]
    if length == 1:
        y_BTHP, state_BHPN = _ssd_step(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN)
        return y_BTHP.to(in_dtype), state_BHPN

    run_BT = None if document_ids_BT is None else ssd_document_runs(document_ids_BT)
    chunk_length = ssd_chunk_length(length, chunk_size)
    padding = -length % chunk_length
    if padding:
        # dt = 0 neither decays nor adds: the state passes through the padding untouched.
        x_BTHP = F.pad(x_BTHP, (0, 0, 0, 0, 0, padding))
        dt_BTH = F.pad(dt_BTH, (0, 0, 0, padding))
        B_BTGN = F.pad(B_BTGN, (0, 0, 0, 0, 0, padding))
        C_BTGN = F.pad(C_BTGN, (0, 0, 0, 0, 0, padding))
        if run_BT is not None:
            run_BT = torch.cat([run_BT, run_BT[:, -1:].expand(-1, padding)], dim=1)
    y_BTHP, final_BHPN = _SsdScan.apply(
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN, run_BT, chunk_length
    )
    if padding:
        y_BTHP = y_BTHP[:, :length]
    return y_BTHP.to(in_dtype), final_BHPN


def ssd_document_runs(document_ids_BT: Tensor) -> Tensor:
    """Number of changes of document since position 0, so that equal numbers mean one unbroken document.

    Args:
        document_ids_BT: any integers; the same id may come back later for another document.
    Returns:
        int64 (B, T), 0 at position 0, not falling.
    """
    changed = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return F.pad(changed.to(torch.int64).cumsum(dim=1), (1, 0))


def _ssd_check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    documents: Tensor | None,
    chunk_size: int,
) -> None:
    """Raise ValueError for the first argument whose shape does not fit x and B."""
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError(f"ssd_scan: x is {tuple(x.shape)} and B {tuple(B.shape)}; expected (B,T,H,P) and (B,T,G,N)")
    batch, length, heads, width = x.shape
    groups, n = B.shape[2:]
    expected = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, length, groups, n)),
        "C": (C, (batch, length, groups, n)),
        "D": (D, (heads,)),
        "initial_state": (state, (batch, heads, width, n)),
        "document_ids": (documents, (batch, length)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"ssd_scan: {name} is {tuple(tensor.shape)}, expected {shape} for x {tuple(x.shape)}")
    if length < 1 or groups < 1 or heads % groups:
        raise ValueError(f"ssd_scan: {length} positions, {heads} heads, {groups} groups; expected T >= 1 and G dividing H")
    if chunk_size < 1:
        raise ValueError(f"ssd_scan: chunk_size is {chunk_size}, expected at least 1")


def _ssd_step(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, D_H: Tensor | None, state_BHPN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One position of the recurrence, as it is written; ordinary autograd differentiates it."""
    repeat = x_BTHP.shape[2] // B_BTGN.shape[2]
    dt_BH = dt_BTH[:, 0]
    x_BHP = x_BTHP[:, 0].to(dt_BH.dtype)
    B_BHN = B_BTGN[:, 0].to(dt_BH.dtype).repeat_interleave(repeat, dim=1)
    C_BHN = C_BTGN[:, 0].to(dt_BH.dtype).repeat_interleave(repeat, dim=1)
    added_BHPN = (dt_BH[..., None] * x_BHP)[..., None] * B_BHN[:, :, None]
    if state_BHPN is None:
        new_BHPN = added_BHPN
    else:
        new_BHPN = torch.addcmul(added_BHPN, torch.exp(dt_BH * A_H)[..., None, None], state_BHPN)
    y_BHP = torch.matmul(new_BHPN, C_BHN[..., None])[..., 0]
    if D_H is not None:
        y_BHP = y_BHP + D_H[:, None] * x_BHP
    return y_BHP[:, None], new_BHPN


def _ssd_bmm(left: Tensor, right: Tensor, product_dtype: torch.dtype, acc_dtype: torch.dtype) -> Tensor:
    """Batched matrix product of operands rounded to product_dtype, with a result in acc_dtype."""
    if product_dtype == acc_dtype:
        return torch.bmm(left, right)
    return torch.bmm(left.to(product_dtype), right.to(product_dtype), out_dtype=acc_dtype)


def _ssd_by_group(t_mLGK: Tensor) -> Tensor:
    """(m, L, G, K) as a batch of m*G matrices (L, K); a view for one group."""
    m, length, groups, width = t_mLGK.shape
    return t_mLGK.transpose(1, 2).reshape(m * groups, length, width)


def _ssd_from_groups(t_qLK: Tensor, groups: int) -> Tensor:
    """Inverse of `_ssd_by_group`: a batch of m*G matrices (L, K) to (m, L, G, K)."""
    q, length, width = t_qLK.shape
    return t_qLK.view(q // groups, groups, length, width).transpose(1, 2).contiguous()


def _ssd_decays(dt_BTH: Tensor, A_H: Tensor, run_BT: Tensor | None, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Running sums of dt*A inside chunks, and the three decays made of them.

    Returns:
        sums_mLH; from_state_mLH, what is left at a position of the state that enters its chunk; to_state_mLH, what is left at
        the chunk's end of what a position adds; carry_mH, what is left of a state across the chunk. Zero where a change of
        document lies between.
    """
    batch, length, heads = dt_BTH.shape
    count = length // chunk
    sums_mLH = (dt_BTH * A_H).view(batch * count, chunk, heads).cumsum(dim=1)
    from_state_mLH = torch.exp(sums_mLH)
    to_state_mLH = torch.exp(sums_mLH[:, -1:] - sums_mLH)
    if run_BT is not None:
        run_BcL = run_BT.view(batch, count, chunk)
        # The state entering a chunk belongs to the document of the position before it; the initial one to that of position 0.
        entering_Bc = F.pad(run_BcL[:, :-1, -1], (1, 0))
        from_state_mLH = from_state_mLH * (run_BcL == entering_Bc[..., None]).view(-1, chunk, 1)
        to_state_mLH = to_state_mLH * (run_BcL == run_BcL[..., -1:]).view(-1, chunk, 1)
    return sums_mLH, from_state_mLH, to_state_mLH, from_state_mLH[:, -1]


def _ssd_pair_decay(sums_mL: Tensor) -> Tensor:
    """exp(sums_i - sums_j) for j <= i and 0 above the diagonal, (m, L, L) for one head."""
    # exp may overflow above the diagonal, where the difference is positive; tril_ overwrites instead of multiplying.
    return torch.sub(sums_mL[:, :, None], sums_mL[:, None, :]).exp_().tril_()


def _ssd_pair_mask(run_BT: Tensor, chunk: int) -> Tensor:
    """Boolean (m, 1, L, L): both positions lie in the same document."""
    run_mL = run_BT.view(-1, chunk)
    return (run_mL[:, :, None] == run_mL[:, None, :])[:, None]


class _SsdScan(torch.autograd.Function):
    """The scan over a whole number of chunks. Saves the chunks' entering states and recomputes all L x L matrices."""

    @staticmethod
    def forward(ctx, x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN, run_BT, chunk):
        batch, length, heads, width = x_BTHP.shape
        groups, n = B_BTGN.shape[2:]
        per_group = heads // groups
        count = length // chunk
        m = batch * count
        acc, product = dt_BTH.dtype, x_BTHP.dtype

        x_BTHP, dt_BTH, B_BTGN, C_BTGN = (t.contiguous() for t in (x_BTHP, dt_BTH, B_BTGN, C_BTGN))
        x_mLHP = x_BTHP.view(m, chunk, heads, width)
        sums_mLH, from_state_mLH, to_state_mLH, carry_mH = _ssd_decays(dt_BTH, A_H, run_BT, chunk)
        B_qLN = _ssd_by_group(B_BTGN.view(m, chunk, groups, n))
        C_qLN = _ssd_by_group(C_BTGN.view(m, chunk, groups, n))

        # What every chunk adds to the state, the heads of a group side by side.
        dtx_mLHP = x_mLHP * dt_BTH.view(m, chunk, heads, 1)
        kept_qLK = _ssd_by_group((dtx_mLHP * to_state_mLH[..., None]).view(m, chunk, groups, per_group * width))
        added_qNK = _ssd_bmm(B_qLN.mT, kept_qLK, product, acc)
        added = added_qNK.view(batch, count, groups, n, per_group, width)

        # Sequentially from chunk to chunk: states[:, c] is the state that enters chunk c.
        carry = carry_mH.view(batch, count, groups, 1, per_group, 1)
        states = torch.empty_like(added)
        if state_BHPN is None:
            states[:, 0] = 0
        else:
            states[:, 0] = state_BHPN.view(batch, groups, per_group, width, n).permute(0, 1, 4, 2, 3)
        for c in range(count - 1):
            torch.addcmul(added[:, c], carry[:, c], states[:, c], out=states[:, c + 1])
        final = torch.addcmul(added[:, -1], carry[:, -1], states[:, -1])

        y_qLK = _ssd_bmm(C_qLN, states.view(m * groups, n, per_group * width), product, acc)
        y_mLHP = _ssd_from_groups(y_qLK, groups).view(m, chunk, heads, width).mul_(from_state_mLH[..., None])

        # Inside the chunks, head by head.
        score_mGLL = _ssd_bmm(C_qLN, B_qLN.mT, product, acc).view(m, groups, chunk, chunk)
        if run_BT is not None:
            score_mGLL.mul_(_ssd_pair_mask(run_BT, chunk))
        sums_HmL = sums_mLH.permute(2, 0, 1).contiguous()
        dtx_mLHP = dtx_mLHP.to(product)
        for h in range(heads):
            weight_mLL = _ssd_pair_decay(sums_HmL[h]).mul_(score_mGLL[:, h // per_group])
            y_mLHP[:, :, h] += _ssd_bmm(weight_mLL, dtx_mLHP[:, :, h], product, acc)
        if D_H is not None:
            y_mLHP.addcmul_(x_mLHP, D_H[:, None])

        y_BTHP = y_mLHP.view(batch, length, heads, width)
        final_BHPN = final.permute(0, 1, 3, 4, 2).reshape(batch, heads, width, n)
        ctx.save_for_backward(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, run_BT, states)
        ctx.chunk = chunk
        ctx.has_state = state_BHPN is not None
        return y_BTHP, final_BHPN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_BTHP, dfinal_BHPN):
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, run_BT, states = ctx.saved_tensors
        chunk = ctx.chunk
        batch, length, heads, width = x_BTHP.shape
        groups, n = B_BTGN.shape[2:]
        per_group = heads // groups
        count = length // chunk
        m = batch * count
        acc, product = dt_BTH.dtype, x_BTHP.dtype

        x_mLHP = x_BTHP.view(m, chunk, heads, width)
        dy_mLHP = dy_BTHP.contiguous().view(m, chunk, heads, width)
        dt_mLH = dt_BTH.view(m, chunk, heads)
        sums_mLH, from_state_mLH, to_state_mLH, carry_mH = _ssd_decays(dt_BTH, A_H, run_BT, chunk)
        B_qLN = _ssd_by_group(B_BTGN.view(m, chunk, groups, n))
        C_qLN = _ssd_by_group(C_BTGN.view(m, chunk, groups, n))

        # Gradients of the states, from the last chunk to the first: after the loop leaving[:, c] is that of the state after
        # chunk c, which is the state that enters chunk c + 1.
        seen_qLK = _ssd_by_group((dy_mLHP * from_state_mLH[..., None]).view(m, chunk, groups, per_group * width))
        entering = _ssd_bmm(C_qLN.mT, seen_qLK, product, acc).view(batch, count, groups, n, per_group, width)
        carry = carry_mH.view(batch, count, groups, 1, per_group, 1)
        leaving = torch.empty_like(entering)
        leaving[:, -1] = dfinal_BHPN.view(batch, groups, per_group, width, n).permute(0, 1, 4, 2, 3)
        for c in range(count - 1, 0, -1):
            torch.addcmul(entering[:, c], carry[:, c], leaving[:, c], out=leaving[:, c - 1])
        dstate_BHPN = None
        if ctx.has_state:
            first = torch.addcmul(entering[:, 0], carry[:, 0], leaving[:, 0])
            dstate_BHPN = first.permute(0, 1, 3, 4, 2).reshape(batch, heads, width, n)

        # Between chunks: B, C and the inputs through the states.
        states_qNK = states.view(m * groups, n, per_group * width)
        leaving_qNK = leaving.view(m * groups, n, per_group * width)
        dtx_mLHP = x_mLHP * dt_mLH[..., None]
        kept_qLK = _ssd_by_group((dtx_mLHP * to_state_mLH[..., None]).view(m, chunk, groups, per_group * width))
        dC_qLN = _ssd_bmm(seen_qLK, states_qNK.mT, product, acc)
        dB_qLN = _ssd_bmm(kept_qLK, leaving_qNK.mT, product, acc)
        ddtx_qLK = _ssd_bmm(B_qLN, leaving_qNK, product, acc)
        ddtx_mLHP = _ssd_from_groups(ddtx_qLK, groups).view(m, chunk, heads, width).mul_(to_state_mLH[..., None])

        # The exponent of every decay is the sum of dt*A over the positions between a writer and a reader. Its gradient is
        # collected position by position without subtracting what cancels: readers at or after it of the entering state,
        # writers before it into the leaving state, and the state that passes through the whole chunk.
        read_qLK = _ssd_bmm(C_qLN, states_qNK, product, acc)
        read_mLH = _ssd_from_groups(read_qLK.mul_(seen_qLK), groups).view(m, chunk, heads, width).sum(dim=-1)
        written_mLH = (ddtx_mLHP * dtx_mLHP).sum(dim=-1)
        through_mH = (leaving * states).sum(dim=(3, 5)).view(m, heads) * carry_mH
        dlog_mLH = written_mLH.cumsum(dim=1) - written_mLH + through_mH[:, None]

        # Inside the chunks.
        score_mGLL = _ssd_bmm(C_qLN, B_qLN.mT, product, acc).view(m, groups, chunk, chunk)
        mask_mGLL = None if run_BT is None else _ssd_pair_mask(run_BT, chunk)
        if mask_mGLL is not None:
            score_mGLL.mul_(mask_mGLL)
        dscore_mGLL = torch.zeros_like(score_mGLL)
        sums_HmL = sums_mLH.permute(2, 0, 1).contiguous()
        dtx_mLHP, dyp_mLHP = dtx_mLHP.to(product), dy_mLHP.to(product)
        for h in range(heads):
            g = h // per_group
            decay_mLL = _ssd_pair_decay(sums_HmL[h])
            dweight_mLL = _ssd_bmm(dyp_mLHP[:, :, h], dtx_mLHP[:, :, h].mT, product, acc)
            dweight_mLL.mul_(decay_mLL)
            dscore_mGLL[:, g] += dweight_mLL
            weight_mLL = decay_mLL.mul_(score_mGLL[:, g])
            ddtx_mLHP[:, :, h] += _ssd_bmm(weight_mLL.mT, dyp_mLHP[:, :, h], product, acc)
            # Between two positions of the chunk: plus at the reader, minus at the writer; a position by itself has no decay.
            dpair_mLL = dweight_mLL.mul_(score_mGLL[:, g])
            dpair_mLL.diagonal(dim1=1, dim2=2).zero_()
            read_mLH[:, :, h] += dpair_mLL.sum(dim=2) - dpair_mLL.sum(dim=1)
        if mask_mGLL is not None:
            dscore_mGLL.mul_(mask_mGLL)
        dscore_qLL = dscore_mGLL.view(m * groups, chunk, chunk)
        dC_qLN += _ssd_bmm(dscore_qLL, B_qLN, product, acc)
        dB_qLN += _ssd_bmm(dscore_qLL.mT, C_qLN, product, acc)

        dlog_mLH += read_mLH.flip(1).cumsum(dim=1).flip(1)
        ddt_mLH = (ddtx_mLHP * x_mLHP).sum(dim=-1).addcmul_(dlog_mLH, A_H)
        dA_H = (dlog_mLH * dt_mLH).sum(dim=(0, 1))
        dx_mLHP = ddtx_mLHP.mul_(dt_mLH[..., None])
        dD_H = None
        if D_H is not None:
            dD_H = (dy_mLHP * x_mLHP).sum(dim=(0, 1, 3))
            dx_mLHP.addcmul_(dy_mLHP, D_H[:, None])
        dB_BTGN = _ssd_from_groups(dB_qLN, groups).view(batch, length, groups, n).to(product)
        dC_BTGN = _ssd_from_groups(dC_qLN, groups).view(batch, length, groups, n).to(product)
        dx_BTHP = dx_mLHP.view(batch, length, heads, width).to(product)
        return dx_BTHP, ddt_mLH.view(batch, length, heads), dA_H, dB_BTGN, dC_BTGN, dD_H, dstate_BHPN, None, None
