"""Puck: a small procedural game whose state is known. A puck with inertia chases a ball among walls.

    python -m worldmodel collect --env.game puck --out-dir data/puck

64 x 64 pixels, a grid of 8 x 8 cells of which some are walls; a level seed decides walls, colours, gravity, and where
puck and ball begin. Five actions push the puck or leave it alone; it keeps most of its speed, and a bounce costs a
quarter of it. The ball bounces without loss and cannot be steered, so what it does next cannot be told from one frame:
velocities need two. Touching the ball pays 1 and ends the episode; without that it ends after 400 frames.

All of it is integer arithmetic: a level seed and a list of actions give the same frames, bit for bit, on every device.
Records therefore hold no states: `replay_states` plays them again.

Letters: R, S rows and columns of the grid, T frames, K numbers of a state, N episodes.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from worldmodel.data.games import GameSpec, JaxGame

SIZE = 64
CELL = 8
GRID = SIZE // CELL
UNIT = 256  # one pixel; positions in 1/256 pixel, velocities in 1/256 pixel a substep
SUBSTEPS = 4  # of one frame
RADIUS = 3 * UNIT
MOST_SPEED = UNIT  # less than a cell a substep: nothing tunnels through a wall
PUSH = 56
DRAG_SHIFT = 4  # a sixteenth of the puck's speed is lost a frame
TIME_LIMIT = 400
WALL_SHARE = 38  # of 256

PUCK_COLOUR = (255, 150, 20)
BALL_COLOUR = (90, 230, 255)

SPEC = GameSpec("puck", "puck", (SIZE, SIZE, 3), ("none", "left", "right", "up", "down"), fps=15)
STATE_NAMES = ("puck_x", "puck_y", "puck_vx", "puck_vy", "ball_x", "ball_y", "ball_vx", "ball_vy")
# What a state probe reports: columns that belong together, and their unit.
STATE_GROUPS = {
    "puck_position_px": (0, 1),
    "puck_velocity_px_per_frame": (2, 3),
    "ball_position_px": (4, 5),
    "ball_velocity_px_per_frame": (6, 7),
}

_PUSHES = np.asarray([[0, 0], [-PUSH, 0], [PUSH, 0], [0, -PUSH], [0, PUSH]], np.int32)


class State(NamedTuple):
    """One game. Integers; x to the right, y down."""

    place_2: Array
    """Of the puck's middle, int32, 1/256 pixel."""
    speed_2: Array
    """int32, 1/256 pixel a substep."""
    ball_place_2: Array
    ball_speed_2: Array
    walls_RS: Array
    """bool."""
    gravity: Array
    """Added to the puck's downward speed once a frame, int32."""
    colours_23: Array
    """uint8, of the floor and of walls."""
    time: Array
    """Frames since the beginning, int32."""


