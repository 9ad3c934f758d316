"""What the collector asks of a game, and two ways to give it: pure JAX functions, or one Python object a game.

A level is a number: `reset(level_seed)` and the actions that follow decide every frame, on any machine. That is what
makes records checkable by playing them again, and what lets a hidden state be recomputed instead of stored.

Letters: N games side by side, H height, W width, C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.errors import ConfigError

UNKNOWN_COMPLETE = -1


@dataclasses.dataclass(frozen=True)
class GameSpec:
    """What a data set says of its game."""

    name: str
    source: str
    """Kind of the source: procgen, puck, minatar, atari or craftax."""
    frame_shape: tuple[int, int, int]
    action_names: tuple[str, ...]
    fps: int


class VectorGames(Protocol):
    """Games side by side; an ended one begins its next episode by itself."""

    def observe(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rewards (N,) of the actions before, present frames (N, H, W, C) uint8, and which of them open an episode."""
        ...

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """Level seeds (N,) of the present episodes, and whether the episode before ended at its goal (1, 0, -1)."""
        ...

    def act(self, actions_N: np.ndarray) -> None:
        """Take one action in every game."""
        ...

    def close(self) -> None:
        """Release the games."""
        ...


class LevelOrder:
    """The levels that each game plays, one after another: a stream a game, so that none depends on the others."""

    def __init__(self, num_envs: int, *, start_level: int, num_levels: int, rand_seed: int) -> None:
        if num_levels < 1 or start_level < 0:
            raise ConfigError(
                f"levels [{start_level}, {start_level} + {num_levels}): a start of at least 0 and at least one level "
                "are needed"
            )
        self._start, self._count = start_level, num_levels
        streams = np.random.SeedSequence(rand_seed).spawn(num_envs)
        self._generators = [np.random.Generator(np.random.Philox(stream)) for stream in streams]

    def draw(self, lane: int) -> int:
        """The next level of a game."""
        return self._start + int(self._generators[lane].integers(self._count))


class SoloGame(Protocol):
    """One game as a Python object."""

    def reset(self, level_seed: int) -> np.ndarray:
        """Begin a level; its first frame (H, W, C) uint8."""
        ...

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        """Take an action: the frame after it, its reward, and whether the episode is over."""
        ...


class SoloGames:
    """N Python games behind the interface of `VectorGames`."""

    def __init__(self, games: list[Any], order: LevelOrder) -> None:
        self._games, self._order = games, order
        self._rewards_N = np.zeros(len(games), np.float32)
        self._first_N = np.ones(len(games), bool)
        self._seeds_N = np.asarray([order.draw(lane) for lane in range(len(games))], np.int64)
        self._frames = [game.reset(int(seed)) for game, seed in zip(games, self._seeds_N, strict=True)]

    def observe(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._rewards_N, np.stack(self._frames), self._first_N

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        return self._seeds_N, np.full(len(self._games), UNKNOWN_COMPLETE)

    def act(self, actions_N: np.ndarray) -> None:
        rewards, first, seeds = np.zeros_like(self._rewards_N), np.zeros_like(self._first_N), self._seeds_N.copy()
        for lane, game in enumerate(self._games):
            self._frames[lane], rewards[lane], first[lane] = game.step(int(actions_N[lane]))
            if first[lane]:
                seeds[lane] = self._order.draw(lane)
                self._frames[lane] = game.reset(int(seeds[lane]))
        self._rewards_N, self._first_N, self._seeds_N = rewards, first, seeds

    def close(self) -> None:
        self._games = []


@dataclasses.dataclass(frozen=True)
class JaxGame:
    """A game as three pure functions of one game's state."""

    reset: Callable[[Array], Any]
    """Level seed, uint32 () -> state."""
    step: Callable[[Any, Array], tuple[Any, Array, Array, Array]]
    """State, action int32 () -> state, reward float32 (), over bool (), complete int8 () (1, 0, or -1 for unknown)."""
    render: Callable[[Any], Array]
    """State -> frame (H, W, C) uint8."""

    def compiled(self) -> tuple[Any, Any]:
        """`restart(states, over_N, seeds_N)` and `advance(states, actions_N)` over N games, with their frames."""

        def restart(states: Any, over_N: Array, seeds_N: Array) -> tuple[Any, Array]:
            fresh = jax.vmap(self.reset)(seeds_N)
            states = jax.tree.map(
                lambda new, old: jnp.where(over_N.reshape(-1, *[1] * (new.ndim - 1)), new, old), fresh, states
            )
            return states, jax.vmap(self.render)(states)

        def advance(states: Any, actions_N: Array) -> tuple[Any, Array, Array, Array, Array]:
            states, rewards_N, over_N, complete_N = jax.vmap(self.step)(states, actions_N)
            return states, rewards_N, over_N, complete_N, jax.vmap(self.render)(states)

        return jax.jit(restart), jax.jit(advance)


class JaxGames:
    """N JAX games behind the interface of `VectorGames`.

    Args:
        game: its functions, for the first states.
        compiled: what `game.compiled()` gave; kept by the caller, so that shards share compiled code.
        num_envs: games side by side.
        order: which levels they play.
    """

    def __init__(self, game: JaxGame, compiled: tuple[Any, Any], num_envs: int, order: LevelOrder) -> None:
        self._order = order
        self._restart, self._advance = compiled
        self._seeds_N = np.asarray([order.draw(lane) for lane in range(num_envs)], np.int64)
        self._rewards_N = np.zeros(num_envs, np.float32)
        self._first_N = np.ones(num_envs, bool)
        self._complete_N = np.full(num_envs, UNKNOWN_COMPLETE)
        seeds_N = self._seeds_N.astype(np.uint32)
        shapes = jax.eval_shape(jax.vmap(game.reset), seeds_N)
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        self._states, frames = self._restart(blank, self._first_N, seeds_N)
        self._frames_NHWC = np.asarray(frames)

    def observe(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._rewards_N, self._frames_NHWC, self._first_N

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        return self._seeds_N, self._complete_N

    def act(self, actions_N: np.ndarray) -> None:
        self._states, rewards, over, complete, frames = self._advance(self._states, np.asarray(actions_N, np.int32))
        self._rewards_N, self._first_N, self._complete_N = np.asarray(rewards), np.asarray(over), np.asarray(complete)
        if self._first_N.any():
            self._seeds_N = self._seeds_N.copy()
            for lane in np.flatnonzero(self._first_N).tolist():
                self._seeds_N[lane] = self._order.draw(lane)
            self._states, frames = self._restart(self._states, over, self._seeds_N.astype(np.uint32))
        self._frames_NHWC = np.asarray(frames)

    def close(self) -> None:
        self._states = None
