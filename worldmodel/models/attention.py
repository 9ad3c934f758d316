"""Attention along time at each place, and over space and time together, each in three exact forms.

A mixer brings what happened in earlier frames to a frame. Its three forms are `clips` (every frame sees itself and the
window before it), `two_stream` (a masked copy of every frame sees the *clean* frames before it and itself) and `step`
(one frame against a memory of those before it). `worldmodel/models/mamba.py` is the third mixer.

Legend: B batch · T time (frames) · N tokens of a frame, extra tokens such as an action included · D model width ·
H heads · K size of a head · Q queries · S keys · W temporal window in frames · X any batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from worldmodel.config import BlockConfig
from worldmodel.models.layers import rms_norm


class LayerMemory(NamedTuple):
    """Temporal keys and values of the last W-1 frames of one layer, as a ring over the third axis."""

    k_BNSHK: Array
    v_BNSHK: Array


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
        self.config, self.heads = config, config.heads
        self.head_dim = config.dim // config.heads
        self.qk_norm = config.qk_norm
        dtype = jnp.dtype(config.compute_dtype)
        self.qkv = nnx.Linear(config.dim, 3 * config.dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(config.dim, config.dim, use_bias=False, dtype=dtype, rngs=rngs)
        if config.qk_norm:
            self.q_scale = nnx.Param(jnp.ones((self.head_dim,), jnp.float32))
            self.k_scale = nnx.Param(jnp.ones((self.head_dim,), jnp.float32))

    @property
    def rope(self) -> bool:
        """Whether queries and keys are rotated."""
        return self.config.position == "rope"

    @property
    def implementation(self) -> str:
        """See `resolve_attention`."""
        return resolve_attention(self.config)

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




class SpatialAttention(Attention):
    """Attention among the tokens of each frame."""

    def __call__(self, h_BTND: Array, angle_NA: Array | None, seen_NN: Array | None = None) -> Array:
        """(B, T, N, D); `seen_NN` is True where a token (row) may see another, None for everywhere."""
        B, T, N, D = h_BTND.shape
        q, k, v = self.project(h_BTND.reshape(B * T, N, D), angle_NA)
        return self.merge(attend(q, k, v, seen_NN, self.implementation)).reshape(B, T, N, D)


class TemporalAttention(Attention):
    """Banded causal attention along time, at each place alone."""

    def _project(self, h_BTND: Array, time_T: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each (B, N, T, H, K)."""
        angle_TA = temporal_angles(time_T, self.head_dim, self.config.rope_theta) if self.rope else None
        return self.project(h_BTND.swapaxes(1, 2), angle_TA)

    def _attend(self, q_BNTHK: Array, k_BNSHK: Array, v_BNSHK: Array, mask_TS: Array) -> Array:
        B, N = q_BNTHK.shape[:2]
        q, k, v = (y.reshape(B * N, *y.shape[2:]) for y in (q_BNTHK, k_BNSHK, v_BNSHK))
        o_XTD = self.merge(attend(q, k, v, mask_TS, self.implementation))
        return o_XTD.reshape(B, N, *o_XTD.shape[1:]).swapaxes(1, 2)

    def clips(self, h_BTND: Array) -> Array:
        """Whole clips: (B, T, N, D)."""
        T = h_BTND.shape[1]
        mask_TT = jnp.asarray(window_mask(T, self.config.temporal_window))
        return self._attend(*self._project(h_BTND, jnp.arange(T)), mask_TT)

    def two_stream(
        self, clean_BTND: Array, masked_BTND: Array, seen_NN: Array | None, *, masked_only: bool
    ) -> tuple[Array | None, Array]:
        """Outputs of both streams; of the second only with `masked_only`. `seen_NN` does not matter here."""
        B, T = clean_BTND.shape[:2]
        q, k, v = self._project(jnp.concatenate([clean_BTND, masked_BTND]), jnp.arange(T))
        causal, own = window_mask(T, self.config.temporal_window), np.eye(T, dtype=bool)
        masked_TS = jnp.asarray(np.concatenate([causal & ~own, own], axis=1))
        k_BNSHK, v_BNSHK = (jnp.concatenate([y[:B], y[B:]], axis=2) for y in (k, v))
        masked = self._attend(q[B:], k_BNSHK, v_BNSHK, masked_TS)
        return None if masked_only else self._attend(q[:B], k[:B], v[:B], jnp.asarray(causal)), masked

    def empty_memory(self, batch: int, tokens: int) -> LayerMemory:
        """Room for the keys and values of W-1 past frames."""
        shape = (batch, tokens, self.config.temporal_window - 1, self.heads, self.head_dim)
        zeros = jnp.zeros(shape, jnp.dtype(self.config.compute_dtype))
        return LayerMemory(zeros, zeros)

    def step(
        self, h_BND: Array, memory: LayerMemory, time: Array, seen_NN: Array | None
    ) -> tuple[Array, LayerMemory]:
        """Frame number `time` against the memory: (B, N, D), and the memory with this frame."""
        q, k, v = self._project(h_BND[:, None], jnp.asarray(time, jnp.int32)[None])
        k_BNSHK, v_BNSHK = jnp.concatenate([memory.k_BNSHK, k], axis=2), jnp.concatenate([memory.v_BNSHK, v], axis=2)
        mask_1S = jnp.concatenate([valid_slots(memory, time), jnp.ones((1,), bool)])[None]
        return self._attend(q, k_BNSHK, v_BNSHK, mask_1S)[:, 0], remember(memory, k, v, time)


