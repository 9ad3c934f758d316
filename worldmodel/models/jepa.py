"""JEPA world model: frames to one embedding each, and the next embedding from past ones and actions; no pixels back.

Legend: B batch · T time · N patches of a frame · D width · L embedding size · A transitions (T - 1) · H horizon ·
M projections.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from common.sigreg.jax_impl import sigreg_jax
from worldmodel.config import JepaConfig
from worldmodel.models.blocks import STTransformer
from worldmodel.models.layers import frames_to_unit, patchify
from worldmodel.models.tokenizer import check_frames


class JepaOutput(NamedTuple):
    """Embeddings of all frames, and those predicted for frames 1..T-1."""

    embedding_BTL: Array
    predicted_BAL: Array


class Jepa(nnx.Module):
    """Encoder and action-conditioned predictor, trained end to end without a decoder, a teacher or a stop-gradient.

    Source: the LeWorldModel recipe: mean squared error of the next embedding plus SIGReg of the embeddings (Balestriero
    and LeCun, "LeJEPA", 2025), which alone keeps them from collapsing. Ours prepends the action to the embedding that
    it is taken at, and uses this room's blocks.
    """

    def __init__(self, config: JepaConfig, *, num_actions: int, rngs: nnx.Rngs) -> None:
        self.config, self.num_actions = config, num_actions
        frame, dim = config.frame, config.encoder.dim
        self.patch_in = nnx.Linear(frame.patch_values, dim, rngs=rngs)
        self.query = nnx.Param(0.02 * jax.random.normal(rngs.params(), (dim,)))
        self.encoder = STTransformer(config.encoder, rows=frame.rows, columns=frame.columns, prefix=1, rngs=rngs)
        self.embedding_out = nnx.Linear(dim, config.embedding_dim, rngs=rngs)
        width = config.predictor.dim
        self.embedding_in = nnx.Linear(config.embedding_dim, width, rngs=rngs)
        self.action_table = nnx.Param(0.5 * jax.random.normal(rngs.params(), (num_actions, width)))
        self.unknown_action = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
        self.predictor = STTransformer(config.predictor, rows=1, columns=1, prefix=1, rngs=rngs)
        self.predicted_out = nnx.Linear(width, config.embedding_dim, rngs=rngs)

    def encode(self, frames_BTHWC: Array, *, key: Array | None = None) -> Array:
        """Frames to embeddings, float32 (B, T, L); every frame alone."""
        check_frames(frames_BTHWC, self.config.frame)
        x_BTND = self.patch_in(patchify(frames_to_unit(frames_BTHWC), self.config.frame.patch) - 0.5)
        query_BT1D = jnp.broadcast_to(self.query[...], (*x_BTND.shape[:2], 1, x_BTND.shape[-1]))
        y_BTND = self.encoder(jnp.concatenate([query_BT1D, x_BTND], axis=2), key=key)
        return self.embedding_out(y_BTND[:, :, 0].astype(jnp.float32))

    def predict(self, embedding_BTL: Array, actions_BT: Array, *, key: Array | None = None) -> Array:
        """Embeddings one frame later, float32 (B, T, L), from those so far and the action taken at each, -1 unknown."""
        action_BTD = self.action_table[...][jnp.maximum(actions_BT, 0)]
        action_BTD = jnp.where((actions_BT >= 0)[..., None], action_BTD, self.unknown_action[...])
        x_BT2D = jnp.stack([action_BTD, self.embedding_in(embedding_BTL)], axis=2)
        return self.predicted_out(self.predictor(x_BT2D, key=key)[:, :, 1].astype(jnp.float32))

    def __call__(self, frames_BTHWC: Array, actions_BA: Array, *, key: Array | None = None) -> JepaOutput:
        """Embed all frames and predict each from those before it.

        Args:
            frames_BTHWC: clips.
            actions_BA: actions taken at frames 0..T-2.
            key: dropout key; None evaluates.
        """
        k1, k2 = (None, None) if key is None else jax.random.split(key)
        embedding_BTL = self.encode(frames_BTHWC, key=k1)
        return JepaOutput(embedding_BTL, self.predict(embedding_BTL[:, :-1], actions_BA, key=k2))

    def imagine(self, embedding_BTL: Array, actions_BA: Array) -> Array:
        """Embeddings (B, H, L) of frames after the T given ones, each prediction fed back.

        Args:
            embedding_BTL: of true frames.
            actions_BA: actions taken at frames 0 .. T + H - 2.

        Returns:
            H = A - T + 1 predicted embeddings.
        """
        T, H = embedding_BTL.shape[1], actions_BA.shape[1] - embedding_BTL.shape[1] + 1
        # One shape for every step: what lies behind the newest embedding is not seen by causal attention.
        whole_BSL = jnp.pad(embedding_BTL, ((0, 0), (0, H), (0, 0)))
        padded_BS = jnp.pad(actions_BA, ((0, 0), (0, 1)), constant_values=-1)

        def step(index: Array, whole_BSL: Array) -> Array:
            predicted_BSL = self.predict(whole_BSL, padded_BS)
            newest_BL = jax.lax.dynamic_index_in_dim(predicted_BSL, T + index - 1, axis=1, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(whole_BSL, newest_BL, T + index, axis=1)

        return jax.lax.fori_loop(0, H, step, whole_BSL)[:, T:]

    def regularity(self, embedding_BTL: Array, key: Array) -> Array:
        """SIGReg of the embeddings, one statistic a frame number over the batch, on fresh random directions."""
        A_DM = jax.random.normal(key, (self.config.embedding_dim, self.config.projections))
        A_DM = A_DM / jnp.linalg.norm(A_DM, axis=0, keepdims=True)
        return sigreg_jax(embedding_BTL, A_DM, per_timestep=True)
