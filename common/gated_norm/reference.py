"""RMS normalisation of a gated row, in float64: the definition that every backend is held to.

Letters: N rows, I inner width.
"""

from __future__ import annotations

import numpy as np


def gated_rms_norm_reference(
    y_NI: np.ndarray, z_NI: np.ndarray, weight_I: np.ndarray, *, eps: float = 1e-5
) -> np.ndarray:
    """weight * g / sqrt(mean(g^2) + eps) with g = y * silu(z), for every row.

    Source: Zhang and Sennrich 2019 (RMSNorm), gated before the norm as in Dao and Gu 2024 (Mamba-2).

    Args:
        y_NI, z_NI: what is normalised and its gate.
        weight_I: scale of every column.
        eps: added to the mean square.
    Returns:
        (N, I), float64.

    Numerics: float64 throughout.
    """
    y, z, weight = (np.asarray(a, np.float64) for a in (y_NI, z_NI, weight_I))
    gated = y * z / (1.0 + np.exp(-z))
    return weight * gated / np.sqrt((gated**2).mean(axis=1, keepdims=True) + eps)


def gated_rms_norm_backward_reference(
    dout_NI: np.ndarray, y_NI: np.ndarray, z_NI: np.ndarray, weight_I: np.ndarray, *, eps: float = 1e-5
) -> dict[str, np.ndarray]:
    """Gradients of sum(out * dout) by the product rule.

    Args:
        dout_NI: gradient of the result.
        others: as in `gated_rms_norm_reference`.
    Returns:
        float64 arrays under "y", "z", "weight".
    """
    dout, y, z, weight = (np.asarray(a, np.float64) for a in (dout_NI, y_NI, z_NI, weight_I))
    gate = 1.0 / (1.0 + np.exp(-z))
    gated = y * z * gate
    inverse = 1.0 / np.sqrt((gated**2).mean(axis=1, keepdims=True) + eps)
    normed = gated * inverse
    scaled = dout * weight
    dgated = inverse * (scaled - normed * (scaled * normed).mean(axis=1, keepdims=True))
    return {
        "y": dgated * z * gate,
        "z": dgated * y * gate * (1.0 + z * (1.0 - gate)),
        "weight": (dout * normed).sum(axis=0),
    }
