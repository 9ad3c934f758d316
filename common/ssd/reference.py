"""The state-space scan as its recurrence, position by position, in float64: the definition that every backend is held to.

Letters: B batch, T time, H heads, P head width, G groups, N state width.
"""

from __future__ import annotations

import numpy as np


def ssd_scan_reference(
    x_BTHP: np.ndarray,
    dt_BTH: np.ndarray,
    A_H: np.ndarray,
    B_BTGN: np.ndarray,
    C_BTGN: np.ndarray,
    D_H: np.ndarray | None = None,
    *,
    initial_state_BHPN: np.ndarray | None = None,
    document_ids_BT: np.ndarray | None = None,
    chunk_size: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t (x) B_t and y_t = S_t C_t + D x_t.

    Source: Dao and Gu 2024, "Transformers are SSMs", equation 1 with scalar A a head. The state restarts from zero wherever
    document_ids differ from the position before.

    Args:
        x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H: head h uses group h // (H/G).
        initial_state_BHPN: state before position 0; None for zeros.
        document_ids_BT: integers; None for one document.
        chunk_size: not used; here because all backends share one signature.
    Returns:
        y_BTHP and final_state_BHPN, float64.

    Numerics: float64 throughout.
    """
    x, dt, A, B, C, D, keep = _ssd_reference_arguments(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, document_ids_BT)
    state = np.zeros((*x.shape[:1], *x.shape[2:], B.shape[3]))
    if initial_state_BHPN is not None:
        state = state + initial_state_BHPN
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        decay = np.exp(dt[:, t] * A) * keep[:, t, None]
        state = decay[..., None, None] * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        y[:, t] = (state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t]
    return y, state


def ssd_scan_backward_reference(
    dy_BTHP: np.ndarray,
    dfinal_state_BHPN: np.ndarray | None,
    x_BTHP: np.ndarray,
    dt_BTH: np.ndarray,
    A_H: np.ndarray,
    B_BTGN: np.ndarray,
    C_BTGN: np.ndarray,
    D_H: np.ndarray | None = None,
    *,
    initial_state_BHPN: np.ndarray | None = None,
    document_ids_BT: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Gradients of sum(y * dy) + sum(final_state * dfinal_state), by the recurrence read backwards.

    Source: with R_t the gradient of S_t, R_t = dy_t (x) C_t + exp(dt_{t+1} A) R_{t+1}; the rest is the product rule.

    Args:
        dy_BTHP, dfinal_state_BHPN: gradients of the two results; None for no gradient of the state.
        others: as in `ssd_scan_reference`.
    Returns:
        float64 arrays under "x", "dt", "A", "B", "C", "D", "initial_state".

    Numerics: float64 throughout.
    """
    x, dt, A, B, C, D, keep = _ssd_reference_arguments(x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, document_ids_BT)
    batch, length, heads, width = x.shape
    n = B.shape[3]
    states = np.zeros((length + 1, batch, heads, width, n))
    if initial_state_BHPN is not None:
        states[0] = initial_state_BHPN
    for t in range(length):
        decay = np.exp(dt[:, t] * A) * keep[:, t, None]
        states[t + 1] = decay[..., None, None] * states[t] + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]

    dy = np.asarray(dy_BTHP, np.float64)
    dx, ddt = D[:, None] * dy, np.zeros_like(dt)
    dA, dB, dC = np.zeros_like(A), np.zeros_like(B), np.zeros_like(C)
    dstate = np.zeros((batch, heads, width, n))
    if dfinal_state_BHPN is not None:
        dstate = dstate + dfinal_state_BHPN
    for t in reversed(range(length)):
        dC[:, t] = (states[t + 1] * dy[:, t, ..., None]).sum(-2)
        dstate = dstate + dy[:, t, ..., None] * C[:, t, :, None]
        reads = (dstate * B[:, t, :, None]).sum(-1)
        dx[:, t] += dt[:, t, :, None] * reads
        dB[:, t] = (dstate * (dt[:, t, :, None] * x[:, t])[..., None]).sum(-2)
        decay = np.exp(dt[:, t] * A) * keep[:, t, None]
        dexponent = decay * (dstate * states[t]).sum((-1, -2))
        ddt[:, t] = (reads * x[:, t]).sum(-1) + dexponent * A
        dA += (dexponent * dt[:, t]).sum(0)
        dstate = decay[..., None, None] * dstate
    groups = B_BTGN.shape[2]
    by_group = (batch, length, groups, heads // groups, n)
    return {
        "x": dx,
        "dt": ddt,
        "A": dA,
        "B": dB.reshape(by_group).sum(3),
        "C": dC.reshape(by_group).sum(3),
        "D": (dy * x).sum((0, 1, 3)),
        "initial_state": dstate,
    }


def _ssd_reference_arguments(x, dt, A, B, C, D, document_ids) -> tuple[np.ndarray, ...]:
    """Everything in float64, B and C a head each, and keep_BT: 0 where a document begins that is not the first, else 1."""
    x, dt, A, B, C = (np.asarray(a, np.float64) for a in (x, dt, A, B, C))
    repeat = x.shape[2] // B.shape[2]
    keep = np.ones(x.shape[:2])
    if document_ids is not None:
        ids = np.asarray(document_ids)
        keep[:, 1:] = ids[:, 1:] == ids[:, :-1]
    D = np.zeros(x.shape[2]) if D is None else np.asarray(D, np.float64)
    return x, dt, A, np.repeat(B, repeat, axis=2), np.repeat(C, repeat, axis=2), D, keep
