"""A trained world: tokenizer and dynamics together, compiled for use, from run folders or from an artifact.

Legend: B batch · T time · H W C pixels · X axes of a frame, N tokens or N L latents · P prompt frames · F future
frames · A transitions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.errors import ConfigError
from worldmodel.config import RolloutConfig, TrainConfig
from worldmodel.data.records import read_manifest
from worldmodel.models.dynamics import Dynamics
from worldmodel.models.token_dynamics import TokenDynamics
from worldmodel.models.tokenizer import Tokenizer
from worldmodel.rollout.sampling import cached_next_frame, check_actions, remember_prompt, rollout_frames
from worldmodel.train.restore import load_dynamics, load_run_config, load_tokenizer
from worldmodel.train.state import Functional, values_of


@dataclass(frozen=True)
class World:
    """Models of one trained world and what they were trained with."""

    config: TrainConfig
    tokenizer: Tokenizer
    dynamics: Dynamics
    num_actions: int
    source: str
    """Where the weights came from: a run folder ("float weights") or an artifact."""

    @property
    def latent(self) -> bool:
        """Whether this world's actions are latent ones, to be inferred from video."""
        return self.config.dynamics.action_source != "ground-truth"

    @cached_property
    def _values(self) -> tuple[Any, Any]:
        return values_of(self.tokenizer), values_of(self.dynamics)

    @cached_property
    def _functional(self) -> tuple[Functional, Functional]:
        return Functional(self.tokenizer), Functional(self.dynamics)

    @cached_property
    def _encode(self) -> Any:
        functional = self._functional[0]
        return jax.jit(lambda values, frames: functional.merge(*values).encode(frames))

    @cached_property
    def _decode(self) -> Any:
        functional = self._functional[0]
        return jax.jit(lambda values, tokens: functional.merge(*values).decode(tokens))

    @cached_property
    def _infer(self) -> Any:
        functional = self._functional[1]
        return jax.jit(lambda values, frames: functional.merge(*values).infer_actions(frames))

    @cached_property
    def _rollout(self) -> Any:
        functional = self._functional[1]

        def run(values: Any, prompt: Array, actions: Array, key: Array, config: RolloutConfig) -> Array:
            return rollout_frames(functional.merge(*values), prompt, actions, config, key)

        return jax.jit(run, static_argnames="config")

    @cached_property
    def _bits(self) -> Any:
        functional = self._functional[1]

        def bits(values: Any, tokens_BTN: Array, actions_BA: Array) -> Array:
            model = functional.merge(*values)
            return model.frame_bits(tokens_BTN, model.shift_actions(model.embed_action_codes(actions_BA)))

        return jax.jit(bits)

    def sharing(self, other: World) -> World:
        """This world, using what another of the same configuration has compiled (values are arguments there)."""
        if self.config != other.config or self.num_actions != other.num_actions:
            raise ConfigError("only worlds of one configuration can share compiled functions")
        for name in ("_functional", "_encode", "_decode", "_rollout", "_bits"):
            self.__dict__[name] = getattr(other, name)
        if self.latent:
            self.__dict__["_infer"] = other._infer
        return self

    @property
    def discrete(self) -> bool:
        """Whether frames are tokens, which have a likelihood in bits; latents have none here."""
        return isinstance(self.dynamics, TokenDynamics)

    def bits(self, tokens_BTN: Array, actions_BA: np.ndarray) -> Array:
        """Teacher-forced bits (B, T - 1) of every frame but the first. See `TokenDynamics.frame_bits`."""
        return self._bits(self._values[1], tokens_BTN, actions_BA)

    def encode(self, frames_BTHWC: np.ndarray) -> Array:
        """Frames to tokens (B, T, N) or latents (B, T, N, L)."""
        return self._encode(self._values[0], frames_BTHWC)

    def decode(self, frames_BTX: Array) -> Array:
        """Tokens or latents to frames in 0..1."""
        return self._decode(self._values[0], frames_BTX)

    def actions_of(self, frames_BTHWC: np.ndarray, actions_BT: np.ndarray) -> np.ndarray:
        """The actions that drive this world on true clips: recorded, or inferred latent ones (B, T - 1)."""
        if self.latent:
            return np.asarray(self._infer(self._values[1], frames_BTHWC))
        return actions_BT[:, :-1]

    def rollout(self, prompt_BPX: Array, actions_BA: np.ndarray, config: RolloutConfig, key: Array) -> Array:
        """Tokens (B, F, N) or latents (B, F, N, L) that follow the prompt. See `rollout_frames`."""
        check_actions(np.asarray(actions_BA), self.dynamics.num_actions, where="rollout")
        return self._rollout(self._values[1], prompt_BPX, actions_BA, key, config)

    def frames_after(
        self, frames_BTHWC: np.ndarray, actions_BA: np.ndarray, config: RolloutConfig, key: Array
    ) -> Array:
        """Dreamed frames (B, F, H, W, C) in 0..1 after the first `prompt_frames` true ones."""
        prompt_BPX = self.encode(frames_BTHWC[:, : config.prompt_frames])
        future_BFX = self.rollout(prompt_BPX, actions_BA, config, key)
        return self.decode(jnp.concatenate([prompt_BPX, future_BFX], axis=1))[:, config.prompt_frames :]

    def player(self, config: RolloutConfig) -> Player:
        """Frame-by-frame interface for interactive use."""
        return Player(self, config)


