"""Image metrics and intervals: PSNR of the mean squared error, SSIM, bootstrap over clips.

Legend: X any leading axes · H height · W width · C channels · S clips.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
MSE_FLOOR = 1e-10


def psnr_db(mse: Array) -> Array:
    """Peak signal-to-noise ratio in dB of a mean squared error of values in 0..1 (at most 100 dB)."""
    return -10.0 * jnp.log10(jnp.maximum(mse, MSE_FLOOR))


def ssim(a_XHWC: Array, b_XHWC: Array) -> Array:
    """Structural similarity of images in 0..1, averaged over places and channels.

    Source: Wang et al., "Image Quality Assessment" (2004), equation 13, Gaussian window of 11 and sigma 1.5, without
    padding, K1 = 0.01, K2 = 0.03.

    Args:
        a_XHWC: images with any leading axes.
        b_XHWC: images of the same shape.

    Returns:
        float32 of the leading axes.
    """
    offset = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weight = np.exp(-(offset**2) / (2 * SSIM_SIGMA**2))
    kernel = jnp.asarray(weight / weight.sum(), jnp.float32)

    def blur(x: Array) -> Array:
        lead, (H, W, C) = x.shape[:-3], x.shape[-3:]
        y = x.reshape(-1, H, W, C)
        tall, wide = H - SSIM_WINDOW + 1, W - SSIM_WINDOW + 1
        rows = jnp.zeros((len(y), tall, W, C))
        for i in range(SSIM_WINDOW):
            rows = rows + kernel[i] * y[:, i : tall + i]
        both = jnp.zeros((len(y), tall, wide, C))
        for i in range(SSIM_WINDOW):
            both = both + kernel[i] * rows[:, :, i : wide + i]
        return both.reshape(*lead, *both.shape[1:])

    a, b = a_XHWC.astype(jnp.float32), b_XHWC.astype(jnp.float32)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    cov = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    value = ((2 * mean_a * mean_b + c1) * (2 * cov + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return jnp.mean(value, axis=(-3, -2, -1))


def bootstrap_interval(
    statistic: Callable[[np.ndarray], np.ndarray], clips: int, *, samples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap over clips.

    Args:
        statistic: maps integer clip indices (samples, clips) to one value per row.
        clips: number of clips to draw from.
        samples: bootstrap draws.
        seed: of the draws.
        level: coverage.

    Returns:
        Lower and upper end.
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // max(clips, 1))
    draws = [
        statistic(rng.integers(0, clips, (min(chunk, samples - start), clips))) for start in range(0, samples, chunk)
    ]
    low, high = np.quantile(np.concatenate(draws), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def psnr_of_mean(mse_S: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Statistic for `bootstrap_interval`: PSNR of the mean error of the drawn clips."""
    return lambda index: -10.0 * np.log10(np.maximum(mse_S[index].mean(axis=1), MSE_FLOOR))


def with_interval(value: float, interval: tuple[float, float]) -> dict[str, float]:
    """JSON form of a measured value and its 95% interval."""
    return {"value": value, "low": interval[0], "high": interval[1]}


def psnr_entry(mse_S: np.ndarray, *, samples: int, seed: int) -> dict[str, float]:
    """PSNR of the mean error over clips with its interval."""
    statistic = psnr_of_mean(mse_S)
    value = float(statistic(np.arange(len(mse_S))[None])[0])
    return with_interval(value, bootstrap_interval(statistic, len(mse_S), samples=samples, seed=seed))


def psnr_difference_entry(mse_S: np.ndarray, other_S: np.ndarray, *, samples: int, seed: int) -> dict[str, float]:
    """PSNR of the first errors minus PSNR of the second, on the same clips, with its interval."""
    first, second = psnr_of_mean(mse_S), psnr_of_mean(other_S)

    def statistic(index: np.ndarray) -> np.ndarray:
        return first(index) - second(index)

    value = float(statistic(np.arange(len(mse_S))[None])[0])
    return with_interval(value, bootstrap_interval(statistic, len(mse_S), samples=samples, seed=seed))


def mean_entry(values_S: np.ndarray, *, samples: int, seed: int) -> dict[str, float]:
    """Mean over clips with its interval."""
    interval = bootstrap_interval(lambda index: values_S[index].mean(axis=1), len(values_S), samples=samples, seed=seed)
    return with_interval(float(values_S.mean()), interval)


@jax.jit
def frame_mse(true_XHWC: Array, got_XHWC: Array) -> Array:
    """Mean squared error of each image pair in 0..1."""
    return jnp.mean((true_XHWC - got_XHWC) ** 2, axis=(-3, -2, -1))


frame_ssim = jax.jit(ssim)
