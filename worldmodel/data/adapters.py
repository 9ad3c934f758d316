"""Games of other packages behind the collector's interface: MinAtar, Atari, Craftax.

None of them is imported before one of its games is asked for; a missing one is an error that names the extra of
pyproject.toml (`pip install -e ".[games]"`). Frames are 64 x 64 x 3, so every preset takes them as they are.

- `minatar:NAME`: ten by ten cells, a colour each, six pixels a cell, two pixels of rim. Seeds are MinAtar's own.
- `atari:NAME`: the ROMs that ale-py ships. Four emulated frames a frame (the brighter of the last two at every pixel),
  actions as given, never repeated by chance. A console has no levels: a level seed draws 8 to 63 frames of random
  actions that come before the first frame.
- `craftax:classic`, `craftax:full`: their pixel renderers, the first with a rim of one pixel, the second scaled down.
  The first game of a process compiles for a minute or two. craftax keeps its textures in a cache file of its own
  package.

Letters: H height, W width, C channels, L layers of a MinAtar state, N games.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from PIL import Image

from common.errors import ConfigError
from worldmodel.data.games import GameSpec, JaxGame, JaxGames, LevelOrder, SoloGames, VectorGames

ADAPTED = {"minatar": "minatar", "atari": "ale_py", "craftax": "craftax"}
"""Kind of game -> the module that plays it."""
FRAME_SHAPE = (64, 64, 3)
MINATAR_GAMES = ("asterix", "breakout", "freeway", "seaquest", "space_invaders")
CRAFTAX_GAMES = ("classic", "full")

_MINATAR_ACTIONS = ("none", "left", "up", "right", "down", "fire")
_CELL_PIXELS = 6
# One colour a layer, far apart; the layers of a game are drawn in order, later ones over earlier ones.
_LAYER_COLOURS = np.asarray(
    [
        (230, 60, 60), (60, 160, 255), (250, 210, 40), (70, 200, 90), (200, 90, 230),
        (255, 140, 20), (40, 220, 220), (240, 240, 240), (150, 110, 60), (255, 130, 180),
    ],
    np.uint8,
)  # fmt: skip
_ATARI_SKIP = 4
_ATARI_WARM_UP = (8, 64)
_ATARI_SEED = 0


def required(kind: str) -> Any:
    """The module that plays a kind of game.

    Raises:
        ConfigError: it is not installed.
    """
    name = ADAPTED[kind]
    if importlib.util.find_spec(name) is None:
        raise ConfigError(
            f'games of {kind} need the package {name}, which is not installed: pip install -e ".[games]" (an extra of '
            "pyproject.toml)"
        )
    return importlib.import_module(name)


def _known(kind: str, name: str, games: tuple[str, ...]) -> str:
    if name not in games:
        raise ConfigError(f"game '{kind}:{name}': {kind} has {', '.join(games)}")
    return name


# -------------------------------------------------------------------------------------------------------------- MinAtar


class MinatarGame:
    """One MinAtar game. `difficulty_ramping` is on, actions are never repeated by chance."""

    def __init__(self, name: str) -> None:
        # It warns of packages that only its own window needs.
        logging.getLogger().addFilter(_no_minatar_window)
        try:
            required("minatar")
            module = importlib.import_module("minatar")
        finally:
            logging.getLogger().removeFilter(_no_minatar_window)
        self._game = module.Environment(_known("minatar", name, MINATAR_GAMES), sticky_action_prob=0.0)

    def reset(self, level_seed: int) -> np.ndarray:
        self._game.seed(level_seed)
        self._game.reset()
        return self._picture()

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        reward, over = self._game.act(action)
        return self._picture(), float(reward), bool(over)

    def _picture(self) -> np.ndarray:
        state_HWL = np.asarray(self._game.state(), bool)
        cells_HWC = np.zeros((*state_HWL.shape[:2], 3), np.uint8)
        for layer in range(state_HWL.shape[2]):
            cells_HWC[state_HWL[:, :, layer]] = _LAYER_COLOURS[layer]
        picture = np.zeros(FRAME_SHAPE, np.uint8)
        rim = (FRAME_SHAPE[0] - _CELL_PIXELS * len(cells_HWC)) // 2
        picture[rim:-rim, rim:-rim] = cells_HWC.repeat(_CELL_PIXELS, axis=0).repeat(_CELL_PIXELS, axis=1)
        return picture


def _no_minatar_window(record: logging.LogRecord) -> bool:
    return "Cannot import matplotlib" not in record.getMessage()


# ---------------------------------------------------------------------------------------------------------------- Atari


class AtariGame:
    """One console."""

    def __init__(self, name: str) -> None:
        ale_py = required("atari")
        roms = importlib.import_module("ale_py.roms")
        _known("atari", name, tuple(roms.get_all_rom_ids()))
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self._console = ale_py.ALEInterface()
        self._console.setInt("random_seed", _ATARI_SEED)
        self._console.setFloat("repeat_action_probability", 0.0)
        self._console.setInt("frame_skip", 1)
        self._console.loadROM(roms.get_rom_path(name))
        self._actions = self._console.getMinimalActionSet()
        self._fresh = self._console.cloneState(include_rng=True)

    @property
    def action_names(self) -> tuple[str, ...]:
        """The actions that do something in this game."""
        return tuple(action.name.lower() for action in self._actions)

    def reset(self, level_seed: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(level_seed))
        self._console.restoreState(self._fresh)
        picture = self._small(self._console.getScreenRGB())
        for action in generator.integers(0, len(self._actions), generator.integers(*_ATARI_WARM_UP)):
            picture, _, over = self.step(int(action))
            if over:
                self._console.restoreState(self._fresh)
        return picture

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        reward, screens = 0.0, []
        for repeat in range(_ATARI_SKIP):
            reward += self._console.act(self._actions[action])
            if repeat >= _ATARI_SKIP - 2:
                screens.append(self._console.getScreenRGB())
        return self._small(np.maximum(*screens)), float(reward), bool(self._console.game_over())

    @staticmethod
    def _small(screen_HWC: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(screen_HWC).resize(FRAME_SHAPE[:2], Image.Resampling.BOX))


# -------------------------------------------------------------------------------------------------------------- Craftax


@functools.cache
def _craftax(name: str) -> tuple[JaxGame, tuple[Any, Any], tuple[str, ...]]:
    """The game, its compiled form and its action names."""
    required("craftax")
    _known("craftax", name, CRAFTAX_GAMES)
    folder, prefix = ("craftax_classic", "CraftaxClassic") if name == "classic" else ("craftax", "Craftax")
    pixels = importlib.import_module(f"craftax.{folder}.envs.craftax_pixels_env")
    constants = importlib.import_module(f"craftax.{folder}.constants")
    env = getattr(pixels, f"{prefix}PixelsEnvNoAutoReset")()
    parameters = env.default_params

    def reset(level_seed: Array) -> Any:
        world_key, play_key = jax.random.split(jax.random.key(level_seed))
        return {"world": env.reset_env(world_key, parameters)[1], "key": jax.random.key_data(play_key)}

    def step(state: Any, action: Array) -> tuple[Any, Array, Array, Array]:
        now, later = jax.random.split(jax.random.wrap_key_data(state["key"]))
        _, world, reward, over, _ = env.step_env(now, state["world"], action, parameters)
        next_state = {"world": world, "key": jax.random.key_data(later)}
        return next_state, jnp.float32(reward), over, jnp.int8(-1)

    def render(state: Any) -> Array:
        picture_HWC = env.get_obs(state["world"])
        height, width, _ = picture_HWC.shape
        if height <= FRAME_SHAPE[0] and width <= FRAME_SHAPE[1]:
            picture_HWC = jnp.pad(picture_HWC, ((0, FRAME_SHAPE[0] - height), (0, FRAME_SHAPE[1] - width), (0, 0)))
        else:
            picture_HWC = jax.image.resize(picture_HWC, FRAME_SHAPE, "linear")
        return jnp.round(255.0 * jnp.clip(picture_HWC, 0.0, 1.0)).astype(jnp.uint8)

    game = JaxGame(reset=reset, step=step, render=render)
    return game, game.compiled(), tuple(action.name.lower() for action in constants.Action)


# ----------------------------------------------------------------------------------------------------------------- both


@functools.cache
def adapted_spec(game: str) -> GameSpec:
    """Frame size, actions and speed of `kind:name`.

    Raises:
        ConfigError: the package is not installed, or has no such game.
    """
    kind, _, name = game.partition(":")
    if kind == "minatar":
        required(kind)
        _known(kind, name, MINATAR_GAMES)
        return GameSpec(game, kind, FRAME_SHAPE, _MINATAR_ACTIONS, 10)
    if kind == "atari":
        return GameSpec(game, kind, FRAME_SHAPE, AtariGame(name).action_names, 60 // _ATARI_SKIP)
    return GameSpec(game, kind, FRAME_SHAPE, _craftax(name)[2], 5)


def open_adapted(game: str, num_envs: int, order: LevelOrder) -> VectorGames:
    """Games side by side. See `adapted_spec` for what is raised."""
    kind, _, name = game.partition(":")
    if kind == "craftax":
        functions, compiled, _ = _craftax(name)
        return JaxGames(functions, compiled, num_envs, order)
    make = MinatarGame if kind == "minatar" else AtariGame
    return SoloGames([make(name) for _ in range(num_envs)], order)