def scrambled(seed: Array, stream: Array | int) -> Array:
    """A 32-bit hash of two numbers, uint32.

    Source: Wellons, "Prospecting for Hash Functions" (2018), `lowbias32`. JAX's own generators may draw other bits in
    another version; levels must stay what they are.
    """
    x = jnp.asarray(seed, jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.asarray(stream, jnp.uint32)
    for _ in range(2):  # the inputs are neighbouring numbers: one round is not enough for their differences
        x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
        x = x ^ (x >> 16)
    return x


def reset(level_seed: Array) -> State:
    """The first state of a level.

    Args:
        level_seed: uint32 ().
    """
    cells = jnp.arange(GRID * GRID, dtype=jnp.uint32)
    # Where puck and ball begin: the two cells of highest rank, which are kept free of walls.
    rank = scrambled(level_seed, 1000 + cells)
    first = jnp.argmax(rank)
    second = jnp.argmax(jnp.where(cells == first, jnp.uint32(0), rank))
    wall = (scrambled(level_seed, 2000 + cells) >> 24) < WALL_SHARE
    wall = wall & (cells != first) & (cells != second)

    def middle(cell: Array) -> Array:
        return ((jnp.stack([cell % GRID, cell // GRID]) * CELL + CELL // 2) * UNIT).astype(jnp.int32)

    draws = scrambled(level_seed, 3000 + jnp.arange(2, dtype=jnp.uint32))
    size = 64 + ((draws >> 8) % 128).astype(jnp.int32)
    tones = scrambled(level_seed, 4000 + jnp.arange(6, dtype=jnp.uint32)).reshape(2, 3)
    # The floor is dark, walls are lighter: both leave puck and ball visible.
    colours = (tones >> 16) % 48 + jnp.asarray([[0], [80]], jnp.uint32)
    return State(
        place_2=middle(first),
        speed_2=jnp.zeros(2, jnp.int32),
        ball_place_2=middle(second),
        ball_speed_2=jnp.where((draws & 1) == 1, size, -size),
        walls_RS=wall.reshape(GRID, GRID),
        gravity=((scrambled(level_seed, 5000) >> 16) % 13).astype(jnp.int32),
        colours_23=colours.astype(jnp.uint8),
        time=jnp.int32(0),
    )


def _blocked(place_2: Array, walls_RS: Array) -> Array:
    """Whether a square of that half side overlaps a wall or the rim: its corners decide, it is smaller than a cell."""
    corners_42 = place_2 + jnp.asarray([[-1, -1], [1, -1], [-1, 1], [1, 1]], jnp.int32) * RADIUS
    outside = (corners_42 < 0) | (corners_42 >= SIZE * UNIT)
    cell_42 = jnp.clip(corners_42 // (CELL * UNIT), 0, GRID - 1)
    return jnp.any(outside) | jnp.any(walls_RS[cell_42[:, 1], cell_42[:, 0]])


def _moved(place_2: Array, speed_2: Array, walls_RS: Array, kept_quarters: int) -> tuple[Array, Array]:
    """One substep, one axis after the other; a blocked axis turns around and keeps some quarters of its speed."""
    for axis in (0, 1):
        wanted_2 = place_2.at[axis].add(speed_2[axis])
        hit = _blocked(wanted_2, walls_RS)
        back = -jnp.sign(speed_2[axis]) * (jnp.abs(speed_2[axis]) * kept_quarters // 4)
        place_2 = jnp.where(hit, place_2, wanted_2)
        speed_2 = speed_2.at[axis].set(jnp.where(hit, back, speed_2[axis]))
    return place_2, speed_2


def step(state: State, action: Array) -> tuple[State, Array, Array, Array]:
    """Take an action.

    Args:
        state: one game.
        action: int32 (), in [0, 5).

    Returns:
        The next state, reward float32 (), whether the episode is over, and int8 1 or 0: whether the ball was caught.
    """
    speed_2 = state.speed_2 - jnp.sign(state.speed_2) * (jnp.abs(state.speed_2) >> DRAG_SHIFT)
    speed_2 = speed_2 + jnp.asarray(_PUSHES)[action] + jnp.stack([jnp.int32(0), state.gravity])
    speed_2 = jnp.clip(speed_2, -MOST_SPEED, MOST_SPEED)

    def substep(_: Array, now: tuple[Array, ...]) -> tuple[Array, ...]:
        place_2, speed_2, ball_2, ball_speed_2, caught = now
        place_2, speed_2 = _moved(place_2, speed_2, state.walls_RS, 3)
        ball_2, ball_speed_2 = _moved(ball_2, ball_speed_2, state.walls_RS, 4)
        caught = caught | (jnp.sum((place_2 - ball_2) ** 2) < (2 * RADIUS) ** 2)
        return place_2, speed_2, ball_2, ball_speed_2, caught

    before = (state.place_2, speed_2, state.ball_place_2, state.ball_speed_2, jnp.bool_(False))
    place_2, speed_2, ball_2, ball_speed_2, caught = jax.lax.fori_loop(0, SUBSTEPS, substep, before)
    time = state.time + 1
    next_state = state._replace(
        place_2=place_2, speed_2=speed_2, ball_place_2=ball_2, ball_speed_2=ball_speed_2, time=time
    )
    return next_state, caught.astype(jnp.float32), caught | (time >= TIME_LIMIT), caught.astype(jnp.int8)


def render(state: State) -> Array:
    """The frame of a state, uint8 (64, 64, 3); discs are blended at their rim, so that parts of a pixel show."""
    cells = jnp.arange(SIZE) // CELL
    wall_HW1 = state.walls_RS[cells][:, cells][..., None]
    picture = jnp.where(wall_HW1, state.colours_23[1], state.colours_23[0]).astype(jnp.int32)
    middle = jnp.arange(SIZE, dtype=jnp.int32) * UNIT + UNIT // 2
    inner, outer = (RADIUS - UNIT // 2) ** 2, (RADIUS + UNIT // 2) ** 2
    for place_2, colour in ((state.ball_place_2, BALL_COLOUR), (state.place_2, PUCK_COLOUR)):
        distance_HW = (middle[None, :] - place_2[0]) ** 2 + (middle[:, None] - place_2[1]) ** 2
        share_HW1 = (jnp.clip(outer - distance_HW, 0, outer - inner) // ((outer - inner) // 255 + 1))[..., None]
        picture = (picture * (255 - share_HW1) + jnp.asarray(colour, jnp.int32) * share_HW1) // 255
    return picture.astype(jnp.uint8)


def numbers(state: State) -> Array:
    """What a probe should find, float32 (8,) in the order of STATE_NAMES: pixels and pixels a frame."""
    per_frame = SUBSTEPS / UNIT
    parts = (
        state.place_2 / UNIT, state.speed_2 * per_frame, state.ball_place_2 / UNIT, state.ball_speed_2 * per_frame
    )  # fmt: skip
    return jnp.concatenate(parts).astype(jnp.float32)


GAME = JaxGame(reset=reset, step=step, render=render)


@functools.cache
def _compiled_replay() -> jax.stages.Wrapped:
    def replay(level_seed: Array, actions_T: Array) -> Array:
        def one(state: State, action: Array) -> tuple[State, Array]:
            return step(state, action)[0], numbers(state)

        return jax.lax.scan(one, reset(level_seed), actions_T)[1]

    return jax.jit(jax.vmap(replay))


def replay_states(level_seeds_N: np.ndarray, actions: list[np.ndarray]) -> list[np.ndarray]:
    """The states of recorded episodes.

    Args:
        level_seeds_N: level of each episode.
        actions: its actions from the first frame on, at most 400 of them.

    Returns:
        For each episode float32 (frames, 8): the state at which each action is taken.
    """
    padded_NT = np.zeros((len(actions), TIME_LIMIT), np.int32)
    for row, values in enumerate(actions):
        padded_NT[row, : len(values)] = values
    states_NTK = np.asarray(_compiled_replay()(np.asarray(level_seeds_N).astype(np.uint32), padded_NT))
    return [states_TK[: len(values)] for states_TK, values in zip(states_NTK, actions, strict=True)]
