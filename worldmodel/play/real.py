"""The real game beside the dream: one procgen game a player, which can be put at a clip's frame and rewound.

Legend: N actions · H W C frame.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections import deque
from typing import Any

import numpy as np

from common.errors import ConfigError, DataError
from worldmodel.config import from_dict
from worldmodel.data.envs import EnvOptions, make_procgen
from worldmodel.data.records import EpisodeSet

# Frames between two kept states of the game (37 kB each in CoinRun); a rewind plays at most so many again.
KEEP_EVERY = 15


@dataclasses.dataclass(frozen=True)
class RealSource:
    """Which game the data set shows, or why it cannot run here."""

    options: EnvOptions | None
    reason: str
    """Why there is no real game; empty when there is one."""


def real_source(dataset: EpisodeSet) -> RealSource:
    """What the manifest of a data set and this machine allow."""
    source = dataset.manifest.get("source") or {}
    if source.get("type") != "procgen":
        return RealSource(None, f"{dataset.data_dir} was not recorded from procgen")
    if importlib.util.find_spec("procgen") is None:
        return RealSource(None, "the package procgen is not installed (`make setup` does it on Python 3.11 and 3.12)")
    try:
        options = from_dict(EnvOptions, source["recipe"]["env"], where=f"{dataset.data_dir}/manifest.json")
    except (ConfigError, KeyError, TypeError) as error:
        return RealSource(None, f"the game's options in {dataset.data_dir} are not readable ({error})")
    return RealSource(options, "")


def checked_source(source: RealSource, level_seed: int, prefix_N: np.ndarray, expected_HWC: np.ndarray) -> RealSource:
    """The source, once its game was opened and shows a clip as recorded; else the reason why it does not.

    A process's first game loads its pictures for seconds: better before the first player than in the middle of a game.

    Args:
        source: see `real_source`.
        level_seed, prefix_N, expected_HWC: of one clip, see `RealGame.reset`.
    """
    if source.options is None or level_seed < 0:
        return source
    game = RealGame(source.options, history_frames=1)
    try:
        game.reset(level_seed, prefix_N, expected_HWC, 0)
    except (ConfigError, DataError) as error:
        return RealSource(None, str(error))
    finally:
        game.close()
    return source


class RealGame:
    """One level, played with the same actions as the dream; an ended level begins anew.

    States are numbered by frames since the reset, as the player's dream is.
    """

    def __init__(self, options: EnvOptions, history_frames: int) -> None:
        self._options = options
        self._states: deque[tuple[int, bytes]] = deque(maxlen=history_frames // KEEP_EVERY + 2)
        self._env: Any = None

    def reset(self, level_seed: int, prefix_N: np.ndarray, expected_HWC: np.ndarray, frame: int) -> np.ndarray:
        """Play a level up to the frame at which a clip's prompt ends.

        Args:
            level_seed: the level.
            prefix_N: all actions from its first frame on.
            expected_HWC: the recorded frame that must then be shown.
            frame: its number for the player.

        Returns:
            That frame.

        Raises:
            DataError: the game shows something else (another procgen build, or other options).
        """
        self.close()
        self._env = make_procgen(self._options, num_envs=1, start_level=level_seed, num_levels=1, rand_seed=0)
        picture_HWC = self._look()[0]
        for action in prefix_N:
            picture_HWC = self._act(int(action))[0]
        if not np.array_equal(picture_HWC, expected_HWC):
            raise DataError(
                f"level {level_seed} after {len(prefix_N)} actions does not look as recorded: this procgen differs "
                "from the one that recorded the clips"
            )
        self._states.clear()
        self._states.append((frame, self._state()))
        return picture_HWC

    def step(self, action: int, frame: int) -> tuple[np.ndarray, float, bool]:
        """Take an action.

        Args:
            action: the game's action number.
            frame: number of the frame that it leads to.

        Returns:
            The frame, the reward, and whether the level ended and began anew.
        """
        result = self._act(action)
        if frame % KEEP_EVERY == 0:
            self._states.append((frame, self._state()))
        return result

    def rewind(self, frame: int, actions: dict[int, int]) -> np.ndarray:
        """Go back to an earlier frame.

        Args:
            frame: its number.
            actions: the action that led to each frame since the kept state before it.

        Returns:
            The frame.
        """
        while len(self._states) > 1 and self._states[-1][0] > frame:
            self._states.pop()
        kept, state = self._states[-1]
        if kept > frame:
            raise DataError(f"frame {frame} is older than the oldest kept state of the real game, {kept}")
        self._env.callmethod("set_state", [state])
        picture_HWC = self._look()[0]
        for number in range(kept + 1, frame + 1):
            picture_HWC = self._act(actions[number])[0]
        return picture_HWC

    def renumber(self, frame: int) -> None:
        """Call the present frame by another number; older ones can no longer be reached."""
        self._states.clear()
        self._states.append((frame, self._state()))

    @property
    def oldest(self) -> int:
        """Number of the oldest frame that `rewind` reaches."""
        return self._states[0][0]

    def _state(self) -> bytes:
        return self._env.callmethod("get_state")[0]

    def _act(self, action: int) -> tuple[np.ndarray, float, bool]:
        self._env.act(np.asarray([action], np.int32))
        return self._look()

    def _look(self) -> tuple[np.ndarray, float, bool]:
        reward_1, observation, first_1 = self._env.observe()
        return observation["rgb"][0].copy(), float(reward_1[0]), bool(first_1[0])

    def close(self) -> None:
        """Release the game."""
        if self._env is not None:
            self._env.close()
            self._env = None
