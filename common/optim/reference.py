"""Newton-Schulz orthogonalisation of one matrix in float64: the definition that every backend is held to."""

from __future__ import annotations

import numpy as np


def newton_schulz_reference(
    G_MN: np.ndarray, steps: int, polynomials: tuple[tuple[float, float, float], ...] = ((3.4445, -4.7750, 2.0315),)
) -> np.ndarray:
    """`steps` iterations X <- a X + b (X X^T) X + c (X X^T)^2 X from X = G / |G|, which act on singular values alone.

    Source: Jordan et al. 2024, "Muon". Written on the singular values: s <- a s + b s^3 + c s^5.

    Args:
        G_MN: a matrix.
        steps: iterations, >= 0.
        polynomials: (a, b, c) of each iteration; the last serves all that follow.
    Returns:
        (M, N), float64; zero for a zero matrix.

    Numerics: float64 through a singular value decomposition.
    """
    G_MN = np.asarray(G_MN, np.float64)
    U, s, Vt = np.linalg.svd(G_MN, full_matrices=False)
    s = s / (np.linalg.norm(s) + 1e-7)
    for k in range(steps):
        a, b, c = polynomials[min(k, len(polynomials) - 1)]
        s = a * s + b * s**3 + c * s**5
    return (U * s) @ Vt
