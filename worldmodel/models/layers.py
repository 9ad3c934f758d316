"""Small parts of every model: norm, dropout, patches, kinds of state.

Legend: B batch · T time (frames) · N patches of a frame · H height · W width · C channels · D width · X any shape.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

NORM_EPSILON = 1e-6


class Stats(nnx.Variable):
    """State that training changes without a gradient (counters of codebook use)."""


def freeze(module: nnx.Module) -> None:
    """Turn every parameter of a module into plain state: no gradient, no optimizer, no weight decay touches it."""
    for _, node in list(nnx.iter_graph(module)):
        if isinstance(node, nnx.Module):
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Param):
                    setattr(node, name, Stats(value[...]))


def rms_norm(x_XD: Array, scale_D: Array) -> Array:
    """Root-mean-square norm over the last axis, computed in float32.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.

    Args:
        x_XD: any float type, any leading axes.
        scale_D: float32 gain.

    Returns:
        Array of the shape and type of x_XD.
    """
    x32_XD = x_XD.astype(jnp.float32)
    normed_XD = x32_XD * jax.lax.rsqrt(jnp.mean(x32_XD * x32_XD, axis=-1, keepdims=True) + NORM_EPSILON)
    return (normed_XD * scale_D).astype(x_XD.dtype)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero each element with probability `rate` and rescale the rest; the identity without a key (evaluation).

    Args:
        x: float array.
        rate: probability in [0, 1).
        key: random key, or None.

    Returns:
        Array like x.
    """
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def split_key(key: Array | None, count: int) -> list[Array | None]:
    """`count` keys, or as many Nones."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def patchify(frames_BTHWC: Array, patch: int) -> Array:
    """Cut frames into square patches, row by row: (B, T, H, W, C) to (B, T, N, patch * patch * C)."""
    B, T, H, W, C = frames_BTHWC.shape
    x = frames_BTHWC.reshape(B, T, H // patch, patch, W // patch, patch, C)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, T, (H // patch) * (W // patch), patch * patch * C)


def unpatchify(patches_BTNP: Array, patch: int, height: int, width: int) -> Array:
    """Inverse of `patchify`."""
    B, T, _, values = patches_BTNP.shape
    channels = values // (patch * patch)
    x = patches_BTNP.reshape(B, T, height // patch, width // patch, patch, patch, channels)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(B, T, height, width, channels)


def frames_to_unit(frames_BTHWC: Array) -> Array:
    """uint8 0..255 to float32 0..1; float frames pass unchanged."""
    if frames_BTHWC.dtype == jnp.uint8:
        return frames_BTHWC.astype(jnp.float32) / 255.0
    return frames_BTHWC.astype(jnp.float32)
