"""Softcap, cross-entropy and z-loss over whole logits in float64: the definition that every backend is held to.

Letters: N rows, D width, V vocabulary.
"""

from __future__ import annotations

import numpy as np


def softcap_reference(logits: np.ndarray, cap: float, kind: str) -> np.ndarray:
    """Logits bounded to [-cap, cap]: "tanh", "poly" (degree-5 polynomial with clamps) or "none".

    Source: see `softcap_torch`.

    Args:
        logits: any shape.
        cap: bound, > 0.
        kind: "poly", "tanh" or "none".
    Returns:
        the capped logits, float64.
    Raises:
        ValueError: unknown kind.
    """
    logits = np.asarray(logits, np.float64)
    if kind == "none":
        return logits
    if kind == "tanh":
        return cap * np.tanh(logits / cap)
    if kind == "poly":
        u = np.clip(logits / cap, -2.0, 2.0)
        return cap * np.clip(u - u**3 / 3.0 + u**5 / 15.0, -1.0, 1.0)
    raise ValueError(f"softcap: kind is {kind!r}, expected one of poly, tanh, none")


def softcap_nll_reference(
    x_ND: np.ndarray,
    weight_VD: np.ndarray,
    bias_V: np.ndarray | None,
    targets_N: np.ndarray,
    *,
    cap: float,
    kind: str,
    temperature: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood of every target, and the log-partition, of softmax(softcap(x W^T + b) / temperature).

    Args:
        x_ND, weight_VD, bias_V, targets_N: rows, projection, bias or None, targets in [0, V).
        cap, kind: as in `softcap_reference`.
        temperature: divides the capped logits.
    Returns:
        nll_N and lse_N in nats, float64.
    """
    logits = np.asarray(x_ND, np.float64) @ np.asarray(weight_VD, np.float64).T
    if bias_V is not None:
        logits = logits + bias_V
    capped = softcap_reference(logits, cap, kind) / temperature
    top = capped.max(axis=1)
    lse = top + np.log(np.exp(capped - top[:, None]).sum(axis=1))
    return lse - capped[np.arange(len(targets_N)), targets_N], lse


def softcap_xent_reference(
    x_ND: np.ndarray,
    weight_VD: np.ndarray,
    bias_V: np.ndarray | None,
    targets_N: np.ndarray,
    *,
    cap: float,
    kind: str,
    z_weight: float = 0.0,
) -> tuple[float, float, float]:
    """Mean cross-entropy plus z-loss: (loss, ce, z) with loss = ce + z and z = z_weight * mean(lse^2), in nats.

    Args:
        as in `softcap_nll_reference`; z_weight: weight of the z-loss.
    Returns:
        three floats.
    """
    nll, lse = softcap_nll_reference(x_ND, weight_VD, bias_V, targets_N, cap=cap, kind=kind)
    ce, z = float(nll.mean()), float(z_weight * (lse**2).mean())
    return ce + z, ce, z
