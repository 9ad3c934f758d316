"""Latent action model: what happened between two frames, as one of a few codes, learned without action labels.

Legend: B batch · T time · N patches of a frame · P numbers of a patch · D width · L latent size · A transitions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from worldmodel.config import LamConfig
from worldmodel.models.blocks import STTransformer
from worldmodel.models.layers import frames_to_unit, patchify, unpatchify
from worldmodel.models.quantizer import Quantized, VectorQuantizer
from worldmodel.models.tokenizer import check_frames, encode_in_chunks


class LamOutput(NamedTuple):
    """Predicted frames 1..T-1 in 0..1 (unclipped) and the action bottleneck's output."""

    frames_BAHWC: Array
    quantized: Quantized


class ActionEncoder(nnx.Module):
    """Frames to one latent action per transition: action t is read at frame t + 1, which sees nothing later.

    Source: Bruce et al., "Genie" (2024), section 2.1, "Latent action model".
    """

    def __init__(self, config: LamConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        frame = config.frame
        self.patch_in = nnx.Linear(frame.patch_values, config.encoder.dim, rngs=rngs)
        self.query = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.encoder.dim,)))
        self.encoder = STTransformer(config.encoder, rows=frame.rows, columns=frame.columns, prefix=1, rngs=rngs)
        self.latent_out = nnx.Linear(config.encoder.dim, config.quantizer.latent_dim, rngs=rngs)
        self.quantizer = VectorQuantizer(config.quantizer, rngs=rngs)

    def encode_latent(self, frames_BTHWC: Array, *, key: Array | None = None) -> Array:
        """Frames to action latents before the bottleneck, float32 (B, T - 1, L)."""
        check_frames(frames_BTHWC, self.config.frame)
        patches_BTNP = patchify(frames_to_unit(frames_BTHWC), self.config.frame.patch)
        x_BTND = self.patch_in(patches_BTNP - 0.5)
        query_BT1D = jnp.broadcast_to(self.query[...], (*x_BTND.shape[:2], 1, x_BTND.shape[-1]))
        y_BTND = self.encoder(jnp.concatenate([query_BT1D, x_BTND], axis=2), key=key)
        return self.latent_out(y_BTND[:, 1:, 0].astype(jnp.float32))

    def __call__(self, frames_BTHWC: Array, *, key: Array | None = None) -> Quantized:
        """Quantized latent actions of the T - 1 transitions; with a key (training) bookkeeping is on."""
        k1, k2 = (None, None) if key is None else jax.random.split(key)
        return self.quantizer(self.encode_latent(frames_BTHWC, key=k1), key=k2)

    def initialize(self, frames_BTHWC: np.ndarray, key: Array) -> None:
        """k-means on the action latents of real clips, where the config asks for it."""
        if self.config.quantizer.kmeans_init:
            self.quantizer.initialize(encode_in_chunks(self.encode_latent, frames_BTHWC), key)


class LatentActionModel(nnx.Module):
    """Action encoder with a decoder that must predict the next frame from the past ones and the latent action.

    Source: as `ActionEncoder`; our decoder predicts the *change* of a patch, so that it starts at copy-last-frame.
    """

    def __init__(self, config: LamConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        frame = config.frame
        self.actions = ActionEncoder(config, rngs=rngs)
        self.patch_in = nnx.Linear(frame.patch_values, config.decoder.dim, rngs=rngs)
        self.action_in = nnx.Linear(config.quantizer.latent_dim, config.decoder.dim, rngs=rngs)
        self.decoder = STTransformer(config.decoder, rows=frame.rows, columns=frame.columns, prefix=1, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.patch_out = nnx.Linear(config.decoder.dim, frame.patch_values, kernel_init=zeros, rngs=rngs)

    def __call__(self, frames_BTHWC: Array, *, key: Array | None = None) -> LamOutput:
        """Predict frames 1..T-1 from frames 0..T-2 and the latent actions between them."""
        frame = self.config.frame
        k1, k2 = (None, None) if key is None else jax.random.split(key)
        quantized = self.actions(frames_BTHWC, key=k1)
        past_BANP = patchify(frames_to_unit(frames_BTHWC[:, :-1]), frame.patch)
        action_BA1D = self.action_in(quantized.latent_XL)[:, :, None]
        x_BAND = jnp.concatenate([action_BA1D, self.patch_in(past_BANP - 0.5)], axis=2)
        change_BANP = self.patch_out(self.decoder(x_BAND, key=k2)[:, :, 1:].astype(jnp.float32))
        return LamOutput(unpatchify(past_BANP + change_BANP, frame.patch, frame.height, frame.width), quantized)

    def initialize(self, frames_BTHWC: np.ndarray, key: Array) -> None:
        """See `ActionEncoder.initialize`."""
        self.actions.initialize(frames_BTHWC, key)
