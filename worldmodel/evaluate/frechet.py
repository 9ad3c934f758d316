"""A Fréchet distance between dreamed and real clips, on features of a random 3-D convolutional network.

The network is drawn from a seed and never trained, so there is nothing to download and nothing to fit. It is therefore
**not** the distance of the literature that uses a trained video classifier, and its numbers compare with nothing but
themselves on the same data; beside each stands the distance of real clips from real clips, its floor.

Legend: S clips · T time · H W C pixels · X features.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from worldmodel.evaluate.metrics import with_interval

NETWORK_SEED = 20_261
CHANNELS = (16, 24, 32)
STRIDES = ((2, 4, 4), (1, 2, 2), (2, 2, 2))
KERNELS = ((3, 4, 4), (3, 4, 4), (3, 4, 4))
FEATURES = 2 * CHANNELS[-1]


@functools.cache
def _kernels(channels: int) -> tuple[np.ndarray, ...]:
    """He-initialised kernels, the same on every machine: NumPy's generator does not depend on JAX's version."""
    generator = np.random.Generator(np.random.Philox(NETWORK_SEED))
    kernels, width = [], channels
    for size, wide in zip(KERNELS, CHANNELS, strict=True):
        fan_in = width * int(np.prod(size))
        kernels.append((generator.standard_normal((*size, width, wide)) * np.sqrt(2 / fan_in)).astype(np.float32))
        width = wide
    return tuple(kernels)


@jax.jit
def clip_features(frames_STHWC: Array) -> Array:
    """Features of clips, float32 (S, 64): mean and spread over time and place of the last layer's 32 channels.

    Args:
        frames_STHWC: values in 0..1, any length and size.
    """
    x = frames_STHWC - 0.5
    for kernel, stride in zip(_kernels(frames_STHWC.shape[-1]), STRIDES, strict=True):
        x = jax.lax.conv_general_dilated(
            x, jnp.asarray(kernel), stride, "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
        )
        x = jax.nn.leaky_relu(x, 0.2)
    return jnp.concatenate([x.mean(axis=(1, 2, 3)), x.std(axis=(1, 2, 3))], axis=-1)


def _root(matrix_XX: np.ndarray) -> np.ndarray:
    values_X, vectors_XX = np.linalg.eigh(matrix_XX)
    return (vectors_XX * np.sqrt(np.maximum(values_X, 0.0))) @ vectors_XX.T


def frechet_distance(a_SX: np.ndarray, b_SX: np.ndarray) -> float:
    """Squared Fréchet distance of two normal distributions fitted to samples.

    Source: Dowson and Landau (1982): |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2).

    Args:
        a_SX: samples, one a row.
        b_SX: others, of any number.

    Returns:
        At least 0 up to rounding; larger, the fewer samples there are.
    """
    a_SX, b_SX = a_SX.astype(np.float64), b_SX.astype(np.float64)
    cov_a, cov_b = np.cov(a_SX, rowvar=False), np.cov(b_SX, rowvar=False)
    root_a = _root(cov_a)
    crossed = np.sqrt(np.maximum(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0.0)).sum()
    shift_X = a_SX.mean(axis=0) - b_SX.mean(axis=0)
    return float(shift_X @ shift_X + np.trace(cov_a) + np.trace(cov_b) - 2.0 * crossed)


def frechet_entries(
    real_SX: np.ndarray, others: dict[str, np.ndarray], *, samples: int, seed: int
) -> dict[str, Any] | None:
    """Distances of the second half of the clips, real and dreamed, from the first half, real.

    Halves are drawn at random and are equally large for everything that is compared: a distance of finite samples is
    above that of the distributions, by as much for the floor as for the dream. Features are divided by their spread
    over all real clips.

    Args:
        real_SX: features of real clips.
        others: by name, features of what was made in their place, one row a clip.
        samples: bootstrap draws, over the clips of both halves. Drawing clips twice moves every distance up; intervals
            are shifted back by that, so that they lie about the value.
        seed: of the halves and the draws.

    Returns:
        JSON-ready: `floor`, and for each name its distance and `NAME_above_floor`, with 95% intervals; None below 8
        clips, of which no spread can be told.
    """
    half = len(real_SX) // 2
    if half < 4:
        return None
    rng = np.random.default_rng(seed)
    scale_X = real_SX.std(axis=0) + 1e-6
    order_S = rng.permutation(len(real_SX))
    reference_SX = (real_SX / scale_X)[order_S[:half]]
    compared = {
        name: (rows_SX / scale_X)[order_S[half : 2 * half]] for name, rows_SX in {"floor": real_SX, **others}.items()
    }

    def all_distances(reference_S: np.ndarray, compared_S: np.ndarray) -> dict[str, float]:
        found = {
            name: frechet_distance(reference_SX[reference_S], rows_SX[compared_S]) for name, rows_SX in compared.items()
        }
        return found | {f"{name}_above_floor": found[name] - found["floor"] for name in others}

    everything = np.arange(half)
    value = all_distances(everything, everything)
    drawn = [all_distances(rng.integers(0, half, half), rng.integers(0, half, half)) for _ in range(samples)]
    entries: dict[str, Any] = {"features": FEATURES, "clips_each": half, "bootstrap_samples": samples}
    for name, at in value.items():
        draws = np.asarray([one[name] for one in drawn])
        low, high = np.quantile(draws - draws.mean(), [0.025, 0.975]) + at
        entries[name] = with_interval(at, (float(low), float(high)))
    return entries
