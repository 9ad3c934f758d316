"""Many dreams on one model: each player has a slot of fixed size, a batch of players advances in one compiled step.

The memory of a dream is the ring of temporal keys and values of the last W - 1 frames, so a slot never grows. Anything
that has to go back or start over (reset, rewind, moving the clock) builds that ring again from tokens: the keys and
values of layer l at one frame depend on l (W - 1) frames before it, so `replay_frames` = layers * (W - 1) frames bring
back all of it, exactly.

Legend: S slots · P players of one batch · R frames of a replay · C frames that the decoder sees · N tokens of a frame ·
H W C frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.errors import ConfigError
from worldmodel.models.dynamics import UNKNOWN_ACTION
from worldmodel.models.token_dynamics import MaskGitDynamics
from worldmodel.rollout.maskgit import LiveSampling, sample_live_frames
from worldmodel.rollout.world import World
from worldmodel.train.state import Functional, values_of

# Rotations by a frame's number are computed in float32: before numbers get so large that their products with the
# frequencies lose digits, the clock of a slot is set back.
CLOCK_LIMIT = 1 << 14


@dataclass(frozen=True)
class StepRequest:
    """One player's next frame."""

    slot: int
    action: int
    frame: int
    """Number of the frame to make, counted from the reset; it also picks the noise."""
    clock: int
    """Position of that frame for the temporal attention."""
    seed: int
    temperature: float
    decode_steps: int


@dataclass(frozen=True)
class StepResult:
    """What came of it."""

    tokens_N: np.ndarray
    frame_HWC: np.ndarray
    """uint8."""
    entropy_N: np.ndarray
    """Bits of each token before any of the frame was chosen."""


