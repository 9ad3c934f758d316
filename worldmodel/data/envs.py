"""Procgen games as a source of episodes, and the policies that play them while data is collected.

gym3's order of things decides the alignment of the records. `observe()` returns (reward, frame, first): the frame is
the present one; `first` says that it opens an episode; the reward belongs to the action *before* it, which is the last
action of the ended episode when `first` is set. The frame after the last action of an ended episode is never shown.

Letters: N environments, H height, W width, C channels, A actions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np

from common.errors import ConfigError
from worldmodel.data.records import END_CUT, END_TERMINAL, EncodedEpisode, EpisodeEncoder, RecordLayout

PROCGEN_GAMES = (
    "bigfish",
    "bossfight",
    "caveflyer",
    "chaser",
    "climber",
    "coinrun",
    "dodgeball",
    "fruitbot",
    "heist",
    "jumper",
    "leaper",
    "maze",
    "miner",
    "ninja",
    "plunder",
    "starpilot",
)
PROCGEN_ACTION_NAMES = (
    "left+down",
    "left",
    "left+up",
    "down",
    "none",
    "up",
    "right+down",
    "right",
    "right+up",
    "d",
    "a",
    "w",
    "s",
    "q",
    "e",
)
PROCGEN_FPS = 15
PROCGEN_FRAME_SHAPE = (64, 64, 3)
NUM_ACTIONS = len(PROCGEN_ACTION_NAMES)

# Probability of each action when "sticky-right" draws a new one: it runs and jumps to the right, where a platform game
# goes on, and still takes every action often enough that a model can learn what each does.
_RIGHT_WEIGHTS = (2, 8, 5, 3, 6, 8, 2, 30, 30, 1, 1, 1, 1, 1, 1)

PolicyName = Literal["random", "sticky-right"]

# procgen loads its images and Qt once a process, without a lock of its own.
_make_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class EnvOptions:
    """What decides the pictures of a procgen game."""

    game: str = "coinrun"
    distribution_mode: Literal["easy", "hard", "extreme", "memory"] = "hard"
    use_backgrounds: bool = True
    restrict_themes: bool = False
    use_monochrome_assets: bool = False
    use_generated_assets: bool = False
    paint_vel_info: bool = False
    center_agent: bool = True

    def __post_init__(self) -> None:
        if self.game not in PROCGEN_GAMES:
            near = difflib.get_close_matches(self.game, PROCGEN_GAMES, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"game {self.game!r}: {hint}expected one of {', '.join(PROCGEN_GAMES)}")


class Policy(Protocol):
    """Chooses actions while data is collected. Everything it draws comes from the generator that it was made with."""

    def act(self, frames_NHWC: np.ndarray, first_N: np.ndarray) -> np.ndarray:
        """Actions (N,) int32 for the present frames; `first_N` marks frames that open an episode."""
        ...


class RandomPolicy:
    """Uniformly random actions."""

    def __init__(self, num_envs: int, generator: np.random.Generator) -> None:
        self._num_envs = num_envs
        self._generator = generator

    def act(self, frames_NHWC: np.ndarray, first_N: np.ndarray) -> np.ndarray:
        return self._generator.integers(0, NUM_ACTIONS, self._num_envs, dtype=np.int32)


class StickyPolicy:
    """Repeats its last action with probability `stickiness`, else draws a new one from `weights_A`."""

    def __init__(
        self,
        num_envs: int,
        generator: np.random.Generator,
        *,
        stickiness: float = 0.75,
        weights_A: tuple[float, ...] = _RIGHT_WEIGHTS,
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


def make_policy(name: PolicyName, num_envs: int, generator: np.random.Generator) -> Policy:
    """The policy of a name."""
    if name == "random":
        return RandomPolicy(num_envs, generator)
    if name == "sticky-right":
        return StickyPolicy(num_envs, generator)
    raise ConfigError(f"policy {name!r}: expected 'random' or 'sticky-right'")


def make_procgen(options: EnvOptions, *, num_envs: int, start_level: int, num_levels: int, rand_seed: int) -> Any:
    """A vector of procgen games whose levels and order of levels are all decided by the arguments.

    Args:
        options: the game and its pictures.
        num_envs: games played side by side.
        start_level: first level seed.
        num_levels: levels are drawn from [start_level, start_level + num_levels). With 0, procgen would ignore
            `start_level` and draw from the system's random numbers, so at least 1 is asked for.
        rand_seed: seed of the order of levels.

    Returns:
        A `ProcgenGym3Env` that steps inside the calling thread.

    Raises:
        ConfigError: procgen is not installed, or `num_levels` is not positive.
    """
    if num_levels < 1 or start_level < 0:
        raise ConfigError(
            f"levels [{start_level}, {start_level} + {num_levels}): a start of at least 0 and at least one level are "
            "needed"
        )
    with _make_lock:
        try:
            # gym announces its end on standard error at import; that is no news to the user of this program.
            if "procgen" not in sys.modules:
                with contextlib.redirect_stderr(io.StringIO()):
                    from procgen import ProcgenGym3Env
            else:
                from procgen import ProcgenGym3Env
        except ImportError as error:
            raise ConfigError(
                f"procgen cannot be imported ({error}): install it as the installation notes say "
                "(`pip install --no-deps procgen-mirror gym gym3 ...`)"
            ) from error
        pictures = {name: value for name, value in dataclasses.asdict(options).items() if name != "game"}
        return ProcgenGym3Env(
            num=num_envs,
            env_name=options.game,
            num_levels=num_levels,
            start_level=start_level,
            rand_seed=rand_seed,
            num_threads=0,
            **pictures,
        )


class Cancelled(Exception):
    """The collection was told to stop; nothing of the shard is kept."""


def play_shard(
    options: EnvOptions,
    layout: RecordLayout,
    *,
    num_envs: int,
    num_steps: int,
    start_level: int,
    num_levels: int,
    rand_seed: int,
    policy: Policy,
    on_frames: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
) -> list[EncodedEpisode]:
    """Play `num_envs` games for `num_steps` steps each and return every episode, in order of its end.

    An episode that is under way when the steps are used up is kept as far as it went (END_CUT): leaving it out would
    favour short episodes. Exactly num_envs · num_steps frames are returned.

    Args:
        options: the game.
        layout: how episodes are stored.
        num_envs: games side by side.
        num_steps: steps of each game.
        start_level, num_levels, rand_seed: see `make_procgen`.
        policy: chooses the actions.
        on_frames: called with the number of new frames after every step.
        stop: when set, playing ends with `Cancelled`.
    """
    env = make_procgen(options, num_envs=num_envs, start_level=start_level, num_levels=num_levels, rand_seed=rand_seed)
    try:
        encoders = [EpisodeEncoder(layout) for _ in range(num_envs)]
        episodes: list[EncodedEpisode] = []
        level_seeds = [-1] * num_envs
        _, observation, first_N = env.observe()
        actions: list[int] = []
        for step in range(num_steps + 1):
            if step:
                rewards_N, observation, first_N = env.observe()
                for lane, (action, reward) in enumerate(zip(actions, rewards_N.tolist(), strict=True)):
                    encoders[lane].add_step(action, reward)
            if first_N.any():
                infos = env.get_info()
                for lane in np.flatnonzero(first_N).tolist():
                    if step:
                        complete = int(infos[lane]["prev_level_complete"])
                        assert int(infos[lane]["prev_level_seed"]) == level_seeds[lane]
                        episodes.append(
                            encoders[lane].finish(
                                level_seed=level_seeds[lane], end=END_TERMINAL, level_complete=complete
                            )
                        )
                    level_seeds[lane] = int(infos[lane]["level_seed"])
            if step == num_steps:
                break
            if stop is not None and stop.is_set():
                raise Cancelled
            frames_NHWC = observation["rgb"]
            for lane in range(num_envs):
                encoders[lane].add_item(frames_NHWC[lane])
            actions_N = policy.act(frames_NHWC, first_N)
            env.act(actions_N)
            actions = actions_N.tolist()
            if on_frames is not None:
                on_frames(num_envs)
        for lane in range(num_envs):
            if encoders[lane].num_frames:
                episodes.append(encoders[lane].finish(level_seed=level_seeds[lane], end=END_CUT))
        return episodes
    finally:
        env.close()


def replay_episode(options: EnvOptions, level_seed: int, actions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
    """Play one level again with given actions; the check that records hold what the game showed.

    Args:
        options: the game as it was recorded.
        level_seed: the episode's level.
        actions_N: its actions.

    Returns:
        frames_NHWC uint8 at which the actions are taken, rewards_N float32 that follow them, and whether the last
        action ended the episode.
    """
    env = make_procgen(options, num_envs=1, start_level=level_seed, num_levels=1, rand_seed=0)
    try:
        frames, rewards, ended = [], [], False
        for action in actions_N:
            _, observation, _ = env.observe()
            frames.append(observation["rgb"][0].copy())
            env.act(np.asarray([action], np.int32))
            reward, _, first = env.observe()
            rewards.append(float(reward[0]))
            ended = bool(first[0])
        return np.stack(frames), np.asarray(rewards, np.float32), ended
    finally:
        env.close()
