"""Games as a source of episodes: which there are, how one is opened, how a shard of it is played.

gym3's order of things decides the alignment of the records. `observe()` returns (reward, frame, first): the frame is
the present one; `first` says that it opens an episode; the reward belongs to the action *before* it, which is the last
action of the ended episode when `first` is set. The frame after the last action of an ended episode is never shown.

`puck.py` is our own game, `adapters.py` has MinAtar, Atari and Craftax; what those need is imported when one is opened.

Letters: N environments, H height, W width, C channels, A actions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import io
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from common.errors import ConfigError
from worldmodel.data import policies, puck
from worldmodel.data.adapters import ADAPTED, adapted_spec, open_adapted
from worldmodel.data.games import GameSpec, JaxGames, LevelOrder, VectorGames
from worldmodel.data.policies import Policy
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

# procgen loads its images and Qt once a process, without a lock of its own.
_make_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class EnvOptions:
    """Which game, and for those of procgen what decides the pictures."""

    game: str = "coinrun"
    """A procgen game, `puck` (our own, no package needed), `minatar:NAME`, `atari:NAME`, `craftax:classic` or
    `craftax:full`."""
    distribution_mode: Literal["easy", "hard", "extreme", "memory"] = "hard"
    use_backgrounds: bool = True
    restrict_themes: bool = False
    use_monochrome_assets: bool = False
    use_generated_assets: bool = False
    paint_vel_info: bool = False
    center_agent: bool = True

    def __post_init__(self) -> None:
        kind = self.game.partition(":")[0]
        if self.game in PROCGEN_GAMES:
            return
        if self.game != "puck" and kind not in ADAPTED:
            known = [*PROCGEN_GAMES, "puck", *(f"{name}:GAME" for name in ADAPTED)]
            near = difflib.get_close_matches(self.game, known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"game {self.game!r}: {hint}expected one of {', '.join(known)}")
        for field in dataclasses.fields(self):
            if field.name != "game" and getattr(self, field.name) != field.default:
                raise ConfigError(f"{field.name}: is an option of procgen games, {self.game} does not have it")

    @property
    def procgen(self) -> bool:
        """Whether procgen plays it."""
        return self.game in PROCGEN_GAMES

    def recipe(self) -> dict[str, Any]:
        """What decides the pictures, for the manifest."""
        return dataclasses.asdict(self) if self.procgen else {"game": self.game}


def spec_of(options: EnvOptions) -> GameSpec:
    """Frame size, actions and speed of a game.

    Raises:
        ConfigError: a package that it needs is not installed, or has no such game.
    """
    if options.procgen:
        return GameSpec(options.game, "procgen", PROCGEN_FRAME_SHAPE, PROCGEN_ACTION_NAMES, PROCGEN_FPS)
    return puck.SPEC if options.game == "puck" else adapted_spec(options.game)


def make_policy(
    name: str,
    num_envs: int,
    generator: np.random.Generator,
    *,
    action_names: tuple[str, ...] = PROCGEN_ACTION_NAMES,
) -> Policy:
    """The policy of a name, see `policies.make_policy`; procgen games have weights of their own for "sticky-right"."""
    weights_A = tuple(map(float, _RIGHT_WEIGHTS)) if action_names == PROCGEN_ACTION_NAMES else None
    return policies.make_policy(name, num_envs, generator, action_names=action_names, weights_A=weights_A)


def open_games(
    options: EnvOptions, *, num_envs: int, start_level: int, num_levels: int, rand_seed: int
) -> VectorGames:
    """Games side by side whose levels and order of levels are all decided by the arguments.

    Args:
        options: the game.
        num_envs: games played side by side.
        start_level, num_levels: level seeds are drawn from [start_level, start_level + num_levels).
        rand_seed: seed of the order of levels.

    Raises:
        ConfigError: a package that it needs is not installed, or `num_levels` is not positive.
    """
    levels = {"start_level": start_level, "num_levels": num_levels, "rand_seed": rand_seed}
    if options.procgen:
        return ProcgenGames(make_procgen(options, num_envs=num_envs, **levels))
    order = LevelOrder(num_envs, **levels)
    if options.game == "puck":
        return JaxGames(puck.GAME, _compiled_puck(), num_envs, order)
    return open_adapted(options.game, num_envs, order)


@functools.cache
def _compiled_puck() -> tuple[Any, Any]:
    return puck.GAME.compiled()


class ProcgenGames:
    """procgen behind the interface of `VectorGames`."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def observe(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rewards_N, observation, first_N = self._env.observe()
        return rewards_N, observation["rgb"], first_N

    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        infos = self._env.get_info()
        seeds = [int(info["level_seed"]) for info in infos]
        return np.asarray(seeds), np.asarray([int(info["prev_level_complete"]) for info in infos])

    def act(self, actions_N: np.ndarray) -> None:
        self._env.act(actions_N)

    def close(self) -> None:
        self._env.close()


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
    games = open_games(options, num_envs=num_envs, start_level=start_level, num_levels=num_levels, rand_seed=rand_seed)
    try:
        encoders = [EpisodeEncoder(layout) for _ in range(num_envs)]
        episodes: list[EncodedEpisode] = []
        level_seeds = [-1] * num_envs
        _, frames_NHWC, first_N = games.observe()
        actions: list[int] = []
        for step in range(num_steps + 1):
            if step:
                rewards_N, frames_NHWC, first_N = games.observe()
                for lane, (action, reward) in enumerate(zip(actions, rewards_N.tolist(), strict=True)):
                    encoders[lane].add_step(action, reward)
            if first_N.any():
                seeds_N, complete_N = games.levels()
                for lane in np.flatnonzero(first_N).tolist():
                    if step:
                        episodes.append(
                            encoders[lane].finish(
                                level_seed=level_seeds[lane], end=END_TERMINAL, level_complete=int(complete_N[lane])
                            )
                        )
                    level_seeds[lane] = int(seeds_N[lane])
            if step == num_steps:
                break
            if stop is not None and stop.is_set():
                raise Cancelled
            for lane in range(num_envs):
                encoders[lane].add_item(frames_NHWC[lane])
            actions_N = policy.act(frames_NHWC, first_N)
            games.act(actions_N)
            actions = actions_N.tolist()
            if on_frames is not None:
                on_frames(num_envs)
        for lane in range(num_envs):
            if encoders[lane].num_frames:
                episodes.append(encoders[lane].finish(level_seed=level_seeds[lane], end=END_CUT))
        return episodes
    finally:
        games.close()


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
    games = open_games(options, num_envs=1, start_level=level_seed, num_levels=1, rand_seed=0)
    try:
        frames, rewards, ended = [], [], False
        for action in actions_N:
            _, frames_NHWC, _ = games.observe()
            frames.append(frames_NHWC[0].copy())
            games.act(np.asarray([action], np.int32))
            reward_N, _, first_N = games.observe()
            rewards.append(float(reward_N[0]))
            ended = bool(first_N[0])
        return np.stack(frames), np.asarray(rewards, np.float32), ended
    finally:
        games.close()