class DreamPool:
    """The device side of all dreams. Calls must come from one thread at a time."""

    def __init__(self, world: World, slots: int) -> None:
        """Args:
            world: the models.
            slots: dreams held at once.
        """
        if slots < 1:
            raise ConfigError(f"{slots} players: expected at least 1")
        blocks = world.config.dynamics.blocks
        if not isinstance(world.dynamics, MaskGitDynamics):
            raise ConfigError(
                f"{world.source}: the player steps maskgit dynamics, this world has {world.config.dynamics.kind}; "
                "look at it with `python -m worldmodel rollout`"
            )
        if blocks.mixer == "mamba2":
            raise ConfigError(
                f"{world.source}: rewinding rebuilds a memory from the last frames, that of mamba2 holds all frames; "
                "look at it with `python -m worldmodel rollout`"
            )
        self.world, self.slots, self.num_codes = world, slots, world.dynamics.num_codes
        self.tokens = world.dynamics.frame.tokens
        self.replay_frames = max(1, blocks.layers * (blocks.temporal_window - 1))
        self.clock_limit = CLOCK_LIMIT
        if blocks.position == "learned":  # a table of positions ends; the clock goes back before that
            self.clock_limit = min(CLOCK_LIMIT, blocks.max_frames)
        if self.clock_limit < 2:
            raise ConfigError("a learned time table of one frame leaves no room to play; train with more max_frames")
        decoder = world.config.tokenizer.decoder
        self._context = decoder.temporal_window if decoder.temporal else 1
        dynamics, tokenizer = Functional(world.dynamics), Functional(world.tokenizer)
        self._values = (values_of(world.tokenizer), values_of(world.dynamics))
        # One slot more than asked for: a batch is filled up to a compiled size with lanes that play there.
        memory = jax.tree.map(lambda leaf: leaf[:, None], world.dynamics.blocks.empty_memory(slots + 1))
        self._pool = (memory, jnp.zeros((slots + 1, self._context, self.tokens), jnp.int32))

        def step(values: Any, pool: Any, slot_P: Array, ints_P5: Array, temperature_P: Array) -> Any:
            model, (memory, recent_SCN) = dynamics.merge(*values[1]), pool
            action_P, frame_P, clock_P, seed_P, steps_P = (ints_P5[:, column] for column in range(5))
            mine, recent_PCN = jax.tree.map(lambda leaf: leaf[slot_P], memory), recent_SCN[slot_P]
            action_PD = model.embed_action_codes(action_P[:, None])[:, 0]

            def one(tokens_N: Array, masked_N: Array | None, action_D: Array, ring: Any, clock: Array) -> Any:
                masked_1N = None if masked_N is None else masked_N[None]
                logits, grown = model.cached_logits(tokens_N[None], masked_1N, action_D[None], ring, clock)
                return logits[0], grown

            def logits_of(tokens_PN: Array, masked_PN: Array) -> Array:
                return jax.vmap(lambda *a: one(*a)[0])(tokens_PN, masked_PN, action_PD, mine, clock_P)

            keys_P = jax.vmap(lambda seed, frame: jax.random.fold_in(jax.random.key(seed), frame))(seed_P, frame_P)
            sampling = LiveSampling(temperature_P, steps_P)
            tokens_PN, entropy_PN = sample_live_frames(logits_of, self.tokens, sampling, keys_P)
            grown = jax.vmap(lambda t, a, ring, clock: one(t, None, a, ring, clock)[1])(
                tokens_PN, action_PD, mine, clock_P
            )
            recent_PCN = jnp.concatenate([recent_PCN, tokens_PN[:, None]], axis=1)[:, 1:]
            frames_PHWC = as_uint8(tokenizer.merge(*values[0]).decode(recent_PCN)[:, -1])
            memory = jax.tree.map(lambda whole, part: whole.at[slot_P].set(part), memory, grown)
            return (memory, recent_SCN.at[slot_P].set(recent_PCN)), tokens_PN, frames_PHWC, entropy_PN

        def rebuild(values: Any, pool: Any, slot: Array, tokens_RN: Array, action_R: Array, count: Array,
                    clock: Array) -> Any:  # fmt: skip
            model, (memory, recent_SCN) = dynamics.merge(*values[1]), pool
            action_RD = model.embed_action_codes(action_R[None])[0]

            def remember(index: Array, state: Any) -> Any:
                ring, recent_CN = state
                tokens_1N = jax.lax.dynamic_slice_in_dim(tokens_RN, index, 1)
                action_1D = jax.lax.dynamic_slice_in_dim(action_RD, index, 1)
                _, ring = model.cached_logits(tokens_1N, None, action_1D, ring, clock + index)
                return ring, jnp.concatenate([recent_CN, tokens_1N])[1:]

            first_CN = jnp.broadcast_to(tokens_RN[0], (self._context, self.tokens))
            ring, recent_CN = jax.lax.fori_loop(0, count, remember, (model.blocks.empty_memory(1), first_CN))
            frame_HWC = as_uint8(tokenizer.merge(*values[0]).decode(recent_CN[None])[0, -1])
            memory = jax.tree.map(lambda whole, part: whole.at[slot].set(part), memory, ring)
            return (memory, recent_SCN.at[slot].set(recent_CN)), frame_HWC

        self._step, self._rebuild = jax.jit(step, donate_argnums=1), jax.jit(rebuild, donate_argnums=1)
        self._compiled: dict[int, Any] = {}

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Sizes that steps are compiled for: powers of two up to the number of slots, and that number."""
        return (*(1 << e for e in range(self.slots.bit_length()) if 1 << e < self.slots), self.slots)

    def compile_step(self, size: int) -> None:
        """Compile the step of one batch size, once. The one method that may run on another thread beside the others."""
        if size in self._compiled:
            return
        whole = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (self._values, self._pool))
        lanes = (
            jax.ShapeDtypeStruct((size,), jnp.int32), jax.ShapeDtypeStruct((size, 5), jnp.int32),
            jax.ShapeDtypeStruct((size,), jnp.float32),
        )  # fmt: skip
        self._compiled[size] = self._step.lower(*whole, *lanes).compile()

    def encode(self, frames_RHWC: np.ndarray) -> np.ndarray:
        """Tokens (R, N) of true frames."""
        return np.asarray(self.world.encode(frames_RHWC[None])[0])

    def rebuild(self, slot: int, tokens_RN: np.ndarray, action_R: Sequence[int], clock: int) -> np.ndarray:
        """Set a slot to the state after these frames.

        Args:
            slot: which dream.
            tokens_RN: the last frames, oldest first; `replay_frames` of them, or all since the beginning.
            action_R: the action that led to each of them (-1: none known).
            clock: position of the first of them.

        Returns:
            uint8 picture (H, W, C) of the last one.
        """
        count = len(tokens_RN)
        # One shape for all but prompts longer than a replay, so that no rewind has to wait for a compilation.
        room = self.replay_frames if count <= self.replay_frames else 1 << (count - 1).bit_length()
        padded_RN = np.zeros((room, self.tokens), np.int32)
        padded_R = np.full(room, UNKNOWN_ACTION, np.int32)
        padded_RN[:count], padded_R[:count] = tokens_RN, action_R
        self._pool, frame_HWC = self._rebuild(
            self._values, self._pool, np.int32(slot), padded_RN, padded_R, np.int32(count), np.int32(clock)
        )
        return np.asarray(frame_HWC)

    def step(self, requests: Sequence[StepRequest]) -> list[StepResult]:
        """Advance some dreams by one frame each, together.

        Args:
            requests: at most one a slot.

        Returns:
            One result a request, in order. Batches are of the sizes compiled so far (size 1 where there is none).
        """
        if not self._compiled:
            self.compile_step(1)
        sizes = sorted(self._compiled)
        size = next((size for size in sizes if size >= len(requests)), sizes[-1])
        if len(requests) > size:
            return self.step(requests[:size]) + self.step(requests[size:])
        slot_P = np.full(size, self.slots, np.int32)
        ints_P5 = np.tile(np.asarray([UNKNOWN_ACTION, 0, 0, 0, 1], np.int32), (size, 1))
        temperature_P = np.zeros(size, np.float32)
        for lane, r in enumerate(requests):
            slot_P[lane], temperature_P[lane] = r.slot, r.temperature
            ints_P5[lane] = (r.action, r.frame & 0x7FFFFFFF, r.clock, r.seed & 0x7FFFFFFF, r.decode_steps)
        advance = self._compiled[size]
        self._pool, tokens, frames, entropy = advance(self._values, self._pool, slot_P, ints_P5, temperature_P)
        tokens_PN, frames_PHWC, entropy_PN = np.asarray(tokens), np.asarray(frames), np.asarray(entropy)
        return [StepResult(tokens_PN[i], frames_PHWC[i], entropy_PN[i]) for i in range(len(requests))]


def as_uint8(frames: Array) -> Array:
    """Frames in 0..1 to uint8, on the device."""
    return jnp.clip(frames * 255.0 + 0.5, 0, 255).astype(jnp.uint8)
