"""Dynamics over discrete tokens: embedding and scoring by one table, MaskGIT, and autoregression inside a frame.

Legend: B batch · T time · N tokens of a frame · D width · V token codes · L token latent size.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from worldmodel.config import DynamicsConfig, FrameConfig, LamConfig
from worldmodel.models.blocks import Memory
from worldmodel.models.dynamics import Dynamics, Scalars
from worldmodel.models.layers import Stats


def standardize_codes(codes_VL: Any) -> Any:
    """The tokenizer's code vectors (V, L) as the dynamics sees them: mean 0 of each coordinate, one spread of 1."""
    return (codes_VL - codes_VL.mean(axis=0)) / codes_VL.std().clip(1e-6)


class DynamicsOutput(NamedTuple):
    """Logits of every token and which of them were masked (and are therefore scored)."""

    logits_BTNV: Array
    masked_BTN: Array


def draw_mask(key: Array, shape_BTN: tuple[int, ...], low: float, high: float, *, per_frame: bool) -> Array:
    """Random token masks: ratio ~ U(low, high) per clip or per frame, then one coin of that ratio per token.

    Args:
        key: random key.
        shape_BTN: clips, frames, tokens.
        low: smallest ratio.
        high: largest ratio.
        per_frame: draw the ratio anew for each frame.

    Returns:
        bool (B, T, N), True where masked. Frame 0 is the prompt and is never masked.
    """
    B, T, _ = shape_BTN
    ratio_key, coin_key = jax.random.split(key)
    ratio = jax.random.uniform(ratio_key, (B, T if per_frame else 1, 1), minval=low, maxval=high)
    masked_BTN = jax.random.uniform(coin_key, shape_BTN) < ratio
    return masked_BTN & (jnp.arange(T) > 0)[None, :, None]


class TokenDynamics(Dynamics):
    """Tokens to vectors and hidden states to logits, through one table that may be tied to the tokenizer's codebook."""

    def __init__(
        self,
        config: DynamicsConfig,
        frame: FrameConfig,
        codes_VL: np.ndarray,
        *,
        num_actions: int,
        lam: LamConfig | None,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, frame, num_actions=num_actions, lam=lam, rngs=rngs)
        self.num_codes = codes_VL.shape[0]
        dim = config.blocks.dim
        if config.tie_codebook:
            self.codes_VL = Stats(jnp.asarray(standardize_codes(codes_VL), jnp.float32))
            self.token_in = nnx.Linear(codes_VL.shape[1], dim, use_bias=False, rngs=rngs)
            self.token_table = nnx.Param(jnp.zeros((self.num_codes, dim)))
        else:
            self.token_table = nnx.Param(jax.random.normal(rngs.params(), (self.num_codes, dim)))
        self.mask_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (dim,)))
        self.head = nnx.Linear(dim, dim, use_bias=False, rngs=rngs)
        self.head_bias = nnx.Param(jnp.zeros((self.num_codes,)))

    def token_vectors(self) -> Array:
        """float32 (V, D) vectors that embed tokens and score them."""
        table_VD = self.token_table[...]
        return self.token_in(self.codes_VL[...]) + table_VD if self.config.tie_codebook else table_VD

    def embed(self, tokens_BTN: Array, masked_BTN: Array | None, action_BTD: Array, table_VD: Array) -> Array:
        """Tokens and conditioning to transformer input (B, T, prefix + N, D)."""
        x_BTND = table_VD[tokens_BTN]
        if masked_BTN is not None:
            x_BTND = jnp.where(masked_BTN[..., None], self.mask_token[...], x_BTND)
        return self.with_action(x_BTND, action_BTD)

    def score(self, hidden_BTND: Array, table_VD: Array) -> Array:
        """Transformer output to float32 logits of the N frame tokens."""
        hidden_BTND = hidden_BTND[:, :, hidden_BTND.shape[2] - self.frame.tokens :]
        projected_BTND = self.head(hidden_BTND.astype(jnp.float32))
        scale = self.config.blocks.dim**-0.5
        return (projected_BTND @ table_VD.T) * scale + self.head_bias[...]

    def weighted_loss(self, logits_BTNV: Array, tokens_BTN: Array, weight_BTN: Array) -> tuple[Array, Scalars]:
        """Cross-entropy (and the z-loss of the config) under weights that sum to 1."""
        nats_BTN = optax.softmax_cross_entropy_with_integer_labels(logits_BTNV, tokens_BTN)
        cross_entropy = jnp.sum(nats_BTN * weight_BTN)
        total, scalars = cross_entropy, {"ce_nats": cross_entropy}
        if self.config.z_loss > 0.0:
            z_loss = jnp.sum(jax.nn.logsumexp(logits_BTNV, axis=-1) ** 2 * weight_BTN)
            total, scalars["z_nats2"] = total + self.config.z_loss * z_loss, z_loss
        return total, scalars

    @abstractmethod
    def teacher_forced_logits(self, tokens_BTN: Array, action_BTD: Array) -> Array:
        """Logits (B, T - 1, N, V) of frames 1..T-1 given all true earlier frames, by which bits are counted."""

    def remember(self, frame_BX: Array, action_BD: Array, memory: Memory, time: Array, key: Array) -> Memory:
        """See `Dynamics.remember`: the finished tokens, all of them visible to each other."""
        x_B1ND = self.embed(frame_BX[:, None], None, action_BD[:, None], self.token_vectors())
        return self.blocks.cached_frame(x_B1ND[:, 0], memory, time)[1]

    def frame_bits(self, tokens_BTN: Array, action_BTD: Array) -> Array:
        """Bits (B, T - 1) of every frame but the first, given the true ones before it, on unscaled logits."""
        logits = self.teacher_forced_logits(tokens_BTN, action_BTD)
        nats_BAN = optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BTN[:, 1:])
        return jnp.sum(nats_BAN, axis=-1) / jnp.log(2.0)


