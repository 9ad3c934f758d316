"""MaskGIT dynamics: the tokens of the next frame from past tokens and an action, by filling in masked tokens.

Legend: B batch · T time · N tokens of a frame · D width · V token codes · L token latent size · A transitions (T - 1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from worldmodel.config import DynamicsConfig, FrameConfig, LamConfig
from worldmodel.models.blocks import LayerMemory, Stats, STTransformer, freeze
from worldmodel.models.lam import ActionEncoder

UNKNOWN_ACTION = -1


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


class Dynamics(nnx.Module):
    """Next-frame token model, conditioned on recorded or latent actions.

    Source: Bruce et al., "Genie" (2024), section 2.1, "Dynamics model", and Chang et al., "MaskGIT" (2022). Ours can
    train on a clean history (`DynamicsConfig.masking = current`) and prepends actions by default.

    Actions are numbered by the frame that they are taken at: action t leads from frame t to frame t + 1, and conditions
    frame t + 1. Frame 0 is conditioned on a learned "unknown" vector, as is any action -1.
    """

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
        self.config, self.frame = config, frame
        self.num_codes = codes_VL.shape[0]
        dim = config.blocks.dim
        prefix = 1 if config.action_conditioning == "prepend" else 0
        self.blocks = STTransformer(config.blocks, rows=frame.rows, columns=frame.columns, prefix=prefix, rngs=rngs)
        if config.tie_codebook:
            self.codes_VL = Stats(jnp.asarray(standardize_codes(codes_VL), jnp.float32))
            self.token_in = nnx.Linear(codes_VL.shape[1], dim, use_bias=False, rngs=rngs)
            self.token_table = nnx.Param(jnp.zeros((self.num_codes, dim)))
        else:
            self.token_table = nnx.Param(jax.random.normal(rngs.params(), (self.num_codes, dim)))
        self.mask_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (dim,)))
        self.unknown_action = nnx.Param(0.02 * jax.random.normal(rngs.params(), (dim,)))
        if config.action_source == "ground-truth":
            self.num_actions = num_actions
            self.action_table = nnx.Param(0.5 * jax.random.normal(rngs.params(), (num_actions, dim)))
        else:
            lam = lam or LamConfig()
            self.num_actions = lam.quantizer.codes
            self.lam = ActionEncoder(lam, rngs=rngs)
            if config.action_source == "latent-frozen":
                freeze(self.lam)
            self.action_in = nnx.Linear(lam.quantizer.latent_dim, dim, rngs=rngs)
        self.head = nnx.Linear(dim, dim, use_bias=False, rngs=rngs)
        self.head_bias = nnx.Param(jnp.zeros((self.num_codes,)))

    def embed_action_codes(self, actions_BA: Array) -> Array:
        """Action numbers (recorded or latent; -1 unknown) to vectors (B, A, D)."""
        known = (actions_BA >= 0)[..., None]
        index_BA = jnp.maximum(actions_BA, 0)
        if self.config.action_source == "ground-truth":
            vector_BAD = self.action_table[...][index_BA]
        else:
            vector_BAD = self.action_in(self.lam.quantizer.lookup(index_BA))
        return jnp.where(known, vector_BAD, self.unknown_action[...])

    def shift_actions(self, vector_BAD: Array) -> Array:
        """Action vectors of T - 1 transitions to the conditioning of T frames: (B, T, D), frame 0 unknown."""
        first_B1D = jnp.broadcast_to(self.unknown_action[...], (vector_BAD.shape[0], 1, vector_BAD.shape[-1]))
        return jnp.concatenate([first_B1D, vector_BAD.astype(first_B1D.dtype)], axis=1)

    def token_vectors(self) -> Array:
        """float32 (V, D) vectors that embed tokens and score them."""
        table_VD = self.token_table[...]
        return self.token_in(self.codes_VL[...]) + table_VD if self.config.tie_codebook else table_VD

    def embed(self, tokens_BTN: Array, masked_BTN: Array | None, action_BTD: Array, table_VD: Array) -> Array:
        """Tokens and conditioning to transformer input (B, T, prefix + N, D)."""
        x_BTND = table_VD[tokens_BTN]
        if masked_BTN is not None:
            x_BTND = jnp.where(masked_BTN[..., None], self.mask_token[...], x_BTND)
        if self.config.action_conditioning == "prepend":
            return jnp.concatenate([action_BTD[:, :, None], x_BTND], axis=2)
        return x_BTND + action_BTD[:, :, None]

    def score(self, hidden_BTND: Array, table_VD: Array) -> Array:
        """Transformer output to float32 logits of the N frame tokens."""
        hidden_BTND = hidden_BTND[:, :, hidden_BTND.shape[2] - self.frame.tokens :]
        projected_BTND = self.head(hidden_BTND.astype(jnp.float32))
        scale = self.config.blocks.dim**-0.5
        return (projected_BTND @ table_VD.T) * scale + self.head_bias[...]

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

    def next_frame_logits(self, tokens_BTN: Array, masked_BN: Array, action_BTD: Array) -> Array:
        """Logits (B, N, V) of the last frame, partly masked, after clean earlier frames; recomputes all of them."""
        table_VD = self.token_vectors()
        T = tokens_BTN.shape[1]
        last_T = (jnp.arange(T) == T - 1)[None, :, None]
        x_BTND = self.embed(tokens_BTN, masked_BN[:, None] & last_T, action_BTD, table_VD)
        return self.score(self.blocks(x_BTND)[:, -1:], table_VD)[:, 0]

    def cached_logits(
        self, tokens_BN: Array, masked_BN: Array | None, action_BD: Array, memory: list[LayerMemory], time: Array
    ) -> tuple[Array, list[LayerMemory]]:
        """As `next_frame_logits` for frame number `time`, from remembered keys and values of the frames before it.

        Args:
            tokens_BN: tokens of the frame.
            masked_BN: True where hidden; None for a finished frame.
            action_BD: conditioning of this frame.
            memory: keys and values of earlier frames.
            time: int32 scalar, number of this frame.

        Returns:
            Logits (B, N, V) and the memory with this frame, to be kept only when it is finished.
        """
        table_VD = self.token_vectors()
        masked_B1N = None if masked_BN is None else masked_BN[:, None]
        x_B1ND = self.embed(tokens_BN[:, None], masked_B1N, action_BD[:, None], table_VD)
        hidden_BND, memory = self.blocks.cached_frame(x_B1ND[:, 0], memory, time)
        return self.score(hidden_BND[:, None], table_VD)[:, 0], memory

    def infer_actions(self, frames_BTHWC: Array) -> Array:
        """Latent action codes (B, T - 1) that the action model reads from true frames."""
        return self.lam(frames_BTHWC).codes_X
