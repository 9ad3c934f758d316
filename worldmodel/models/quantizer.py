"""Bottlenecks behind one interface: a vector-quantized codebook, finite scalar quantization, continuous tanh latents.

Legend: X any leading axes · V codes · L latent size · S sampled points.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from worldmodel.config import QuantizerConfig
from worldmodel.models.layers import Stats

KMEANS_CHUNK = 8192


class Quantized(NamedTuple):
    """What a bottleneck returns: values that gradients pass, code numbers (none if continuous), the codebook's loss."""

    latent_XL: Array
    codes_X: Array
    loss: Array


def unit_length(x_XL: Array) -> Array:
    """Scale the last axis to length 1 (zero stays zero)."""
    return x_XL * jax.lax.rsqrt(jnp.sum(x_XL * x_XL, axis=-1, keepdims=True) + 1e-12)


class VectorQuantizer(nnx.Module):
    """Nearest code with straight-through gradients, commitment loss, codebook dropout and dead-code reset.

    Source: van den Oord et al., "Neural Discrete Representation Learning" (2017), equation 3; cosine look-up from Yu et
    al., "Vector-quantized Image Modeling with Improved VQGAN" (2021), section 3.2.
    """

    def __init__(self, config: QuantizerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        shape = (config.codes, config.latent_dim)
        self.codebook = nnx.Param(unit_length(jax.random.normal(rngs.params(), shape)))
        self.idle_V = Stats(jnp.zeros((config.codes,), jnp.int32))
        if config.dead_after_steps:
            self.spare_VL = Stats(jnp.zeros(shape, jnp.float32))

    @property
    def codes(self) -> Array:
        """float32 (V, L) code vectors as the decoder sees them."""
        codebook_VL = self.codebook[...]
        return unit_length(codebook_VL) if self.config.metric == "cosine" else codebook_VL

    def lookup(self, codes_X: Array) -> Array:
        """Code numbers to code vectors (X, L)."""
        return self.codes[codes_X]

    def nearest(self, latent_XL: Array, hidden_V: Array | None = None) -> Array:
        """Number of the nearest code of each latent; `hidden_V` is True for codes that may not be chosen."""
        codes_VL = self.codes
        score_XV = latent_XL @ codes_VL.T
        if self.config.metric == "euclidean":
            score_XV = score_XV - 0.5 * jnp.sum(codes_VL * codes_VL, axis=-1)
        if hidden_V is not None:
            score_XV = jnp.where(hidden_V, -jnp.inf, score_XV)
        return jnp.argmax(score_XV, axis=-1).astype(jnp.int32)

    def normalize(self, latent_XL: Array) -> Array:
        """The form in which latents are compared with codes: float32, of unit length with the cosine metric."""
        latent_XL = latent_XL.astype(jnp.float32)
        return unit_length(latent_XL) if self.config.metric == "cosine" else latent_XL

    def __call__(self, latent_XL: Array, *, key: Array | None = None) -> Quantized:
        """Quantize; with a key (training) also drop codes and count how long each has been idle.

        Args:
            latent_XL: encoder outputs of any float type.
            key: training key; None evaluates and leaves all counters alone.

        Returns:
            Latents (X, L) float32, codes (X,) int32 and mean-squared codebook + commitment loss.
        """
        config = self.config
        latent_XL = self.normalize(latent_XL)
        hidden_V = None
        if key is not None and config.codebook_dropout > 0.0:
            hidden_V = jax.random.bernoulli(key, config.codebook_dropout, (config.codes,))
            hidden_V = hidden_V & ~jnp.all(hidden_V)
        codes_X = self.nearest(jax.lax.stop_gradient(latent_XL), hidden_V)
        chosen_XL = self.lookup(codes_X)
        codebook_loss = jnp.mean((jax.lax.stop_gradient(latent_XL) - chosen_XL) ** 2)
        commitment_loss = jnp.mean((latent_XL - jax.lax.stop_gradient(chosen_XL)) ** 2)
        if key is not None:
            used_V = jnp.zeros((config.codes,), bool).at[codes_X.reshape(-1)].set(True)
            self.idle_V[...] = jnp.where(used_V, 0, self.idle_V[...] + 1)
            if config.dead_after_steps:
                flat_SL = jax.lax.stop_gradient(latent_XL).reshape(-1, config.latent_dim)
                pick_V = jax.random.randint(jax.random.fold_in(key, 1), (config.codes,), 0, flat_SL.shape[0])
                self.spare_VL[...] = flat_SL[pick_V]
        straight_XL = latent_XL + jax.lax.stop_gradient(chosen_XL - latent_XL)
        return Quantized(straight_XL, codes_X, codebook_loss + config.commitment * commitment_loss)

    def reset_dead(self) -> None:
        """Replace codes idle for `dead_after_steps` by encoder outputs of the last batch (call after the update)."""
        if not self.config.dead_after_steps:
            return
        dead_V = self.idle_V[...] >= self.config.dead_after_steps
        self.codebook[...] = jnp.where(dead_V[:, None], self.spare_VL[...], self.codebook[...])
        self.idle_V[...] = jnp.where(dead_V, 0, self.idle_V[...])

    def initialize(self, latent_SL: Array, key: Array) -> None:
        """Set the codebook to the k-means centres of encoder outputs.

        Args:
            latent_SL: at least as many latents as there are codes (fewer are repeated with noise).
            key: random key of the starting centres.
        """
        self.codebook[...] = kmeans(self.normalize(latent_SL), self.config.codes, key=key)


class FiniteScalarQuantizer(nnx.Module):
    """Each latent rounds to one of a few levels; the codebook is their product and has no parameters.

    Source: Mentzer et al., "Finite Scalar Quantization: VQ-VAE Made Simple" (2023), section 3 and appendix A.
    """

    def __init__(self, config: QuantizerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.levels = tuple(config.fsq_levels)
        self.idle_V = Stats(jnp.zeros((config.codes,), jnp.int32))

    @property
    def codes(self) -> Array:
        """float32 (V, L) code vectors, each coordinate in [-1, 1]."""
        digits = np.stack(np.unravel_index(np.arange(self.config.codes), self.levels), axis=-1)
        half = np.asarray([level // 2 for level in self.levels])
        return jnp.asarray((digits - half) / half, jnp.float32)

    def lookup(self, codes_X: Array) -> Array:
        """Code numbers to code vectors (X, L)."""
        return self.codes[codes_X]

    def __call__(self, latent_XL: Array, *, key: Array | None = None) -> Quantized:
        """Bound, round and number the latents; the loss is zero. See `VectorQuantizer.__call__`."""
        levels = jnp.asarray(self.levels, jnp.float32)
        half_range = (levels - 1.0) * (1.0 + 1e-3) / 2.0  # a hair wider, so that the outer levels are reached
        # Even level counts have no middle level: shift by half a step so that rounding gives exactly `levels` values.
        offset = jnp.where(levels % 2 == 0, 0.5, 0.0)
        bounded_XL = jnp.tanh(latent_XL.astype(jnp.float32) + jnp.arctanh(offset / half_range)) * half_range - offset
        rounded_XL = bounded_XL + jax.lax.stop_gradient(jnp.round(bounded_XL) - bounded_XL)
        half = jnp.asarray([level // 2 for level in self.levels], jnp.float32)
        digits_XL = jax.lax.stop_gradient(jnp.round(bounded_XL) + half).astype(jnp.int32)
        place = jnp.asarray(np.cumprod((1, *self.levels[:0:-1]))[::-1].copy(), jnp.int32)
        codes_X = jnp.sum(digits_XL * place, axis=-1)
        if key is not None:
            used_V = jnp.zeros((self.config.codes,), bool).at[codes_X.reshape(-1)].set(True)
            self.idle_V[...] = jnp.where(used_V, 0, self.idle_V[...] + 1)
        return Quantized(rounded_XL / half, codes_X, jnp.zeros((), jnp.float32))

    def reset_dead(self) -> None:
        """No codebook, nothing to reset."""


class TanhBottleneck(nnx.Module):
    """Continuous latents in -1..1; nothing is quantized and there are no codes.

    Source: the tokenizer of Dreamer 4 (Hafner et al., 2025, section 3.1) and of Jasmine's diffusion dynamics.
    """

    def __init__(self, config: QuantizerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config

    def __call__(self, latent_XL: Array, *, key: Array | None = None) -> Quantized:
        """Squash the latents; `codes_X` is empty, the loss is zero."""
        latent_XL = jnp.tanh(latent_XL.astype(jnp.float32))
        return Quantized(latent_XL, jnp.zeros((*latent_XL.shape[:-1], 0), jnp.int32), jnp.zeros((), jnp.float32))

    def reset_dead(self) -> None:
        """No codebook, nothing to reset."""


Quantizer = VectorQuantizer | FiniteScalarQuantizer | TanhBottleneck
QUANTIZERS = {"vq": VectorQuantizer, "fsq": FiniteScalarQuantizer, "tanh": TanhBottleneck}


def build_quantizer(config: QuantizerConfig, *, rngs: nnx.Rngs) -> Quantizer:
    """The bottleneck that the config names."""
    return QUANTIZERS[config.kind](config, rngs=rngs)


def kmeans(points_SL: Array, centres: int, *, key: Array, iterations: int = 20) -> Array:
    """Lloyd's algorithm; an empty cluster restarts at a point drawn in proportion to its squared error.

    Args:
        points_SL: float32 points.
        centres: number of centres V.
        key: random key.
        iterations: passes over the points.

    Returns:
        float32 (V, L) centres.
    """
    count, size = points_SL.shape
    if count < centres:
        repeats = -(-centres // count)
        jitter = 1e-3 * jnp.std(points_SL) * jax.random.normal(key, (repeats * count, size))
        points_SL = jnp.tile(points_SL, (repeats, 1)) + jitter
        count = points_SL.shape[0]
    chunk = min(KMEANS_CHUNK, count)
    chunks = count // chunk  # points beyond the last whole chunk are left out
    points_SL = jax.random.permutation(jax.random.fold_in(key, 1), points_SL)[: chunks * chunk]
    return _lloyd(points_SL.reshape(chunks, chunk, size), points_SL[:centres], key, iterations)


@jax.jit
def _assign(points_CSL: Array, centre_VL: Array) -> tuple[Array, Array, Array]:
    """Sum and number of the points nearest to each centre, and every point's squared distance to its own."""
    half_norm_V = 0.5 * jnp.sum(centre_VL * centre_VL, axis=-1)

    def one_chunk(points_SL: Array) -> tuple[Array, Array, Array]:
        score_SV = points_SL @ centre_VL.T - half_norm_V
        nearest_S = jnp.argmax(score_SV, axis=-1)
        total_VL = jax.ops.segment_sum(points_SL, nearest_S, centre_VL.shape[0])
        number_V = jax.ops.segment_sum(jnp.ones_like(nearest_S, jnp.float32), nearest_S, centre_VL.shape[0])
        return total_VL, number_V, jnp.sum(points_SL * points_SL, axis=-1) - 2.0 * jnp.max(score_SV, axis=-1)

    totals, numbers, distance2_CS = jax.lax.map(one_chunk, points_CSL)
    return totals.sum(0), numbers.sum(0), distance2_CS.reshape(-1)


def _lloyd(points_CSL: Array, centre_VL: Array, key: Array, iterations: int) -> Array:
    flat_SL = points_CSL.reshape(-1, points_CSL.shape[-1])
    for step in range(iterations):
        total_VL, number_V, distance2_S = _assign(points_CSL, centre_VL)
        # Game frames are mostly background: random restarts would land there again and again. Drawing in proportion to
        # the squared error (as k-means++ does) puts centres where they help. Gumbel top-k draws without replacement.
        noise_S = jax.random.gumbel(jax.random.fold_in(key, step + 2), distance2_S.shape)
        _, pick_V = jax.lax.top_k(jnp.log(jnp.maximum(distance2_S, 1e-12)) + noise_S, number_V.shape[0])
        mean_VL = total_VL / jnp.maximum(number_V, 1.0)[:, None]
        centre_VL = jnp.where((number_V > 0)[:, None], mean_VL, flat_SL[pick_V])
    return centre_VL
