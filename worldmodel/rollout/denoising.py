"""Sampling of one frame of latents: from noise to data in Euler steps along the learned flow.

Legend: X any shape.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.errors import ConfigError
from worldmodel.config import DiffusionConfig, RolloutConfig
from worldmodel.models.flow import euler_step, schedule


def step_exponent(diffusion: DiffusionConfig, decode_steps: int) -> int:
    """Exponent of the step size that a model is told: that of the sampler for a shortcut model, else the finest.

    Raises:
        ConfigError: a shortcut model, and a number of steps that it was not trained for.
    """
    if not diffusion.shortcut:
        return 0
    steps = min(decode_steps, diffusion.levels)
    if steps & (steps - 1):
        raise ConfigError(
            f"decode_steps {decode_steps}: a shortcut model takes a power of two up to {diffusion.levels}"
        )
    return int(np.log2(diffusion.levels // steps))


def denoise_frame(
    data_of: Callable[[Array, Array], Array], shape_X: tuple[int, ...], levels: int, config: RolloutConfig, key: Array
) -> Array:
    """Follow the flow from noise to data.

    Source: Euler's method on dx/dtau = (E[data | x] - x) / (1 - tau), the probability flow of the straight path (Lipman
    et al., "Flow Matching for Generative Modeling", 2023). Every step leaves the noise that belongs to its level.

    Args:
        data_of: (x, level number) -> predicted data of x's shape, float32.
        shape_X: of the result.
        levels: level numbers run from 0 (noise) to `levels` (data).
        config: decode steps and temperature, the scale of the starting noise.
        key: random key; unused at temperature 0.

    Returns:
        float32 data.
    """
    x_X = jnp.zeros(shape_X)
    if config.temperature > 0.0:
        x_X = config.temperature * jax.random.normal(key, shape_X)
    numbers = jnp.asarray(schedule(levels, config.decode_steps))

    def step(x_X: Array, ends: tuple[Array, Array]) -> tuple[Array, None]:
        now, then = ends
        return euler_step(x_X, data_of(x_X, now), now / levels, then / levels), None

    return jax.lax.scan(step, x_X, (numbers[:-1], numbers[1:]))[0]
