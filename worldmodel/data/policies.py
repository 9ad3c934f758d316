"""Who plays while data is collected: random, sticky, leaning to the right, or a function of your own.

Letters: N environments, H height, W width, C channels, A actions.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.errors import ConfigError

POLICY_NAMES = ("random", "sticky", "sticky-right")

# Weights of actions by direction when "sticky-right" draws a new one. In a platform game the world goes on to the
# right; every action is still taken often enough that a model can learn what each does.
_RIGHT_WEIGHT, _LEFT_WEIGHT, _OTHER_WEIGHT = 6.0, 1.5, 1.0


class Policy(Protocol):
    """Chooses actions while data is collected. Everything it draws comes from the generator that it was made with."""

    def act(self, frames_NHWC: np.ndarray, first_N: np.ndarray) -> np.ndarray:
        """Actions (N,) int32 for the present frames; `first_N` marks frames that open an episode."""
        ...


class RandomPolicy:
    """Uniformly random actions."""

    def __init__(self, num_envs: int, generator: np.random.Generator, *, num_actions: int) -> None:
        self._num_envs, self._num_actions = num_envs, num_actions
        self._generator = generator

    def act(self, frames_NHWC: np.ndarray, first_N: np.ndarray) -> np.ndarray:
        return self._generator.integers(0, self._num_actions, self._num_envs, dtype=np.int32)


class StickyPolicy:
    """Repeats its last action with probability `stickiness`, else draws a new one from `weights_A`."""

    def __init__(
        self,
        num_envs: int,
        generator: np.random.Generator,
        *,
        weights_A: tuple[float, ...],
        stickiness: float = 0.75,
    ) -> None:
        self._generator = generator
        self._stickiness = stickiness
        self._cumulative_A = np.cumsum(weights_A) / np.sum(weights_A)
        self._last_N = np.zeros(num_envs, np.int32)

    def act(self, frames_NHWC: np.ndarray, first_N: np.ndarray) -> np.ndarray:
        draws_2N = self._generator.random((2, len(self._last_N)))
        fresh_N = np.searchsorted(self._cumulative_A, draws_2N[1], side="right").astype(np.int32)
        redraw_N = first_N | (draws_2N[0] >= self._stickiness)
        self._last_N = np.where(redraw_N, fresh_N, self._last_N)
        return self._last_N


class CheckedPolicy:
    """A policy of somebody else's, whose every answer is checked before a game gets it."""

    def __init__(self, name: str, inner: Policy, num_envs: int, num_actions: int) -> None:
        self._name, self._inner, self._num_envs, self._num_actions = name, inner, num_envs, num_actions

    def act(self, frames_NHWC: np.ndarray, first_N: np.ndarray) -> np.ndarray:
        answer = np.asarray(self._inner.act(frames_NHWC, first_N))
        if answer.shape != (self._num_envs,) or not np.issubdtype(answer.dtype, np.integer):
            raise ConfigError(
                f"policy {self._name}: act() gave an array of shape {answer.shape} and dtype {answer.dtype}, expected "
                f"integers of shape ({self._num_envs},)"
            )
        if answer.min() < 0 or answer.max() >= self._num_actions:
            wrong = answer[(answer < 0) | (answer >= self._num_actions)][0]
            raise ConfigError(f"policy {self._name}: action {int(wrong)} is outside [0, {self._num_actions})")
        return answer.astype(np.int32)


def right_weights(action_names: tuple[str, ...]) -> tuple[float, ...]:
    """Weights of "sticky-right" for a game's actions.

    Raises:
        ConfigError: no action goes to the right.
    """
    if not any("right" in name.lower() for name in action_names):
        raise ConfigError(
            f"policy 'sticky-right': no action goes to the right (there are {', '.join(action_names)}); use 'sticky'"
        )
    return tuple(
        _RIGHT_WEIGHT if "right" in name.lower() else _LEFT_WEIGHT if "left" in name.lower() else _OTHER_WEIGHT
        for name in action_names
    )


def load_policy_factory(name: str) -> Any:
    """The function that "module:function" names.

    Raises:
        ConfigError: another form, no such module, or no such function in it.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise ConfigError(
            f"policy {name!r}: expected one of {', '.join(POLICY_NAMES)}, or module:function of your own"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"policy {name!r}: {module_name} cannot be imported ({error}); it must be on PYTHONPATH"
        ) from error
    factory = getattr(module, function_name, None)
    if not callable(factory):
        raise ConfigError(f"policy {name!r}: {module_name} has no function {function_name}")
    return factory


def policy_source_sha256(name: str) -> str | None:
    """SHA-256 of the file that a "module:function" comes from; None for the policies of this module.

    Raises:
        ConfigError: see `load_policy_factory`; or the function has no source file.
    """
    if name in POLICY_NAMES:
        return None
    try:
        path = inspect.getsourcefile(inspect.unwrap(load_policy_factory(name)))
    except TypeError:
        path = None
    if path is None:
        raise ConfigError(f"policy {name!r}: has no source file, so a data set could not say who played it")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def make_policy(
    name: str,
    num_envs: int,
    generator: np.random.Generator,
    *,
    action_names: tuple[str, ...],
    weights_A: tuple[float, ...] | None = None,
) -> Policy:
    """The policy of a name.

    Args:
        name: random, sticky, sticky-right, or module:function. The function is called as
            `function(num_envs, generator, action_names)` and returns an object with `act(frames_NHWC, first_N)`.
        num_envs: games played side by side.
        generator: of everything that the policy draws.
        action_names: of the game.
        weights_A: of "sticky-right" where the game has its own; by the actions' names otherwise.

    Raises:
        ConfigError: an unknown name, a function that cannot be used, or a game without an action to the right.
    """
    if name == "random":
        return RandomPolicy(num_envs, generator, num_actions=len(action_names))
    if name == "sticky":
        return StickyPolicy(num_envs, generator, weights_A=(1.0,) * len(action_names))
    if name == "sticky-right":
        return StickyPolicy(num_envs, generator, weights_A=weights_A or right_weights(action_names))
    policy = load_policy_factory(name)(num_envs, generator, action_names)
    if not callable(getattr(policy, "act", None)):
        raise ConfigError(f"policy {name!r}: the function gave a {type(policy).__name__}, which has no act()")
    return CheckedPolicy(name, policy, num_envs, len(action_names))
