"""The causal depthwise convolution, position by position, in float64: the definition that every backend is held to.

Letters: B batch, T time, D channels, K taps, S = K - 1 carried inputs.
"""

from __future__ import annotations

import numpy as np


def causal_conv1d_reference(
    x_BTD: np.ndarray,
    weight_DK: np.ndarray,
    bias_D: np.ndarray | None = None,
    *,
    initial_state_BDS: np.ndarray | None = None,
    document_ids_BT: np.ndarray | None = None,
    activation: str | None = "silu",
) -> tuple[np.ndarray, np.ndarray]:
    """y_t = act(bias + sum_k weight[:, k] * window_t[:, k]), the window being the last K inputs of the same document.

    Source: the short convolution of Gu and Dao 2023 (Mamba), with a window that is emptied where document_ids change.

    Args:
        x_BTD, weight_DK, bias_D: inputs, taps (the last for the present position), bias or None.
        initial_state_BDS: inputs before position 0, oldest first; None for zeros.
        document_ids_BT: integers; None for one document.
        activation: "silu" or None.
    Returns:
        y_BTD and final_state_BDS, float64.
    Raises:
        ValueError: unknown activation.

    Numerics: float64 throughout.
    """
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation is {activation!r}, expected 'silu' or None")
    x, weight = np.asarray(x_BTD, np.float64), np.asarray(weight_DK, np.float64)
    batch, length, channels = x.shape
    window = np.zeros((batch, channels, weight.shape[1]))
    if initial_state_BDS is not None:
        window[..., 1:] = initial_state_BDS
    y = np.empty_like(x)
    for t in range(length):
        if t and document_ids_BT is not None:
            window = window * (document_ids_BT[:, t] == document_ids_BT[:, t - 1])[:, None, None]
        window = np.concatenate([window[..., 1:], x[:, t, :, None]], axis=2)
        y[:, t] = (window * weight).sum(-1) + (0.0 if bias_D is None else bias_D)
    if activation == "silu":
        y = y / (1.0 + np.exp(-y))
    return y, window[..., 1:]
