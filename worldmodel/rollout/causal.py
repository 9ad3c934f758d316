"""Autoregressive sampling of one frame, token after token.

Legend: B batch · N tokens of a frame · V codes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from worldmodel.config import RolloutConfig


def sample_frame_in_order(
    logits_of: Callable[[Array], Array], shape_BN: tuple[int, int], config: RolloutConfig, key: Array
) -> Array:
    """Fill in one frame in the order of its places.

    Args:
        logits_of: tokens -> float32 logits (B, N, V); those of place n do not depend on tokens n, n + 1, ...
        shape_BN: clips and tokens.
        config: temperature; the number of passes is N.
        key: random key; unused at temperature 0.

    Returns:
        int32 tokens (B, N).
    """

    def one_place(place: Array, tokens_BN: Array) -> Array:
        logits_BV = jax.lax.dynamic_index_in_dim(logits_of(tokens_BN), place, axis=1, keepdims=False)
        if config.temperature > 0.0:
            drawn_B = jax.random.categorical(jax.random.fold_in(key, place), logits_BV / config.temperature)
        else:
            drawn_B = jnp.argmax(logits_BV, axis=-1)
        return jax.lax.dynamic_update_index_in_dim(tokens_BN, drawn_B.astype(jnp.int32), place, axis=1)

    return jax.lax.fori_loop(0, shape_BN[1], one_place, jnp.zeros(shape_BN, jnp.int32))
