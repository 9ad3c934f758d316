"""SIGReg in JAX, compiled by XLA: distance of projected embeddings from a standard Gaussian.

Letters: N samples, T positions, D width, M projections, K knots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.sigreg.reference import sigreg_quadrature_reference


def sigreg_jax(z: Array, A_DM: Array, *, knots: int = 17, per_timestep: bool) -> Array:
    """Mean over projections (and positions) of sum_k w_k |phi_hat(t_k) - phi(t_k)|^2.

    Source: see `sigreg_quadrature` of the torch form.

    Args:
        z: (N, T, D) with per_timestep, one statistic a position over its N samples; else (N, D), one over all N.
        A_DM: projections, columns of unit length; not differentiated.
        knots: of the quadrature on [0.2, 4]. Static.
        per_timestep: which of the two forms. Static.
    Returns:
        scalar, float64 for float64 z, else float32.
    Raises:
        ValueError: shapes do not fit together.

    Numerics: as the torch form; sums over samples in the result's type. The body of the scan over knots is
    rematerialised, so nothing of the size N*T*M*K is kept for backward.
    """
    if z.ndim != (3 if per_timestep else 2) or A_DM.ndim != 2 or z.shape[-1] != A_DM.shape[0] or z.shape[0] < 1:
        form = "(N,T,D)" if per_timestep else "(N,D)"
        raise ValueError(f"sigreg: z is {z.shape} and A {A_DM.shape}; expected {form} and (D,M)")
    acc = jnp.float64 if z.dtype == jnp.float64 else jnp.float32
    projected = jnp.matmul(
        z.astype(acc), jax.lax.stop_gradient(A_DM).astype(acc), precision=jax.lax.Precision.HIGHEST
    )

    @jax.checkpoint
    def one_knot(total: Array, knot: tuple[Array, Array, Array]) -> tuple[Array, None]:
        t, phi, weight = knot
        real = jnp.mean(jnp.cos(t * projected), axis=0) - phi
        imaginary = jnp.mean(jnp.sin(t * projected), axis=0)
        return total + weight * jnp.mean(real**2 + imaginary**2), None

    table = tuple(jnp.asarray(np.asarray(column), acc) for column in sigreg_quadrature_reference(knots))
    return jax.lax.scan(one_knot, jnp.zeros((), acc), table)[0]
