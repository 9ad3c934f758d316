"""Flow matching on the straight path from noise to data: levels, velocities, one Euler step, shortcut targets.

A level tau runs from 0 (noise) to 1 (data): x(tau) = tau * data + (1 - tau) * noise. A network may predict the data x
or the velocity v = data - noise; both say the same: data = x(tau) + (1 - tau) * v.

Legend: X any axes; levels have the leading axes of what they belong to and broadcast over the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def mix(data_X: Array, noise_X: Array, level: Array | float) -> Array:
    """The point of the path at a level."""
    return level * data_X + (1.0 - level) * noise_X


def velocity_of(x_X: Array, data_X: Array, level: Array | float) -> Array:
    """Velocity that a prediction of the data stands for at a level below 1."""
    return (data_X - x_X) / (1.0 - level)


def data_of(x_X: Array, velocity_X: Array, level: Array | float) -> Array:
    """Prediction of the data that a velocity stands for."""
    return x_X + (1.0 - level) * velocity_X


def euler_step(x_X: Array, data_X: Array, level: Array | float, next_level: Array | float) -> Array:
    """From one level to a higher one, along the straight line to the predicted data.

    The noise that the prediction leaves is (x - level * data) / (1 - level); mixed with the predicted data at the next
    level it gives this step. So a step keeps the right amount of noise for its level: writing the prediction itself
    back, as the published sampler does, would not, and every later input would be off the training distribution.
    """
    return x_X + (next_level - level) * velocity_of(x_X, data_X, level)


def ramp(level: Array) -> Array:
    """Weight of a level in the loss, 0.9 tau + 0.1: low levels carry little signal.

    Source: Hafner et al., "Training Agents Inside of Scalable World Models" (Dreamer 4, 2025), section 3.2.
    """
    return 0.9 * level + 0.1


def schedule(levels: int, steps: int) -> tuple[int, ...]:
    """Level numbers 0 ... levels of a sampler with so many steps, first and last included, all of them trained ones.

    Args:
        levels: L; number l stands for tau = l / L.
        steps: Euler steps wanted; more than L are not run.

    Returns:
        Strictly increasing numbers from 0 to L, min(steps, L) + 1 of them.
    """
    steps = min(steps, levels)
    return tuple(round(levels * step / steps) for step in range(steps + 1))


def shortcut_target(
    predict: Callable[[Array, Array, Array], Array], x_X: Array, level: Array, step: Array
) -> Array:
    """Data that one step should predict so that it lands where two steps of half its size do.

    Source: Frans et al., "One Step Diffusion via Shortcut Models" (2024), equation 4, for a network that predicts data
    (Dreamer 4, 2025, section 3.2).

    Args:
        predict: (x, level, step size) -> predicted data; without gradient.
        x_X: noised input at `level`.
        level: broadcast against x.
        step: its step size; level + step is at most 1.

    Returns:
        Target for the predicted data at (x, level, step), without gradient.
    """
    half = 0.5 * step
    first_X = velocity_of(x_X, predict(x_X, level, half), level)
    halfway_X = x_X + half * first_X
    second_X = velocity_of(halfway_X, predict(halfway_X, level + half, half), level + half)
    return jax.lax.stop_gradient(data_of(x_X, 0.5 * (first_X + second_X), level))


def draw_levels(key: Array, shape: tuple[int, ...], levels: int) -> Array:
    """Level numbers 0 ... levels - 1, uniform."""
    return jax.random.randint(key, shape, 0, levels)


def draw_steps(key: Array, shape: tuple[int, ...], levels: int) -> tuple[Array, Array]:
    """Step sizes and levels that they start at, as a shortcut model is trained on them.

    Args:
        key: random key.
        shape: of the result.
        levels: a power of two.

    Returns:
        Exponents e in 1 ... log2(levels) uniformly: a step of 2^e / levels; and level numbers, multiples of 2^e.
    """
    exponent_key, place_key = jax.random.split(key)
    exponent = jax.random.randint(exponent_key, shape, 1, int(np.log2(levels)) + 1)
    size = 2**exponent
    place = jnp.floor(jax.random.uniform(place_key, shape) * (levels // size)).astype(jnp.int32)
    return exponent, place * size
