"""MaskGIT sampling of one frame: exact schedule, true confidences.

Legend: B batch · N tokens of a frame · P players · V codes · S decode steps · X any axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from worldmodel.config import RolloutConfig


def mask_counts(tokens: int, steps: int) -> tuple[int, ...]:
    """How many tokens stay masked after each decode step: a cosine schedule made exact.

    Source: Chang et al., "MaskGIT" (2022), section 3.3, cosine schedule. Ours rounds so that every step fixes at least
    one token and the last leaves none; more steps than tokens are not run.

    Args:
        tokens: N, all masked at first.
        steps: decode steps wanted.

    Returns:
        Strictly decreasing counts, the last 0, of length min(steps, tokens).
    """
    steps = min(steps, tokens)
    counts: list[int] = []
    left = tokens
    for step in range(1, steps + 1):
        wanted = round(tokens * float(np.cos(0.5 * np.pi * step / steps)))
        left = max(min(wanted, left - 1), steps - step)
        counts.append(left)
    return tuple(counts)


def unmask_step(
    logits_BNV: Array,
    drawn_BN: Array,
    tokens_BN: Array,
    masked_BN: Array,
    left: Array | int,
    choice_noise_BN: Array | None,
) -> tuple[Array, Array]:
    """Write the drawn tokens where a frame is masked, then mask the least confident of them again.

    Args:
        logits_BNV: float32, on the model's own scale.
        drawn_BN: tokens drawn from them.
        tokens_BN: the frame so far.
        masked_BN: True where it is still open.
        left: how many tokens stay masked, one number or one a clip (B, 1).
        choice_noise_BN: added to log-probabilities before they are ranked.

    Returns:
        Tokens and mask after this step; with `left` = 0 nothing is masked.
    """
    tokens_BN = jnp.where(masked_BN, drawn_BN.astype(jnp.int32), tokens_BN)
    log_probs_BNV = jax.nn.log_softmax(logits_BNV, axis=-1)
    confidence_BN = jnp.take_along_axis(log_probs_BNV, drawn_BN[..., None], axis=-1)[..., 0]
    if choice_noise_BN is not None:
        confidence_BN = confidence_BN + choice_noise_BN
    confidence_BN = jnp.where(masked_BN, confidence_BN, jnp.inf)  # what is fixed stays fixed
    rank_BN = jnp.argsort(jnp.argsort(confidence_BN, axis=-1, stable=True), axis=-1, stable=True)
    return tokens_BN, rank_BN < left


def sample_frame(
    logits_of: Callable[[Array, Array], Array], shape_BN: tuple[int, int], config: RolloutConfig, key: Array
) -> Array:
    """Fill in one frame, most confident tokens first.

    Args:
        logits_of: (tokens, masked) -> float32 logits (B, N, V) on the model's own scale.
        shape_BN: clips and tokens.
        config: decode steps and temperatures.
        key: random key; unused where both temperatures are 0.

    Returns:
        int32 tokens (B, N).
    """
    tokens_BN = jnp.zeros(shape_BN, jnp.int32)
    masked_BN = jnp.ones(shape_BN, bool)
    for index, left in enumerate(mask_counts(shape_BN[1], config.decode_steps)):
        logits_BNV = logits_of(tokens_BN, masked_BN)
        token_key, choice_key = jax.random.split(jax.random.fold_in(key, index))
        if config.temperature > 0.0:
            drawn_BN = jax.random.categorical(token_key, logits_BNV / config.temperature)
        else:
            drawn_BN = jnp.argmax(logits_BNV, axis=-1)
        noise_BN = None
        if config.choice_temperature > 0.0:
            noise_BN = config.choice_temperature * (left / shape_BN[1]) * jax.random.gumbel(choice_key, shape_BN)
        tokens_BN, masked_BN = unmask_step(logits_BNV, drawn_BN, tokens_BN, masked_BN, left, noise_BN)
    return tokens_BN


class LiveSampling(NamedTuple):
    """How each of several players samples, as arrays: changing a value compiles nothing."""

    temperature_P: Array
    """float32; 0 takes the most likely token."""
    decode_steps_P: Array
    """int32 in 1..N."""


def sample_live_frames(
    logits_of: Callable[[Array, Array], Array], tokens: int, sampling: LiveSampling, keys_P: Array
) -> tuple[Array, Array]:
    """`sample_frame` for players who each have their own temperature, decode steps and noise.

    A player's tokens do not depend on who else is in the batch: noise is drawn from the player's own key, and passes
    beyond a player's own decode steps leave that frame as it is.

    Args:
        logits_of: (tokens, masked) -> float32 logits (P, N, V) on the model's own scale.
        tokens: N.
        sampling: settings of the P players.
        keys_P: random key of each player's frame.

    Returns:
        int32 tokens (P, N), and float32 (P, N) the entropy in bits of each token's distribution when the whole frame
        was still masked: what the model did not know before it chose anything.
    """
    counts_SN = np.zeros((tokens + 1, tokens), np.int32)
    for steps in range(1, tokens + 1):
        counts_SN[steps, :steps] = mask_counts(tokens, steps)
    steps_P = jnp.clip(sampling.decode_steps_P, 1, tokens)
    left_PN = jnp.asarray(counts_SN)[steps_P]
    warm = jnp.any(sampling.temperature_P > 0.0)

    def one_pass(index: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        tokens_PN, masked_PN, entropy_PN = state
        logits_PNV = logits_of(tokens_PN, masked_PN)

        def noisy() -> Array:  # argmax(logits + T g) with Gumbel noise g is a draw from softmax(logits / T)
            draw = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, index), logits_PNV.shape[1:]))
            return logits_PNV + sampling.temperature_P[:, None, None] * draw(keys_P)

        drawn_PN = jnp.argmax(jax.lax.cond(warm, noisy, lambda: logits_PNV), axis=-1)
        left_P1 = jax.lax.dynamic_slice_in_dim(left_PN, index, 1, axis=1)
        entropy_PN = jnp.where(index == 0, entropy_bits(logits_PNV), entropy_PN)
        return *unmask_step(logits_PNV, drawn_PN, tokens_PN, masked_PN, left_P1, None), entropy_PN

    shape_PN = (keys_P.shape[0], tokens)
    start = (jnp.zeros(shape_PN, jnp.int32), jnp.ones(shape_PN, bool), jnp.zeros(shape_PN, jnp.float32))
    tokens_PN, _, entropy_PN = jax.lax.fori_loop(0, jnp.max(steps_P), one_pass, start)
    return tokens_PN, entropy_PN


def entropy_bits(logits_XV: Array) -> Array:
    """Entropy (...,) in bits of the softmax over the last axis."""
    log_probs_XV = jax.nn.log_softmax(logits_XV, axis=-1)
    return -jnp.sum(jnp.exp(log_probs_XV) * log_probs_XV, axis=-1) / np.log(2.0)
