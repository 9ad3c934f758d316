"""Codebooks: gradients, dropout, resets, FSQ's numbering, k-means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import ConfigError
from worldmodel.config import QuantizerConfig
from worldmodel.models.quantizer import FiniteScalarQuantizer, VectorQuantizer, kmeans


def build(**changes) -> VectorQuantizer:
    return VectorQuantizer(QuantizerConfig(**{"codes": 8, "latent_dim": 4, **changes}), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_nearest_code_is_chosen(metric):
    quantizer = build(metric=metric)
    z = 2.0 * jax.random.normal(jax.random.key(1), (50, 4))
    codes = np.asarray(quantizer.codes)
    compared = np.asarray(z) / np.linalg.norm(z, axis=1, keepdims=True) if metric == "cosine" else np.asarray(z)
    expected = ((compared[:, None] - codes) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(quantizer(z).codes_X, expected)
    np.testing.assert_allclose(quantizer(z).latent_XL, codes[expected], atol=1e-6)


def test_cosine_ignores_length_and_euclidean_does_not():
    z = jnp.asarray([[0.3, 0.1, 0.0, 0.0]])
    cosine = build(metric="cosine")
    assert cosine(z).codes_X == cosine(100 * z).codes_X
    euclidean = build(metric="euclidean")
    euclidean.codebook[...] = jnp.asarray([[1.0, 0, 0, 0]] + [[30.0, 10, 0, 0]] * 7)
    assert euclidean(z).codes_X[0] == 0
    assert euclidean(100 * z).codes_X[0] != 0


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_gradients_reach_codebook_and_encoder(metric):
    quantizer = build(metric=metric)
    z = jax.random.normal(jax.random.key(1), (20, 4))

    def loss(quantizer, z):
        return quantizer(z).loss

    grads, z_grad = nnx.grad(loss, argnums=(0, 1))(quantizer, z)
    used = np.unique(quantizer(z).codes_X)
    norm_V = np.linalg.norm(grads.codebook[...], axis=1)
    assert (norm_V[used] > 1e-6).all()
    assert not norm_V[np.setdiff1d(np.arange(8), used)].any()
    assert jnp.abs(z_grad).min(axis=0).max() > 0


def test_straight_through_passes_the_gradient_unchanged():
    quantizer = build(metric="euclidean")
    z = jax.random.normal(jax.random.key(1), (5, 4))
    weight = jax.random.normal(jax.random.key(2), (5, 4))
    np.testing.assert_allclose(jax.grad(lambda z: jnp.sum(quantizer(z).latent_XL * weight))(z), weight, atol=1e-6)


def test_dropped_codes_are_never_chosen_and_evaluation_drops_none():
    quantizer = build(codebook_dropout=0.5, codes=4)
    z = jax.random.normal(jax.random.key(1), (200, 4))
    whole = set(np.unique(quantizer(z).codes_X))
    sizes = {len(np.unique(quantizer(z, key=jax.random.key(s)).codes_X)) for s in range(12)}
    assert len(whole) == 4
    assert min(sizes) < 4
    assert min(sizes) >= 1


def test_dead_codes_come_back_as_encoder_outputs():
    quantizer = build(metric="euclidean", dead_after_steps=2)
    far = jnp.full((8, 4), 50.0).at[0].set(0.0)
    quantizer.codebook[...] = far
    z = 0.1 * jax.random.normal(jax.random.key(1), (30, 4))
    quantizer(z, key=jax.random.key(2))
    quantizer.reset_dead()
    np.testing.assert_array_equal(quantizer.codebook[...], far)  # idle for one step only
    quantizer(z, key=jax.random.key(3))
    quantizer.reset_dead()
    codebook = np.asarray(quantizer.codebook[...])
    assert (codebook[0] == 0).all()
    assert all((np.abs(np.asarray(z) - row).max(1) == 0).any() for row in codebook[1:])
    assert not np.asarray(quantizer.idle_V[...]).any()


def test_evaluation_changes_no_counter():
    quantizer = build(dead_after_steps=2)
    before = jax.tree.leaves(nnx.state(quantizer))
    quantizer(jax.random.normal(jax.random.key(1), (5, 4)))
    for a, b in zip(before, jax.tree.leaves(nnx.state(quantizer)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3), (4, 4, 3)])
def test_fsq_numbers_and_vectors_agree_and_cover_everything(levels):
    count = int(np.prod(levels))
    config = QuantizerConfig(kind="fsq", codes=count, latent_dim=len(levels), fsq_levels=levels)
    quantizer = FiniteScalarQuantizer(config, rngs=nnx.Rngs(0))
    z = 2.0 * jax.random.normal(jax.random.key(0), (4000, len(levels)))
    out = quantizer(z)
    np.testing.assert_allclose(quantizer.lookup(out.codes_X), out.latent_XL, atol=1e-6)
    for axis, level in enumerate(levels):
        assert len(np.unique(np.asarray(out.latent_XL)[:, axis].round(4))) == level
    assert int(out.codes_X.min()) >= 0
    assert int(out.codes_X.max()) < count
    assert len(np.unique(np.asarray(quantizer.codes), axis=0)) == count


def test_fsq_refuses_levels_that_do_not_multiply_to_its_codes():
    with pytest.raises(ConfigError, match="multiply"):
        QuantizerConfig(kind="fsq", codes=10, latent_dim=2, fsq_levels=(3, 3))


def test_kmeans_finds_rare_clusters_among_duplicates():
    rng = np.random.default_rng(0)
    background = np.zeros((2000, 3), np.float32)
    rare = rng.normal(size=(5, 3)).astype(np.float32) * 10
    points = np.concatenate([background, np.repeat(rare, 4, axis=0)])
    centres = np.asarray(kmeans(jnp.asarray(points), 6, key=jax.random.key(0)))
    distance = np.linalg.norm(points[:, None] - centres, axis=-1).min(1)
    assert distance.max() < 1e-3


def test_kmeans_with_fewer_points_than_centres_is_finite():
    assert np.isfinite(kmeans(jnp.ones((3, 2)), 8, key=jax.random.key(0))).all()