class MaskGitDynamics(TokenDynamics):
    """All tokens of a frame at once, by filling in masked ones.

    Source: Chang et al., "MaskGIT" (2022), section 3. Ours can train on a clean history (`DynamicsConfig.masking =
    current`).
    """

    def __call__(
        self, tokens_BTN: Array, action_BTD: Array, masked_BTN: Array, *, key: Array | None = None
    ) -> DynamicsOutput:
        """Logits of masked tokens, in the masking scheme that the config trains.

        Args:
            tokens_BTN: true tokens, int32.
            action_BTD: conditioning of each frame (`shift_actions`).
            masked_BTN: True where a token is hidden.
            key: dropout key; None evaluates.

        Returns:
            Logits of every place and the mask.
        """
        table_VD = self.token_vectors()
        masked_BTND = self.embed(tokens_BTN, masked_BTN, action_BTD, table_VD)
        if self.config.masking == "current":
            clean_BTND = self.embed(tokens_BTN, None, action_BTD, table_VD)
            hidden_BTND = self.blocks.two_stream(clean_BTND, masked_BTND, key=key)
        else:
            hidden_BTND = self.blocks(masked_BTND, key=key)
        return DynamicsOutput(self.score(hidden_BTND, table_VD), masked_BTN)

    def loss(self, frames_BTX: Array, action_BTD: Array, key: Array) -> tuple[Array, Scalars]:
        """See `Dynamics.loss`: mean cross-entropy of the masked tokens."""
        config = self.config
        mask_key, drop_key = jax.random.split(key)
        per_frame = config.masking == "current"
        masked_BTN = draw_mask(mask_key, frames_BTX.shape, config.mask_low, config.mask_high, per_frame=per_frame)
        output = self(frames_BTX, action_BTD, masked_BTN, key=drop_key)
        weight_BTN = masked_BTN / jnp.maximum(jnp.sum(masked_BTN), 1)
        return self.weighted_loss(output.logits_BTNV, frames_BTX, weight_BTN)

    def report(self, frames_BTX: Array, action_BTD: Array) -> Scalars:
        """See `Dynamics.report`: every token of every frame but the first masked."""
        masked_BTN = draw_mask(jax.random.key(0), frames_BTX.shape, 1.0, 1.0, per_frame=True)
        logits = self(frames_BTX, action_BTD, masked_BTN).logits_BTNV[:, 1:]
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, frames_BTX[:, 1:])
        return {
            "full_mask_ce_nats": jnp.mean(nats),
            "full_mask_accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == frames_BTX[:, 1:]),
        }

    def teacher_forced_logits(self, tokens_BTN: Array, action_BTD: Array) -> Array:
        """See `TokenDynamics.teacher_forced_logits`: every token of the scored frame is masked."""
        if self.config.masking == "current":
            masked_BTN = draw_mask(jax.random.key(0), tokens_BTN.shape, 1.0, 1.0, per_frame=True)
            return self(tokens_BTN, action_BTD, masked_BTN).logits_BTNV[:, 1:]
        # One stream with all frames masked would hide the history too: score one frame at a time.
        hidden_BN = jnp.ones((tokens_BTN.shape[0], tokens_BTN.shape[2]), bool)
        frames = [
            self.next_frame_logits(tokens_BTN[:, : t + 1], hidden_BN, action_BTD[:, : t + 1])
            for t in range(1, tokens_BTN.shape[1])
        ]
        return jnp.stack(frames, axis=1)

    def next_frame_logits(self, tokens_BTN: Array, masked_BN: Array, action_BTD: Array) -> Array:
        """Logits (B, N, V) of the last frame, partly masked, after clean earlier frames; recomputes all of them."""
        table_VD = self.token_vectors()
        T = tokens_BTN.shape[1]
        last_T = (jnp.arange(T) == T - 1)[None, :, None]
        x_BTND = self.embed(tokens_BTN, masked_BN[:, None] & last_T, action_BTD, table_VD)
        return self.score(self.blocks(x_BTND)[:, -1:], table_VD)[:, 0]

    def cached_logits(
        self, tokens_BN: Array, masked_BN: Array | None, action_BD: Array, memory: Memory, time: Array
    ) -> tuple[Array, Memory]:
        """As `next_frame_logits` for frame number `time`, from what is remembered of the frames before it.

        Args:
            tokens_BN: tokens of the frame.
            masked_BN: True where hidden; None for a finished frame.
            action_BD: conditioning of this frame.
            memory: of earlier frames.
            time: int32 scalar, number of this frame.

        Returns:
            Logits (B, N, V) and the memory with this frame, to be kept only when it is finished.
        """
        table_VD = self.token_vectors()
        masked_B1N = None if masked_BN is None else masked_BN[:, None]
        x_B1ND = self.embed(tokens_BN[:, None], masked_B1N, action_BD[:, None], table_VD)
        hidden_BND, memory = self.blocks.cached_frame(x_B1ND[:, 0], memory, time)
        return self.score(hidden_BND[:, None], table_VD)[:, 0], memory


