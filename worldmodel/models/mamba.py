"""Mamba-2 along time at each place, in the place of temporal attention: memory and time per frame do not grow.

Legend: B batch · T time (frames) · N tokens of a frame · D model width · X places of all clips (B * N) · E inner
width · C convolved channels (E + 2S) · H heads · P width of a head · S state size · K taps of the convolution.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from common.ssd.jax_impl import ssd_scan_jax
from worldmodel.config import BlockConfig
from worldmodel.models.layers import rms_norm

TAPS = 4
STEP_RANGE = (1e-3, 1e-1)  # step sizes at the start, log-uniform, as published


class ScanMemory(NamedTuple):
    """What a layer knows of all frames so far: the last K-1 inputs of the convolution and the state of the scan."""

    inputs_BNKC: Array
    state_BNHPS: Array


class Mamba2Mixer(nnx.Module):
    """Selective state-space mixing along time, in the three exact forms of a mixer (`worldmodel/models/attention.py`).

    Source: Dao and Gu, "Transformers are SSMs" (2024), section 7.1, one group, gated norm before the output. Ours runs
    over the frames at each place of the grid; there is no window: every earlier frame counts.
    """

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        dtype = jnp.dtype(config.compute_dtype)
        inner, state, heads = config.mamba_expand * config.dim, config.mamba_state, config.heads
        self.inner = inner
        self.proj_in = nnx.Linear(config.dim, 2 * inner + 2 * state + heads, use_bias=False, dtype=dtype, rngs=rngs)
        self.proj_out = nnx.Linear(inner, config.dim, use_bias=False, dtype=dtype, rngs=rngs)
        bound = TAPS**-0.5
        self.taps_KC = nnx.Param(
            jax.random.uniform(rngs.params(), (TAPS, inner + 2 * state), minval=-bound, maxval=bound)
        )
        self.taps_bias = nnx.Param(jnp.zeros((inner + 2 * state,)))
        low, high = np.log(STEP_RANGE)
        step_H = jnp.exp(jax.random.uniform(rngs.params(), (heads,), minval=low, maxval=high))
        self.step_bias = nnx.Param(step_H + jnp.log(-jnp.expm1(-step_H)))  # softplus of it is step_H
        self.log_decay = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (heads,), minval=1.0, maxval=16.0)))
        self.skip = nnx.Param(jnp.ones((heads,)))
        self.gate_norm = nnx.Param(jnp.ones((inner,), jnp.float32))

    def _project(self, h_BTND: Array) -> tuple[Array, Array, Array]:
        """Gate (X, T, E), inputs of the convolution (X, T, C) and step sizes (X, T, H)."""
        B, T, N, D = h_BTND.shape
        z = self.proj_in(h_BTND.swapaxes(1, 2).reshape(B * N, T, D))
        gate, inputs, step = jnp.split(z, [self.inner, z.shape[-1] - self.config.heads], axis=-1)
        return gate, inputs, jax.nn.softplus(step.astype(jnp.float32) + self.step_bias[...])

    def _convolve(self, past_XTKC: list[Array], own_XTC: Array) -> Array:
        """Causal depthwise convolution and SiLU: the K-1 inputs before each frame, oldest first, and its own."""
        taps_KC = self.taps_KC[...].astype(own_XTC.dtype)
        total = own_XTC * taps_KC[-1] + self.taps_bias[...].astype(own_XTC.dtype)
        for tap, past in zip(taps_KC, past_XTKC, strict=False):
            total = total + tap * past
        return jax.nn.silu(total)

    def _scan(self, mixed_XTC: Array, step_XTH: Array, state_XHPS: Array) -> tuple[Array, Array]:
        """Outputs (X, T, E) and the state after the last frame."""
        S, H = self.config.mamba_state, self.config.heads
        x, b, c = jnp.split(mixed_XTC, [self.inner, self.inner + S], axis=-1)
        y, state = ssd_scan_jax(
            x.reshape(*x.shape[:2], H, -1), step_XTH, -jnp.exp(self.log_decay[...]), b[:, :, None], c[:, :, None],
            self.skip[...], initial_state_BHPN=state_XHPS,
        )  # fmt: skip
        return y.reshape(*x.shape), state

    def _finish(self, y_XTE: Array, gate_XTE: Array, batch: int) -> Array:
        """Gated norm and output projection: (B, T, N, D)."""
        o_XTD = self.proj_out(rms_norm(y_XTE * jax.nn.silu(gate_XTE), self.gate_norm[...]))
        return o_XTD.reshape(batch, -1, *o_XTD.shape[1:]).swapaxes(1, 2)

    def _empty_state(self, places: int) -> Array:
        H = self.config.heads
        return jnp.zeros((places, H, self.inner // H, self.config.mamba_state), jnp.float32)

    def clips(self, h_BTND: Array) -> Array:
        """Whole clips, in parallel chunks: (B, T, N, D)."""
        gate, inputs, step = self._project(h_BTND)
        mixed = self._convolve(_earlier(inputs), inputs)
        return self._finish(self._scan(mixed, step, self._empty_state(len(gate)))[0], gate, h_BTND.shape[0])

    def two_stream(
        self, clean_BTND: Array, masked_BTND: Array, seen_NN: Array | None, *, masked_only: bool
    ) -> tuple[Array | None, Array]:
        """Outputs of both streams: the masked one takes each frame's step from the clean state before it."""
        B = clean_BTND.shape[0]
        gate, inputs, step = self._project(jnp.concatenate([clean_BTND, masked_BTND]))
        X = len(gate) // 2
        past = [jnp.concatenate([earlier, earlier]) for earlier in _earlier(inputs[:X])]
        mixed = self._convolve(past, inputs)

        def advance(state_XHPS: Array, frame: tuple[Array, Array]) -> tuple[Array, Array]:
            mixed_XC, step_XH = frame
            both = jnp.concatenate([state_XHPS, state_XHPS])
            y, states = self._scan(mixed_XC[:, None], step_XH[:, None], both)
            return states[:X], y[:, 0]

        frames = (mixed.swapaxes(0, 1), step.swapaxes(0, 1))
        y_XTE = jax.lax.scan(advance, self._empty_state(X), frames)[1].swapaxes(0, 1)
        masked = self._finish(y_XTE[X:], gate[X:], B)
        return None if masked_only else self._finish(y_XTE[:X], gate[:X], B), masked

    def empty_memory(self, batch: int, tokens: int) -> ScanMemory:
        """What is known before the first frame."""
        channels = self.inner + 2 * self.config.mamba_state
        inputs = jnp.zeros((batch, tokens, TAPS - 1, channels), jnp.dtype(self.config.compute_dtype))
        state = self._empty_state(batch * tokens)
        return ScanMemory(inputs, state.reshape(batch, tokens, *state.shape[1:]))

    def step(self, h_BND: Array, memory: ScanMemory, time: Array, seen_NN: Array | None) -> tuple[Array, ScanMemory]:
        """One frame after those that the memory knows: (B, N, D), and the memory with it."""
        B, N, _ = h_BND.shape
        gate, inputs, step = self._project(h_BND[:, None])
        past_X1KC = memory.inputs_BNKC.reshape(B * N, 1, TAPS - 1, -1)
        mixed = self._convolve([past_X1KC[:, :, k] for k in range(TAPS - 1)], inputs)
        y, state = self._scan(mixed, step, memory.state_BNHPS.reshape(B * N, *memory.state_BNHPS.shape[2:]))
        newest = inputs.reshape(B, N, 1, -1)
        grown = ScanMemory(
            jnp.concatenate([memory.inputs_BNKC[:, :, 1:], newest], axis=2), state.reshape(memory.state_BNHPS.shape)
        )
        return self._finish(y, gate, B)[:, 0], grown


def _earlier(inputs_XTC: Array) -> list[Array]:
    """The inputs K-1, ..., 1 frames before each frame, zero before the first."""
    T = inputs_XTC.shape[1]
    return [jnp.pad(inputs_XTC, ((0, 0), (back, 0), (0, 0)))[:, :T] for back in range(TAPS - 1, 0, -1)]