class Player:
    """One world played action by action, with constant time and memory per frame."""

    def __init__(self, world: World, config: RolloutConfig) -> None:
        self._world, self._config = world, config
        # A decoder that looks back gets the frames of its window; one that does not gets the frame alone.
        decoder = world.config.tokenizer.decoder
        self._context = decoder.temporal_window if decoder.temporal else 1
        tokenizer, dynamics = Functional(world.tokenizer), Functional(world.dynamics)
        values = (values_of(world.tokenizer), values_of(world.dynamics))

        def start(values: Any, prompt_BPX: Array, actions_BA: Array, key: Array) -> Any:
            model = dynamics.merge(*values[1])
            action_BPD = model.shift_actions(model.embed_action_codes(actions_BA))
            return remember_prompt(model, prompt_BPX, action_BPD, key)

        def step(values: Any, memory: Any, recent_BSX: Array, action_B: Array, time: Array, key: Array) -> Any:
            model = dynamics.merge(*values[1])
            action_BD = model.embed_action_codes(action_B[:, None])[:, 0]
            frame_BX, memory = cached_next_frame(model, memory, action_BD, time, config, key)
            recent_BSX = jnp.concatenate([recent_BSX, frame_BX[:, None]], axis=1)[:, -self._context :]
            return memory, recent_BSX, tokenizer.merge(*values[0]).decode(recent_BSX)[:, -1]

        self._values, self._start, self._step = values, jax.jit(start), jax.jit(step, donate_argnums=1)
        self._time = 0

    def reset(self, frames_BPHWC: np.ndarray, actions_BA: np.ndarray, key: Array) -> None:
        """Begin from true frames and the actions between them."""
        prompt_BPX = self._world.encode(frames_BPHWC)
        self._memory = self._start(self._values, prompt_BPX, actions_BA, key)
        self._recent, self._time, self._key = prompt_BPX[:, -self._context :], prompt_BPX.shape[1], key
        if self._recent.shape[1] < self._context:
            first = jnp.repeat(self._recent[:, :1], self._context - self._recent.shape[1], axis=1)
            self._recent = jnp.concatenate([first, self._recent], axis=1)

    def step(self, action_B: np.ndarray) -> Array:
        """Take an action; the next frame (B, H, W, C) in 0..1."""
        check_actions(np.asarray(action_B), self._world.dynamics.num_actions, where="player")
        self._world.dynamics.blocks.check_length(self._time + 1)
        self._memory, self._recent, frame_BHWC = self._step(
            self._values, self._memory, self._recent, action_B, jnp.int32(self._time), self._key
        )
        self._time += 1
        return frame_BHWC

    @property
    def memory_bytes(self) -> int:
        """Bytes that the dynamics remembers of the past; call after `reset`."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._memory))

    def flops_per_frame(self) -> float:
        """Floating-point operations of one step, counted by the compiler; call after `reset`."""
        action_B = np.zeros((self._recent.shape[0],), np.int32)
        arguments = (self._values, self._memory, self._recent, action_B, jnp.int32(self._time), self._key)
        return float((self._step.lower(*arguments).compile().cost_analysis() or {}).get("flops", 0.0))


def load_world(run_dir: str, *, tokenizer_run: str = "") -> World:
    """A world from the run folder of its dynamics.

    Args:
        run_dir: run folder of stage dynamics.
        tokenizer_run: where its tokenizer is now; by default where it was at training.

    Returns:
        The world with float weights.
    """
    config = load_run_config(run_dir)
    num_actions = int(read_manifest(config.data_dir)["num_actions"])
    config, dynamics = load_dynamics(run_dir, num_actions)
    tokenizer = load_tokenizer(tokenizer_run or config.tokenizer_run, expected=config.tokenizer)
    return World(config, tokenizer, dynamics, num_actions, source=f"float weights of {run_dir}")