class CausalDynamics(TokenDynamics):
    """One token after the other, row by row, each from the whole past and the earlier tokens of its own frame.

    Source: the autoregressive dynamics of Jasmine (2025). There a place attends along time to the same place of past
    frames, which knew only the tokens before it: the later tokens of the past frame never reach it. Ours has two
    streams: past frames are complete, every token of them sees every other, and only inside the frame to come does a
    token see no later one.
    """

    @property
    def seen_NN(self) -> Array:
        """In an unfinished frame: the prefix and the places up to a token's own (each holds the token before it)."""
        tokens = self.blocks.tokens
        return jnp.tril(jnp.ones((tokens, tokens), bool))

    def embed_shifted(self, tokens_BTN: Array, action_BTD: Array, table_VD: Array) -> Array:
        """The frame to come, as its places see it: place n holds token n - 1, place 0 the learned start vector."""
        x_BTND = table_VD[tokens_BTN]
        start_BT1D = jnp.broadcast_to(self.mask_token[...], (*x_BTND.shape[:2], 1, x_BTND.shape[-1]))
        return self.with_action(jnp.concatenate([start_BT1D, x_BTND[:, :, :-1]], axis=2), action_BTD)

    def __call__(self, tokens_BTN: Array, action_BTD: Array, *, key: Array | None = None) -> Array:
        """Logits (B, T, N, V): of each token given all earlier frames and the earlier tokens of its frame.

        Args:
            tokens_BTN: true tokens, int32.
            action_BTD: conditioning of each frame.
            key: dropout key; None evaluates.

        Returns:
            float32 logits.
        """
        table_VD = self.token_vectors()
        hidden_BTND = self.blocks.two_stream(
            self.embed(tokens_BTN, None, action_BTD, table_VD),
            self.embed_shifted(tokens_BTN, action_BTD, table_VD),
            seen_NN=self.seen_NN,
            key=key,
        )
        return self.score(hidden_BTND, table_VD)

    def loss(self, frames_BTX: Array, action_BTD: Array, key: Array) -> tuple[Array, Scalars]:
        """See `Dynamics.loss`: mean cross-entropy of all tokens of frames 1..T-1."""
        logits_BANV = self(frames_BTX, action_BTD, key=key)[:, 1:]
        weight_BAN = jnp.full(logits_BANV.shape[:3], 1.0 / np.prod(logits_BANV.shape[:3]))
        return self.weighted_loss(logits_BANV, frames_BTX[:, 1:], weight_BAN)

    def report(self, frames_BTX: Array, action_BTD: Array) -> Scalars:
        """See `Dynamics.report`: here each token knows the true ones before it, which masked scores do not."""
        logits = self.teacher_forced_logits(frames_BTX, action_BTD)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, frames_BTX[:, 1:])
        return {
            "teacher_forced_ce_nats": jnp.mean(nats),
            "teacher_forced_accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == frames_BTX[:, 1:]),
        }

    def teacher_forced_logits(self, tokens_BTN: Array, action_BTD: Array) -> Array:
        """See `TokenDynamics.teacher_forced_logits`: the chain rule, token by token."""
        return self(tokens_BTN, action_BTD)[:, 1:]

    def cached_logits(self, tokens_BN: Array, action_BD: Array, memory: Memory, time: Array) -> Array:
        """Logits (B, N, V) of frame number `time`; those of token n do not depend on tokens n, n + 1, ..."""
        table_VD = self.token_vectors()
        x_B1ND = self.embed_shifted(tokens_BN[:, None], action_BD[:, None], table_VD)
        hidden_BND, _ = self.blocks.cached_frame(x_B1ND[:, 0], memory, time, seen_NN=self.seen_NN)
        return self.score(hidden_BND[:, None], table_VD)[:, 0]
