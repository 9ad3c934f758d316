"""Squared-ReLU feed-forward in float64, written as its equations: the definition that every backend is held to.

Letters: N rows, D width in, H hidden width, E width out.
"""

from __future__ import annotations

import numpy as np


def relu2_ffn_reference(
    x_ND: np.ndarray, up_HD: np.ndarray, down_EH: np.ndarray, *, negative_slope: float = 0.0, eps: float = 1e-6
) -> np.ndarray:
    """y = down (h / rms(h)), h = leaky_relu(up x)^2, rms(h) = sqrt(mean(h^2) + eps).

    Source: see `relu2_ffn_torch`.

    Args:
        x_ND, up_HD, down_EH: rows and the two matrices.
        negative_slope: of the leaky ReLU; 0 for ReLU.
        eps: added to the mean square of h.
    Returns:
        y_NE, float64.
    """
    u_NH = np.asarray(x_ND, np.float64) @ np.asarray(up_HD, np.float64).T
    h_NH = np.where(u_NH > 0, u_NH, negative_slope * u_NH) ** 2
    return (h_NH / np.sqrt((h_NH**2).mean(axis=1, keepdims=True) + eps)) @ np.asarray(down_EH, np.float64).T


def relu2_ffn_reference_gradients(
    x_ND: np.ndarray,
    up_HD: np.ndarray,
    down_EH: np.ndarray,
    dy_NE: np.ndarray,
    *,
    negative_slope: float = 0.0,
    eps: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of sum(dy * y) with respect to x, up and down, float64."""
    x_ND, up_HD, down_EH, dy_NE = (np.asarray(a, np.float64) for a in (x_ND, up_HD, down_EH, dy_NE))
    u_NH = x_ND @ up_HD.T
    slope_NH = np.where(u_NH > 0, 1.0, negative_slope)
    h_NH = (slope_NH * u_NH) ** 2
    factor_N1 = 1.0 / np.sqrt((h_NH**2).mean(axis=1, keepdims=True) + eps)
    dnormed_NH = dy_NE @ down_EH
    through_factor_N1 = (dnormed_NH * h_NH).mean(axis=1, keepdims=True) * factor_N1**3
    du_NH = (dnormed_NH * factor_N1 - h_NH * through_factor_N1) * 2.0 * slope_NH**2 * u_NH
    return du_NH @ up_HD, du_NH.T @ x_ND, dy_NE.T @ (h_NH * factor_N1)
