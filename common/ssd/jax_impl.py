"""Chunked state-space scan in JAX, compiled by XLA.

Letters: B batch, T time, H heads, P head width, G groups, R heads of a group (H/G), N state width, L chunk length, c
number of chunks.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def ssd_scan_jax(
    x_BTHP: Array,
    dt_BTH: Array,
    A_H: Array,
    B_BTGN: Array,
    C_BTGN: Array,
    D_H: Array | None = None,
    *,
    initial_state_BHPN: Array | None = None,
    document_ids_BT: Array | None = None,
    chunk_size: int = 64,
) -> tuple[Array, Array]:
    """Selective state-space scan S_t = exp(dt_t A) S_{t-1} + dt_t x_t (x) B_t, y_t = S_t C_t + D x_t.

    Source: Dao and Gu 2024, "Transformers are SSMs" (state space duality), section 6, as one `lax.scan` over chunks
    whose body is rematerialised: backward keeps the states between the chunks and computes all L x L matrices again.

    Args:
        x_BTHP: inputs; any floating dtype.
        dt_BTH: step sizes, >= 0.
        A_H: decay rates, <= 0. Head h uses group h // (H/G).
        B_BTGN: input directions.
        C_BTGN: output directions.
        D_H: weight of the direct path, or None for none.
        initial_state_BHPN: state before position 0, belonging to the document of position 0; None for zeros.
        document_ids_BT: integers; the state restarts wherever the id differs from the one before. None for one
            document.
        chunk_size: positions that are worked on as one matrix product; changes speed, not the result. Static.
    Returns:
        y_BTHP in the dtype of x, and final_state_BHPN in the accumulation dtype.
    Raises:
        ValueError: shapes do not fit together.

    Numerics: decays, running sums and states are float64 for float64 inputs and float32 otherwise; operands of matrix
    products are rounded to the dtype of x and summed in the accumulation dtype. float32 products run at the highest
    precision of the device. A decay is exp of a difference of running sums inside one chunk, so nothing overflows; a
    position's exchange with itself is a constant 1, so the gradient of the decays subtracts nothing that had to cancel.
    """
    _ssd_jax_check(
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, initial_state_BHPN, document_ids_BT, chunk_size
    )
    dtype = x_BTHP.dtype
    acc = jnp.float64 if dtype == jnp.float64 else jnp.float32
    batch, length, heads, width = x_BTHP.shape
    groups, n = B_BTGN.shape[2:]
    chunk = min(chunk_size, length)
    count = -(-length // chunk)

    def by_chunk(array: Array) -> Array:
        """(B, T, ...) -> (c, B, L, ...), zeros behind the end: dt = 0 neither decays nor adds."""
        padding = [(0, 0), (0, count * chunk - length)] + [(0, 0)] * (array.ndim - 2)
        padded = jnp.pad(array, padding)
        return jnp.moveaxis(padded.reshape(batch, count, chunk, *array.shape[2:]), 1, 0)

    changed_BT = jnp.zeros((batch, length), jnp.int32)
    if document_ids_BT is not None:
        changed_BT = changed_BT.at[:, 1:].set(document_ids_BT[:, 1:] != document_ids_BT[:, :-1])
    grouped = (batch, length, groups, heads // groups)
    xs = (
        by_chunk(x_BTHP.reshape(*grouped, width)),
        by_chunk(dt_BTH.astype(acc).reshape(grouped)),
        by_chunk(B_BTGN.astype(dtype)),
        by_chunk(C_BTGN.astype(dtype)),
        by_chunk(changed_BT),
    )
    A_GR = A_H.astype(acc).reshape(groups, heads // groups)
    D_GR = None if D_H is None else D_H.astype(acc).reshape(groups, heads // groups)
    if initial_state_BHPN is None:
        state_BGRPN = jnp.zeros((batch, groups, heads // groups, width, n), acc)
    else:
        state_BGRPN = initial_state_BHPN.astype(acc).reshape(batch, groups, heads // groups, width, n)
    step = jax.checkpoint(partial(_ssd_jax_chunk, A_GR, D_GR))
    final_BGRPN, y_cBLGRP = jax.lax.scan(step, state_BGRPN, xs)
    y_BTHP = jnp.moveaxis(y_cBLGRP, 0, 1).reshape(batch, count * chunk, heads, width)[:, :length]
    return y_BTHP, final_BGRPN.reshape(batch, heads, width, n)


def _ssd_jax_chunk(
    A_GR: Array, D_GR: Array | None, state_BGRPN: Array, chunk: tuple[Array, ...]
) -> tuple[Array, Array]:
    """One chunk: the state that leaves it and its outputs in the dtype of x."""
    x_BLGRP, dt_BLGR, B_BLGN, C_BLGN, changed_BL = chunk
    dtype, acc = x_BLGRP.dtype, dt_BLGR.dtype
    product = partial(jnp.einsum, preferred_element_type=acc, precision=jax.lax.Precision.HIGHEST)
    log_BLGR = dt_BLGR * A_GR
    sums_BLGR = jnp.cumsum(log_BLGR, axis=1)
    # Summed from behind by itself: as a difference of the sums above, its gradient would cancel.
    later_BLGR = jnp.pad(log_BLGR[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    later_BLGR = jax.lax.cumsum(later_BLGR, axis=1, reverse=True)
    run_BL = jnp.cumsum(changed_BL, axis=1)
    positions_L = jnp.arange(run_BL.shape[1])
    below_LL = positions_L[:, None] > positions_L[None, :]
    earlier_BLL = below_LL & (run_BL[:, :, None] == run_BL[:, None, :])
    # Masked before exp, so that neither value nor gradient meets an overflow; on the diagonal a constant.
    exponent_BLLGR = jnp.where(
        earlier_BLL[..., None, None], sums_BLGR[:, :, None] - sums_BLGR[:, None, :], -jnp.inf
    )
    itself_LL = positions_L[:, None] == positions_L[None, :]
    decay_BLLGR = jnp.where(itself_LL[None, :, :, None, None], 1.0, jnp.exp(exponent_BLLGR))
    from_start_BLGR = jnp.exp(sums_BLGR) * (run_BL == 0)[..., None, None]
    to_end_BLGR = jnp.exp(later_BLGR) * (run_BL == run_BL[:, -1:])[..., None, None]

    score_BLLG = product("bign,bjgn->bijg", C_BLGN, B_BLGN)
    weight_BLLGR = score_BLLG[..., None] * decay_BLLGR
    dtx_BLGRP = x_BLGRP * dt_BLGR[..., None]
    y_BLGRP = product("bijgr,bjgrp->bigrp", weight_BLLGR.astype(dtype), dtx_BLGRP.astype(dtype))
    inside = product("bign,bgrpn->bigrp", C_BLGN, state_BGRPN.astype(dtype))
    y_BLGRP = y_BLGRP + inside * from_start_BLGR[..., None]
    if D_GR is not None:
        y_BLGRP = y_BLGRP + D_GR[..., None] * x_BLGRP
    kept_BLGRP = (dtx_BLGRP * to_end_BLGR[..., None]).astype(dtype)
    added_BGRPN = product("bjgrp,bjgn->bgrpn", kept_BLGRP, B_BLGN)
    left_BGR = from_start_BLGR[:, -1]
    return left_BGR[..., None, None] * state_BGRPN + added_BGRPN, y_BLGRP.astype(dtype)


def _ssd_jax_check(x, dt, A, B, C, D, state, documents, chunk_size) -> None:
    """Raise ValueError for the first argument whose shape does not fit x and B."""
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(f"ssd_scan: x is {x.shape} and B {B.shape}; expected (B,T,H,P) and (B,T,G,N)")
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
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"ssd_scan: {name} is {array.shape}, expected {shape} for x {x.shape}")
    if length < 1 or groups < 1 or heads % groups:
        raise ValueError(
            f"ssd_scan: {length} positions, {heads} heads, {groups} groups; expected T >= 1 and G dividing H"
        )
    if chunk_size < 1:
        raise ValueError(f"ssd_scan: chunk_size is {chunk_size}, expected at least 1")