class JointAttention(Attention):
    """Full spatio-temporal attention: a token sees every token of the frames in its window, its own frame included.

    It takes the place of spatial and temporal attention. With rope half of the rotations follow time, a quarter rows
    and a quarter columns.
    """

    def __init__(self, config: BlockConfig, *, rows: int, columns: int, prefix: int, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs=rngs)
        self.grid = (rows, columns, prefix)

    def _project(self, h_BTND: Array, time_T: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each (B, T, N, H, K)."""
        B, T, N, D = h_BTND.shape
        angle_XA = None
        if self.rope:
            quarter = self.head_dim // 8  # rotations of a pair of numbers: half the head size in all
            space_NA = spatial_angles(*self.grid, 4 * quarter, self.config.rope_theta)
            time_TA = temporal_angles(time_T, self.head_dim - 4 * quarter, self.config.rope_theta)
            angle_XA = jnp.concatenate(
                [jnp.repeat(time_TA, N, axis=0), jnp.tile(jnp.asarray(space_NA), (T, 1))], axis=1
            )
        return tuple(y.reshape(B, T, N, *y.shape[2:]) for y in self.project(h_BTND.reshape(B, T * N, D), angle_XA))  # pyright: ignore[reportReturnType]

    def _attend(self, q_BTNHK: Array, k_BXHK: Array, v_BXHK: Array, mask_QS: Array) -> Array:
        B, T, N = q_BTNHK.shape[:3]
        o_BXD = self.merge(
            attend(q_BTNHK.reshape(B, T * N, *q_BTNHK.shape[3:]), k_BXHK, v_BXHK, mask_QS, self.implementation)
        )
        return o_BXD.reshape(B, T, N, -1)

    def clips(self, h_BTND: Array) -> Array:
        """Whole clips: (B, T, N, D)."""
        B, T, N, _ = h_BTND.shape
        q, k, v = self._project(h_BTND, jnp.arange(T))
        mask_QS = np.kron(window_mask(T, self.config.temporal_window), np.ones((N, N), bool))
        k_BXHK, v_BXHK = (y.reshape(B, T * N, *y.shape[3:]) for y in (k, v))
        return self._attend(q, k_BXHK, v_BXHK, jnp.asarray(mask_QS))

    def two_stream(
        self, clean_BTND: Array, masked_BTND: Array, seen_NN: Array | None, *, masked_only: bool
    ) -> tuple[Array | None, Array]:
        """Outputs of both streams; of the second only with `masked_only`. `seen_NN`: inside a masked frame."""
        B, T, N, _ = clean_BTND.shape
        q, k, v = self._project(jnp.concatenate([clean_BTND, masked_BTND]), jnp.arange(T))
        k, v = (y.reshape(2 * B, T * N, *y.shape[3:]) for y in (k, v))
        causal, own, whole = window_mask(T, self.config.temporal_window), np.eye(T, dtype=bool), np.ones((N, N), bool)
        own_QS = jnp.asarray(np.kron(own, whole)) & jnp.tile(jnp.asarray(whole) if seen_NN is None else seen_NN, (T, T))
        mask_QS = jnp.concatenate([jnp.asarray(np.kron(causal & ~own, whole)), own_QS], axis=1)
        k_BXHK, v_BXHK = (jnp.concatenate([y[:B], y[B:]], axis=1) for y in (k, v))
        masked = self._attend(q[B:], k_BXHK, v_BXHK, mask_QS)
        if masked_only:
            return None, masked
        return self._attend(q[:B], k[:B], v[:B], jnp.asarray(np.kron(causal, whole))), masked

    def empty_memory(self, batch: int, tokens: int) -> LayerMemory:
        """Room for the keys and values of W-1 past frames."""
        shape = (batch, tokens, self.config.temporal_window - 1, self.heads, self.head_dim)
        zeros = jnp.zeros(shape, jnp.dtype(self.config.compute_dtype))
        return LayerMemory(zeros, zeros)

    def step(
        self, h_BND: Array, memory: LayerMemory, time: Array, seen_NN: Array | None
    ) -> tuple[Array, LayerMemory]:
        """Frame number `time` against the memory: (B, N, D), and the memory with this frame."""
        B, N, _ = h_BND.shape
        q, k, v = self._project(h_BND[:, None], jnp.asarray(time, jnp.int32)[None])
        k_BNSHK, v_BNSHK = (y.swapaxes(1, 2) for y in (k, v))
        past_k, past_v = (y.reshape(B, -1, *y.shape[3:]) for y in memory)
        valid_X = jnp.tile(valid_slots(memory, time), N)  # the memory's keys lie place by place
        own_NN = jnp.ones((N, N), bool) if seen_NN is None else seen_NN
        mask_QS = jnp.concatenate([jnp.broadcast_to(valid_X, (N, valid_X.shape[0])), own_NN], axis=1)
        keys, values = (jnp.concatenate([past, y[:, 0]], axis=1) for past, y in ((past_k, k), (past_v, v)))
        return self._attend(q, keys, values, mask_QS)[:, 0], remember(memory, k_BNSHK, v_BNSHK, time)


def valid_slots(memory: LayerMemory, time: Array) -> Array:
    """Which slots of a ring hold a frame when frame number `time` comes: they fill in order, then wrap."""
    return jnp.arange(memory.k_BNSHK.shape[2]) < time


def remember(memory: LayerMemory, k_BN1HK: Array, v_BN1HK: Array, time: Array) -> LayerMemory:
    """The ring with frame number `time` in the place of the oldest."""
    capacity = memory.k_BNSHK.shape[2]
    if not capacity:
        return memory
    slot = jnp.asarray(time, jnp.int32) % capacity
    return LayerMemory(
        jax.lax.dynamic_update_slice_in_dim(memory.k_BNSHK, k_BN1HK, slot, axis=2),
        jax.lax.dynamic_update_slice_in_dim(memory.v_BNSHK, v_BN1HK, slot, axis=2),
    )
