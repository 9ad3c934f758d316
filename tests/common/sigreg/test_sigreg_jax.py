"""The JAX form of SIGReg against the float64 reference and the golden vectors."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.sigreg.jax_impl import sigreg_jax
from common.sigreg.reference import sigreg_reference

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize("shape", [(40, 3, 6), (40, 6)])
def test_value_and_gradient_are_the_reference(shape):
    rng = np.random.default_rng(0)
    z, A = rng.normal(size=shape) * 0.7 + 0.2, rng.normal(size=(6, 9))
    A /= np.linalg.norm(A, axis=0)
    per_timestep = len(shape) == 3
    value, gradient = sigreg_reference(z, A, per_timestep=per_timestep)
    got = jax.jit(jax.value_and_grad(lambda z: sigreg_jax(z, jnp.asarray(A, jnp.float32), per_timestep=per_timestep)))
    ours, slope = got(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(ours, value, rtol=1e-4)
    assert np.abs(np.asarray(slope) - gradient).max() < 1e-4 * np.abs(gradient).max()


def test_golden_vectors():
    with np.load(GOLDEN / "sigreg.npz", allow_pickle=False) as file:
        golden = {key: file[key] for key in file.files}
    A = jnp.asarray(golden["A"], jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda z: sigreg_jax(z, A, per_timestep=True)))
    value, gradient = step(jnp.asarray(golden["z"], jnp.float32))
    np.testing.assert_allclose(value, golden["loss"], rtol=1e-4)
    assert np.abs(np.asarray(gradient) - golden["dz"]).max() < 1e-4 * np.abs(golden["dz"]).max()


def test_directions_are_not_trained_and_wrong_shapes_are_named():
    z, A = jnp.ones((4, 6)), jnp.ones((6, 2))
    assert not jax.grad(lambda A: sigreg_jax(z, A, per_timestep=False))(A).any()
    with pytest.raises(ValueError, match=r"expected \(N,T,D\)"):
        sigreg_jax(z, A, per_timestep=True)
