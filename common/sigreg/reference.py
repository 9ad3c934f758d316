"""SIGReg in float64, written as its equations: the definition that every backend is held to.

Letters: N samples, T positions, D width, M projections, K knots.
"""

from __future__ import annotations

import numpy as np


def sigreg_quadrature_reference(
    knots: int = 17, t_min: float = 0.2, t_max: float = 4.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Knots, Gaussian characteristic function and weights: twice the trapezoid rule with window exp(-t^2/2).

    Args:
        knots: number of knots; t_min, t_max: ends of the range.
    Returns:
        t_K, phi_K, weight_K, float64.
    """
    t_K = np.linspace(t_min, t_max, knots)
    trapezoid_K = np.full(knots, (t_max - t_min) / (knots - 1))
    trapezoid_K[[0, -1]] /= 2.0
    phi_K = np.exp(-(t_K**2) / 2.0)
    return t_K, phi_K, 2.0 * trapezoid_K * phi_K


def sigreg_reference(z: np.ndarray, A_DM: np.ndarray, *, knots: int = 17, per_timestep: bool) -> tuple[float, np.ndarray]:
    """Mean over positions and projections of sum_k w_k |mean_n exp(i t_k p_n) - phi(t_k)|^2, p = z A, and its gradient.

    Source: see `sigreg_quadrature` of the torch form.

    Args:
        z: (N, T, D) with per_timestep, else (N, D).
        A_DM: projections.
        knots: of the quadrature on [0.2, 4].
        per_timestep: one statistic a position, or one over all samples.
    Returns:
        the statistic, and its gradient in the shape of z, float64.
    """
    z = np.asarray(z, np.float64)
    z_NTD = z if per_timestep else z[:, None]
    A_DM = np.asarray(A_DM, np.float64)
    samples, positions, _ = z_NTD.shape
    p_NTM = z_NTD @ A_DM
    value, dp_NTM = 0.0, np.zeros_like(p_NTM)
    for t, phi, weight in zip(*sigreg_quadrature_reference(knots), strict=True):
        wave_NTM = np.exp(1j * t * p_NTM)
        error_TM = wave_NTM.mean(axis=0) - phi
        weight = weight / (positions * A_DM.shape[1])
        value += weight * (np.abs(error_TM) ** 2).sum()
        dp_NTM += weight * 2.0 / samples * (error_TM.conj() * 1j * t * wave_NTM).real
    return float(value), (dp_NTM @ A_DM.T).reshape(z.shape)
