"""A tiny untrained world to play, and clips of the synthetic game."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from tests.worldmodel.small import DYNAMICS, FRAME, LAM, NUM_ACTIONS, TOKENIZER, game_clips, train_config
from worldmodel.models.token_dynamics import MaskGitDynamics
from worldmodel.models.tokenizer import Tokenizer
from worldmodel.play.clips import ActionTable, StartClip
from worldmodel.play.messages import Settings
from worldmodel.play.pool import DreamPool
from worldmodel.play.real import RealSource
from worldmodel.play.session import Limits, Session
from worldmodel.rollout.world import World

PROMPT = 2
NAMES = ("left", "none", "right")
TABLE = ActionTable(NAMES, NAMES, (0, 1, 2), (0, 1, 2))
OFF = RealSource(None, "no real game in this test")


def make_world(**changes) -> World:
    """A world whose tokens depend strongly on actions and past."""
    config = dataclasses.replace(DYNAMICS, **changes)
    tokenizer = Tokenizer(TOKENIZER, rngs=nnx.Rngs(0))
    codes = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    model = MaskGitDynamics(config, FRAME, codes, num_actions=NUM_ACTIONS, lam=LAM, rngs=nnx.Rngs(0))
    model.token_table[...] = jax.random.normal(jax.random.key(9), model.token_table.shape)
    if config.action_source == "ground-truth":
        model.action_table[...] = 5.0 * model.action_table[...]
    return World(train_config("dynamics", "unused", dynamics=config), tokenizer, model, NUM_ACTIONS, source="test")


@pytest.fixture(scope="session")
def pool() -> DreamPool:
    made = DreamPool(make_world(), 3)
    for size in made.batch_sizes:
        made.compile_step(size)
    return made


@pytest.fixture(scope="session")
def clips() -> list[StartClip]:
    made = game_clips(3, PROMPT + 4, seed=5)
    return [
        StartClip(f"clip {i}", frames[:PROMPT], actions[: PROMPT - 1], actions[PROMPT - 1 :], -1, actions[:0])
        for i, (frames, actions) in enumerate(zip(made["frames_BTHWC"], made["actions_BT"], strict=True))
    ]


@pytest.fixture
def make_session(pool, clips):
    def make(slot: int = 0, *, limits: Limits | None = None, settings: Settings | None = None, **changes) -> Session:
        return Session(
            changes.get("pool", pool), slot, clips, changes.get("table", TABLE), changes.get("real", OFF),
            settings=settings or Settings(0.0, 2, 60.0), limits=limits or Limits(40, 10), warn_bits=10.0, seed=3,
        )  # fmt: skip

    return make
