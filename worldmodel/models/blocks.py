"""Spatio-temporal transformer: attention inside a frame, causal attention along time at each place, feed-forward.

Legend: B batch · T time (frames) · N tokens of a frame, extra tokens such as an action included · D model width ·
H heads · K size of a head · F feed-forward width · Q queries · S keys · W temporal window in frames · X any batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from common.errors import ConfigError
from worldmodel.config import BlockConfig

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


class LayerMemory(NamedTuple):
    """Temporal keys and values of the last W-1 frames of one layer, as a ring over the third axis."""

    k_BNSHK: Array
    v_BNSHK: Array


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


def attend(q_XQHK: Array, k_XSHK: Array, v_XSHK: Array, mask_QS: Array | None, implementation: str) -> Array:
    """Scaled dot-product attention with an optional boolean mask.

    Args:
        q_XQHK: queries.
        k_XSHK: keys.
        v_XSHK: values.
        mask_QS: True where a query may see a key; broadcast over X and H. Every query must see at least one key.
        implementation: "xla" or "cudnn" (bfloat16 on an NVIDIA GPU).

    Returns:
        (X, Q, H, K) of q's type. Softmax runs in float32.
    """
    if implementation == "cudnn":
        bias_11QS = None
        if mask_QS is not None:
            # cuDNN takes the mask as an additive bias; a finite floor keeps its backward free of inf - inf.
            bias_11QS = jnp.where(mask_QS, 0.0, -1e9).astype(q_XQHK.dtype)[None, None]
        return jax.nn.dot_product_attention(q_XQHK, k_XSHK, v_XSHK, bias=bias_11QS, implementation="cudnn")
    mask_11QS = None if mask_QS is None else mask_QS[None, None]
    return jax.nn.dot_product_attention(q_XQHK, k_XSHK, v_XSHK, mask=mask_11QS, implementation="xla")


def resolve_attention(config: BlockConfig) -> str:
    """Name of the attention implementation that this config means on the default backend."""
    if config.attention != "auto":
        return config.attention
    return "cudnn" if config.compute_dtype == "bfloat16" and jax.default_backend() == "gpu" else "xla"


def rotate(x_XK: Array, angle_XA: Array) -> Array:
    """Rotate the pairs (x_i, x_{i+A}) of the last axis by the given angles.

    Source: Su et al., "RoFormer" (2021), equation 34, with halves in place of interleaved pairs.

    Args:
        x_XK: queries or keys; K = 2A.
        angle_XA: radians, broadcast against the leading axes of x.

    Returns:
        Array like x_XK, rotated in float32.
    """
    half = x_XK.shape[-1] // 2
    a, b = x_XK[..., :half].astype(jnp.float32), x_XK[..., half:].astype(jnp.float32)
    cos, sin = jnp.cos(angle_XA), jnp.sin(angle_XA)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_XK.dtype)


def spatial_angles(rows: int, columns: int, prefix: int, head_dim: int, theta: float) -> np.ndarray:
    """Axial rotation angles of a frame: half of the pairs turn with the row, half with the column.

    Args:
        rows: patches from top to bottom.
        columns: patches from left to right.
        prefix: extra tokens in front, which are not rotated.
        head_dim: K, divisible by 4.
        theta: largest wavelength, in patches over 2 pi.

    Returns:
        float32 (prefix + rows * columns, K / 2) radians.
    """
    quarter = head_dim // 4
    frequency_A = theta ** (-np.arange(quarter, dtype=np.float64) / quarter)
    row_N, column_N = (axis.reshape(-1) for axis in np.mgrid[1 : rows + 1, 1 : columns + 1])
    angle_NA = np.concatenate([row_N[:, None] * frequency_A, column_N[:, None] * frequency_A], axis=1)
    return np.concatenate([np.zeros((prefix, 2 * quarter)), angle_NA]).astype(np.float32)


def temporal_angles(time_T: Array, head_dim: int, theta: float) -> Array:
    """Rotation angles of frame numbers: (T,) integers to float32 (T, K / 2) radians."""
    half = head_dim // 2
    frequency_A = theta ** (-np.arange(half, dtype=np.float64) / half)
    return time_T.astype(jnp.float32)[:, None] * jnp.asarray(frequency_A, jnp.float32)


def window_mask(frames: int, window: int) -> np.ndarray:
    """Banded causal mask: frame t sees frames t-window+1 ... t.

    Returns:
        bool (frames, frames), rows are queries.
    """
    query_T, key_T = np.arange(frames)[:, None], np.arange(frames)[None, :]
    return (key_T <= query_T) & (query_T - key_T < window)


class Attention(nnx.Module):
    """Multi-head attention whose projections, optional QK-norm and rotation are shared by all its uses."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs) -> None:
        self.heads = config.heads
        self.head_dim = config.dim // config.heads
        self.qk_norm = config.qk_norm
        dtype = jnp.dtype(config.compute_dtype)
        self.qkv = nnx.Linear(config.dim, 3 * config.dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(config.dim, config.dim, use_bias=False, dtype=dtype, rngs=rngs)
        if config.qk_norm:
            self.q_scale = nnx.Param(jnp.ones((self.head_dim,), jnp.float32))
            self.k_scale = nnx.Param(jnp.ones((self.head_dim,), jnp.float32))

    def project(self, x_XND: Array, angle_NA: Array | None) -> tuple[Array, Array, Array]:
        """Queries, keys and values (X, N, H, K); queries and keys normed and rotated."""
        q, k, v = jnp.split(self.qkv(x_XND), 3, axis=-1)
        q_XNHK, k_XNHK, v_XNHK = (y.reshape(*y.shape[:-1], self.heads, self.head_dim) for y in (q, k, v))
        if self.qk_norm:
            q_XNHK, k_XNHK = rms_norm(q_XNHK, self.q_scale[...]), rms_norm(k_XNHK, self.k_scale[...])
        if angle_NA is not None:
            q_XNHK, k_XNHK = rotate(q_XNHK, angle_NA[:, None, :]), rotate(k_XNHK, angle_NA[:, None, :])
        return q_XNHK, k_XNHK, v_XNHK

    def merge(self, o_XNHK: Array) -> Array:
        """Concatenate heads and project back to (X, N, D)."""
        return self.out(o_XNHK.reshape(*o_XNHK.shape[:-2], -1))


class STBlock(nnx.Module):
    """One pre-norm block: x += space(x); x += time(x); x += feed-forward(x)."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype = jnp.dtype(config.compute_dtype)
        self.space_norm = nnx.Param(jnp.ones((config.dim,), jnp.float32))
        self.space = Attention(config, rngs=rngs)
        if config.temporal:
            self.time_norm = nnx.Param(jnp.ones((config.dim,), jnp.float32))
            self.time = Attention(config, rngs=rngs)
        self.ffn_norm = nnx.Param(jnp.ones((config.dim,), jnp.float32))
        self.ffn_in = nnx.Linear(config.dim, config.ffn_dim, dtype=dtype, rngs=rngs)
        self.ffn_out = nnx.Linear(config.ffn_dim, config.dim, dtype=dtype, rngs=rngs)

    def attend_space(self, x_BTND: Array, angle_NA: Array | None, key: Array | None) -> Array:
        """Residual attention among the tokens of each frame."""
        B, T, N, D = x_BTND.shape
        h_XND = rms_norm(x_BTND, self.space_norm[...]).reshape(B * T, N, D)
        q, k, v = self.space.project(h_XND, angle_NA)
        o_XND = self.space.merge(attend(q, k, v, None, resolve_attention(self.config)))
        return x_BTND + dropout(o_XND.reshape(B, T, N, D), self.config.dropout, key)

    def project_time(self, x_BTND: Array, angle_TA: Array | None) -> tuple[Array, Array, Array]:
        """Temporal queries, keys and values, each (B, N, T, H, K)."""
        h_BNTD = rms_norm(x_BTND, self.time_norm[...]).swapaxes(1, 2)
        return self.time.project(h_BNTD, angle_TA)

    def attend_time(
        self, x_BTND: Array, q_BNTHK: Array, k_BNSHK: Array, v_BNSHK: Array, mask_TS: Array, key: Array | None
    ) -> Array:
        """Residual attention along time at each place."""
        B, N = q_BNTHK.shape[:2]
        q, k, v = (y.reshape(B * N, *y.shape[2:]) for y in (q_BNTHK, k_BNSHK, v_BNSHK))
        o_XTD = self.time.merge(attend(q, k, v, mask_TS, resolve_attention(self.config)))
        o_BTND = o_XTD.reshape(B, N, *o_XTD.shape[1:]).swapaxes(1, 2)
        return x_BTND + dropout(o_BTND, self.config.dropout, key)

    def feed_forward(self, x_BTND: Array, key: Array | None) -> Array:
        """Residual two-layer perceptron with GELU."""
        h_BTNF = jax.nn.gelu(self.ffn_in(rms_norm(x_BTND, self.ffn_norm[...])))
        return x_BTND + dropout(self.ffn_out(h_BTNF), self.config.dropout, key)


def split_key(key: Array | None, count: int) -> list[Array | None]:
    """`count` keys, or as many Nones."""
    return [None] * count if key is None else list(jax.random.split(key, count))


class STTransformer(nnx.Module):
    """A stack of `STBlock`s with position codes, in three exact forms: clips, two streams, one cached frame."""

    def __init__(self, config: BlockConfig, *, rows: int, columns: int, prefix: int = 0, rngs: nnx.Rngs) -> None:
        self.config, self.rows, self.columns, self.prefix = config, rows, columns, prefix
        self.tokens = prefix + rows * columns
        for index in range(config.layers):
            setattr(self, f"layer_{index}", STBlock(config, rngs=rngs))
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

    def _time_angles(self, time_T: Array) -> Array | None:
        if self.config.position != "rope":
            return None
        return temporal_angles(time_T, self.config.dim // self.config.heads, self.config.rope_theta)

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
        time_T = jnp.arange(T)
        x_BTND = self._embed_positions(x_BTND, time_T)
        space_NA, time_TA = self._space_angles(), self._time_angles(time_T)
        mask_TT = jnp.asarray(window_mask(T, self.config.temporal_window))
        for block, block_key in zip(self.blocks, split_key(key, self.config.layers), strict=True):
            k1, k2, k3 = split_key(block_key, 3)
            x_BTND = block.attend_space(x_BTND, space_NA, k1)
            if self.config.temporal:
                x_BTND = block.attend_time(x_BTND, *block.project_time(x_BTND, time_TA), mask_TT, k2)
            x_BTND = block.feed_forward(x_BTND, k3)
        return rms_norm(x_BTND, self.final_norm[...])

    def two_stream(self, clean_BTND: Array, masked_BTND: Array, *, key: Array | None = None) -> Array:
        """A masked copy of every frame, attending to the *clean* frames before it and to itself.

        This is what sampling sees: finished frames in the past, an unfinished one now. Frame t of the result equals
        `cached_frame` after frames 0..t-1 of the clean stream were remembered.

        Args:
            clean_BTND: embedded true tokens.
            masked_BTND: the same clips with masked tokens.
            key: dropout key; None evaluates.

        Returns:
            (B, T, N, D) of the masked stream, normed. The clean stream's last layer output is not needed.
        """
        B, T = clean_BTND.shape[:2]
        self.check_length(T)
        time_T = jnp.arange(T)
        # Both streams share all weights: they run as one batch and part only in temporal attention.
        x = self._embed_positions(jnp.concatenate([clean_BTND, masked_BTND]), time_T)
        space_NA, time_TA = self._space_angles(), self._time_angles(time_T)
        causal = window_mask(T, self.config.temporal_window)
        own = np.eye(T, dtype=bool)
        clean_TT = jnp.asarray(causal)
        masked_TS = jnp.asarray(np.concatenate([causal & ~own, own], axis=1))
        for index, (block, block_key) in enumerate(zip(self.blocks, split_key(key, self.config.layers), strict=True)):
            k1, k2, k3, k4 = split_key(block_key, 4)
            x = block.attend_space(x, space_NA, k1)
            q, k, v = block.project_time(x, time_TA)
            k_BNSHK = jnp.concatenate([k[:B], k[B:]], axis=2)
            v_BNSHK = jnp.concatenate([v[:B], v[B:]], axis=2)
            masked_BTND = block.attend_time(x[B:], q[B:], k_BNSHK, v_BNSHK, masked_TS, k2)
            if index == self.config.layers - 1:  # nothing reads the clean stream any more
                return rms_norm(block.feed_forward(masked_BTND, k3), self.final_norm[...])
            clean_BTND = block.attend_time(x[:B], q[:B], k[:B], v[:B], clean_TT, k4)
            x = block.feed_forward(jnp.concatenate([clean_BTND, masked_BTND]), k3)
        raise ConfigError("two_stream needs at least one layer")

    def empty_memory(self, batch: int) -> list[LayerMemory]:
        """Room for the keys and values of W-1 past frames in every layer."""
        head_dim = self.config.dim // self.config.heads
        shape = (batch, self.tokens, self.config.temporal_window - 1, self.config.heads, head_dim)
        zeros = jnp.zeros(shape, jnp.dtype(self.config.compute_dtype))
        return [LayerMemory(zeros, zeros) for _ in range(self.config.layers)]

    def cached_frame(self, x_BND: Array, memory: list[LayerMemory], time: Array) -> tuple[Array, list[LayerMemory]]:
        """One frame against remembered keys and values of the frames before it.

        Args:
            x_BND: embedded tokens of frame number `time`.
            memory: of `empty_memory` or of an earlier call.
            time: int32 scalar, frames seen before this one.

        Returns:
            (B, N, D) normed, and the memory with this frame added (drop it while the frame is unfinished).
        """
        capacity = self.config.temporal_window - 1
        time_T = jnp.asarray(time, jnp.int32)[None]
        x_B1ND = self._embed_positions(x_BND[:, None], time_T)
        space_NA, time_TA = self._space_angles(), self._time_angles(time_T)
        valid_S = jnp.arange(capacity) < time  # slots fill in order, then wrap: all are valid once full
        mask_1S = jnp.concatenate([valid_S, jnp.ones((1,), bool)])[None]
        grown: list[LayerMemory] = []
        for block, layer in zip(self.blocks, memory, strict=True):
            x_B1ND = block.attend_space(x_B1ND, space_NA, None)
            q, k, v = block.project_time(x_B1ND, time_TA)
            k_BNSHK = jnp.concatenate([layer.k_BNSHK, k], axis=2)
            v_BNSHK = jnp.concatenate([layer.v_BNSHK, v], axis=2)
            x_B1ND = block.attend_time(x_B1ND, q, k_BNSHK, v_BNSHK, mask_1S, None)
            x_B1ND = block.feed_forward(x_B1ND, None)
            if capacity:
                slot = jnp.asarray(time, jnp.int32) % capacity
                layer = LayerMemory(
                    jax.lax.dynamic_update_slice_in_dim(layer.k_BNSHK, k, slot, axis=2),
                    jax.lax.dynamic_update_slice_in_dim(layer.v_BNSHK, v, slot, axis=2),
                )
            grown.append(layer)
        return rms_norm(x_B1ND, self.final_norm[...])[:, 0], grown


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
