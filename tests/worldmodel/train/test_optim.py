"""Schedules, which parameters decay, and which go to Muon."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import ConfigError
from worldmodel.config import OptimConfig
from worldmodel.train.optim import make_optimizer, make_schedule


def test_wsd_rises_stays_and_ends_at_zero():
    schedule = make_schedule(OptimConfig(warmup_steps=10, decay_steps=20), 1.0, 100)
    assert schedule(0) == 0.0
    np.testing.assert_allclose(
        [schedule(5), schedule(10), schedule(80), schedule(90), schedule(100)], [0.5, 1, 1, 0.5, 0]
    )


def test_cosine_is_half_way_in_the_middle():
    schedule = make_schedule(OptimConfig(schedule="cosine", warmup_steps=0), 1.0, 100)
    np.testing.assert_allclose([schedule(0), schedule(50), schedule(100)], [1, 0.5, 0], atol=1e-6)


def test_phases_longer_than_the_run_are_refused():
    with pytest.raises(ConfigError, match="exceed steps 20"):
        make_schedule(OptimConfig(warmup_steps=10, decay_steps=11), 1.0, 20)


PARAMS = {
    "blocks": {"layer_0": {"ffn_in": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}},
    "head": {"kernel": jnp.ones((4, 6))},
    "codebook": jnp.ones((4, 6)),
}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name):
    config = OptimConfig(optimizer=name, learning_rate=0.1, muon_learning_rate=0.1, warmup_steps=0, decay_steps=0,
                         weight_decay=0.5)  # fmt: skip
    optimizer = make_optimizer(config, 10)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zero, optimizer.init(PARAMS), PARAMS)
    assert float(updates["blocks"]["layer_0"]["ffn_in"]["kernel"].max()) < 0
    assert not updates["blocks"]["layer_0"]["ffn_in"]["bias"].any()
    assert not updates["codebook"].any()


def test_muon_orthogonalises_block_matrices_only():
    config = OptimConfig(optimizer="muon", learning_rate=0.1, muon_learning_rate=1.0, warmup_steps=0, decay_steps=0,
                         weight_decay=0.0)  # fmt: skip
    optimizer = make_optimizer(config, 10)
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), PARAMS)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    values = np.linalg.svd(updates["blocks"]["layer_0"]["ffn_in"]["kernel"], compute_uv=False)
    assert values.max() / values.min() < 2.0
    # The first (Nesterov) Adam step is the sign of the gradient times one rate.
    head = np.asarray(updates["head"]["kernel"])
    np.testing.assert_allclose(np.abs(head), np.abs(head).mean(), rtol=1e-3)
    np.testing.assert_array_equal(np.sign(head), -np.sign(grads["head"]["kernel"]))


def test_clipping_bounds_the_gradient():
    config = OptimConfig(warmup_steps=0, decay_steps=0, gradient_clip=1.0, beta1=0.0, beta2=0.0)
    optimizer = make_optimizer(config, 10)
    state = optimizer.init(PARAMS)
    huge = jax.tree.map(lambda x: 1e9 * jnp.ones_like(x), PARAMS)
    _, state = optimizer.update(huge, state, PARAMS)
    moments = [x for x in jax.tree.leaves(state) if x.ndim == 2]
    assert max(float(jnp.abs(m).max()) for m in moments) <= 1.0
