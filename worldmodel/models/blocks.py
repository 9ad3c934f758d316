"""Spatio-temporal transformer: attention inside a frame, a mixer along time, feed-forward.

The mixer is attention along time at each place, Mamba-2 along time at each place, or attention over space and time
together (then there is no attention inside a frame beside it).

Legend: B batch · T time (frames) · N tokens of a frame, extra tokens such as an action included · D model width ·
A rotation angles · F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from common.errors import ConfigError
from worldmodel.config import BlockConfig
from worldmodel.models.attention import JointAttention, SpatialAttention, TemporalAttention, spatial_angles
from worldmodel.models.layers import dropout, rms_norm, split_key
from worldmodel.models.mamba import Mamba2Mixer

Memory = list[Any]
"""What each layer remembers of the frames before: a `LayerMemory` or a `ScanMemory`, by its mixer."""


class STBlock(nnx.Module):
    """One pre-norm block: x += space(x); x += mixer(x); x += feed-forward(x)."""

    def __init__(self, config: BlockConfig, *, rows: int, columns: int, prefix: int, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype = jnp.dtype(config.compute_dtype)
        if not config.joint:
            self.space_norm = nnx.Param(jnp.ones((config.dim,), jnp.float32))
            self.space = SpatialAttention(config, rngs=rngs)
        if config.temporal:
            self.time_norm = nnx.Param(jnp.ones((config.dim,), jnp.float32))
            if config.joint:
                self.time = JointAttention(config, rows=rows, columns=columns, prefix=prefix, rngs=rngs)
            else:
                self.time = (Mamba2Mixer if config.mixer == "mamba2" else TemporalAttention)(config, rngs=rngs)
        self.ffn_norm = nnx.Param(jnp.ones((config.dim,), jnp.float32))
        self.ffn_in = nnx.Linear(config.dim, config.ffn_dim, dtype=dtype, rngs=rngs)
        self.ffn_out = nnx.Linear(config.ffn_dim, config.dim, dtype=dtype, rngs=rngs)

    def add(self, x_BTND: Array, o_BTND: Array, key: Array | None) -> Array:
        """The residual sum, with dropout on what is added."""
        return x_BTND + dropout(o_BTND, self.config.dropout, key)

    def attend_space(
        self, x_BTND: Array, angle_NA: Array | None, key: Array | None, seen_NN: Array | None = None
    ) -> Array:
        """Residual attention among the tokens of each frame, where this block has one."""
        if self.config.joint:
            return x_BTND
        return self.add(x_BTND, self.space(rms_norm(x_BTND, self.space_norm[...]), angle_NA, seen_NN), key)

    def feed_forward(self, x_BTND: Array, key: Array | None) -> Array:
        """Residual two-layer perceptron with GELU."""
        h_BTNF = jax.nn.gelu(self.ffn_in(rms_norm(x_BTND, self.ffn_norm[...])))
        return self.add(x_BTND, self.ffn_out(h_BTNF), key)


class STTransformer(nnx.Module):
    """A stack of `STBlock`s with position codes, in three exact forms: clips, two streams, one cached frame."""

    def __init__(self, config: BlockConfig, *, rows: int, columns: int, prefix: int = 0, rngs: nnx.Rngs) -> None:
        self.config, self.rows, self.columns, self.prefix = config, rows, columns, prefix
        self.tokens = prefix + rows * columns
        for index in range(config.layers):
            setattr(self, f"layer_{index}", STBlock(config, rows=rows, columns=columns, prefix=prefix, rngs=rngs))
        # With rope this table tells absolute place (borders); rotations alone carry only differences.
        self.space_table = nnx.Param(0.02 * jax.random.normal(rngs.params(), (self.tokens, config.dim)))
        if config.temporal and config.position == "learned":
            self.time_table = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.max_frames, config.dim)))
        self.final_norm = nnx.Param(jnp.ones((config.dim,), jnp.float32))

    @property
    def blocks(self) -> list[STBlock]:
        """The blocks, first to last."""
        return [getattr(self, f"layer_{index}") for index in range(self.config.layers)]

    def _embed_positions(self, x_BTND: Array, time_T: Array) -> Array:
        if x_BTND.shape[2] != self.tokens:
            raise ConfigError(f"this transformer was built for {self.tokens} tokens a frame, got {x_BTND.shape[2]}")
        x_BTND = x_BTND + self.space_table[...]
        if self.config.temporal and self.config.position == "learned":
            x_BTND = x_BTND + self.time_table[...][time_T][:, None, :]
        return x_BTND.astype(jnp.dtype(self.config.compute_dtype))

    def check_length(self, frames: int) -> None:
        """Raise ConfigError when a learned time table is too short for `frames`."""
        if self.config.temporal and self.config.position == "learned" and frames > self.config.max_frames:
            raise ConfigError(
                f"{frames} frames exceed the learned time table of {self.config.max_frames}; "
                "train with a larger max_frames or with position rope, which has no limit"
            )

    def _space_angles(self) -> Array | None:
        if self.config.position != "rope":
            return None
        head_dim = self.config.dim // self.config.heads
        return jnp.asarray(spatial_angles(self.rows, self.columns, self.prefix, head_dim, self.config.rope_theta))

    def __call__(self, x_BTND: Array, *, key: Array | None = None) -> Array:
        """Whole clips, every frame seeing itself and the window before it.

        Args:
            x_BTND: embedded tokens, prefix tokens included.
            key: dropout key; None evaluates.

        Returns:
            (B, T, N, D), normed.
        """
        T = x_BTND.shape[1]
        self.check_length(T)
        x_BTND = self._embed_positions(x_BTND, jnp.arange(T))
        space_NA = self._space_angles()
        for block, block_key in zip(self.blocks, split_key(key, self.config.layers), strict=True):
            k1, k2, k3 = split_key(block_key, 3)
            x_BTND = block.attend_space(x_BTND, space_NA, k1)
            if self.config.temporal:
                x_BTND = block.add(x_BTND, block.time.clips(rms_norm(x_BTND, block.time_norm[...])), k2)
            x_BTND = block.feed_forward(x_BTND, k3)
        return rms_norm(x_BTND, self.final_norm[...])

    def two_stream(
        self, clean_BTND: Array, masked_BTND: Array, *, seen_NN: Array | None = None, key: Array | None = None
    ) -> Array:
        """A masked copy of every frame, attending to the *clean* frames before it and to itself.

        This is what sampling sees: finished frames in the past, an unfinished one now. Frame t of the result equals
        `cached_frame` after frames 0..t-1 of the clean stream were remembered.

        Args:
            clean_BTND: embedded true tokens.
            masked_BTND: the same clips with masked tokens.
            seen_NN: True where a token (row) of a masked frame may see another of it; None for everywhere.
            key: dropout key; None evaluates.

        Returns:
            (B, T, N, D) of the masked stream, normed. The clean stream's last layer output is not needed.
        """
        B, T = clean_BTND.shape[:2]
        self.check_length(T)
        # Both streams share all weights: they run as one batch and part only where they see different things.
        x = self._embed_positions(jnp.concatenate([clean_BTND, masked_BTND]), jnp.arange(T))
        space_NA = self._space_angles()
        for index, (block, block_key) in enumerate(zip(self.blocks, split_key(key, self.config.layers), strict=True)):
            k1, k2, k3, k4 = split_key(block_key, 4)
            if seen_NN is None:
                x = block.attend_space(x, space_NA, k1)
            else:
                both = (block.attend_space(x[:B], space_NA, k1), block.attend_space(x[B:], space_NA, k1, seen_NN))
                x = jnp.concatenate(both)
            h = rms_norm(x, block.time_norm[...])
            last = index == self.config.layers - 1  # nothing reads the clean stream any more
            clean, masked = block.time.two_stream(h[:B], h[B:], seen_NN, masked_only=last)
            masked_BTND = block.add(x[B:], masked, k2)
            if clean is None:
                return rms_norm(block.feed_forward(masked_BTND, k3), self.final_norm[...])
            x = block.feed_forward(jnp.concatenate([block.add(x[:B], clean, k4), masked_BTND]), k3)
        raise ConfigError("two_stream needs at least one layer")

    def empty_memory(self, batch: int) -> Memory:
        """What every layer remembers before the first frame; its size does not grow."""
        return [block.time.empty_memory(batch, self.tokens) for block in self.blocks]

    def cached_frame(
        self, x_BND: Array, memory: Memory, time: Array, *, seen_NN: Array | None = None
    ) -> tuple[Array, Memory]:
        """One frame against what is remembered of the frames before it.

        Args:
            x_BND: embedded tokens of frame number `time`.
            memory: of `empty_memory` or of an earlier call.
            time: int32 scalar, frames seen before this one.
            seen_NN: as in `two_stream`.

        Returns:
            (B, N, D) normed, and the memory with this frame added (drop it while the frame is unfinished).
        """
        x_B1ND = self._embed_positions(x_BND[:, None], jnp.asarray(time, jnp.int32)[None])
        space_NA = self._space_angles()
        grown: Memory = []
        for block, layer in zip(self.blocks, memory, strict=True):
            x_B1ND = block.attend_space(x_B1ND, space_NA, None, seen_NN)
            mixed_BND, layer = block.time.step(rms_norm(x_B1ND, block.time_norm[...])[:, 0], layer, time, seen_NN)
            x_B1ND = block.feed_forward(x_B1ND + mixed_BND[:, None], None)
            grown.append(layer)
        return rms_norm(x_B1ND, self.final_norm[...])[:, 0], grown
