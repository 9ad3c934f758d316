"""The pool's dreams are the sampler's: cached = uncached, together = alone, rebuilt = never left."""

import jax
import numpy as np
import pytest

from common.errors import ConfigError
from tests.worldmodel.play.conftest import make_world
from worldmodel.config import RolloutConfig
from worldmodel.models.dynamics import UNKNOWN_ACTION
from worldmodel.play.pool import DreamPool, StepRequest
from worldmodel.rollout.sampling import rollout_frames

PROMPT_TOKENS = np.random.default_rng(1).integers(0, 16, (2, 4)).astype(np.int32)
ACTIONS = np.random.default_rng(2).integers(0, 3, 40)


def begin(pool: DreamPool, slot: int, first_action: int = 1) -> None:
    pool.rebuild(slot, PROMPT_TOKENS, [UNKNOWN_ACTION, first_action], 0)


def request(slot: int, frame: int, *, base: int = 0, temperature: float = 0.0, steps: int = 2) -> StepRequest:
    return StepRequest(slot, int(ACTIONS[frame]), frame, frame - base, 7 + slot, temperature, steps)


def test_a_dream_beyond_the_window_equals_the_rollout_without_a_cache(pool):
    begin(pool, 0)
    got = [pool.step([request(0, 2 + i)])[0].tokens_N for i in range(7)]  # the window has 4 frames
    actions_BA = np.concatenate([[1], ACTIONS[2:9]])[None]
    config = RolloutConfig(prompt_frames=2, horizon=7, decode_steps=2, use_cache=False)
    model = pool.world.dynamics
    wanted = jax.jit(lambda prompt, actions: rollout_frames(model, prompt, actions, config, jax.random.key(0)))(
        PROMPT_TOKENS[None], actions_BA
    )
    np.testing.assert_array_equal(np.stack(got), wanted[0])
    assert len({tuple(tokens) for tokens in got}) > 2  # a dream that stands still would prove nothing


def test_players_do_not_see_each_other(pool):
    settings = [(0.0, 1), (1.3, 4), (0.7, 2)]
    alone = []
    for slot, (temperature, steps) in enumerate(settings):
        begin(pool, slot)
        alone.append(
            [pool.step([request(slot, 2 + i, temperature=temperature, steps=steps)])[0] for i in range(6)]
        )
    for slot in range(3):
        begin(pool, slot)
    for i in range(6):
        wanted = [request(s, 2 + i, temperature=t, steps=n) for s, (t, n) in enumerate(settings)]
        order = (2, 0, 1)
        for slot, result in zip(order, pool.step([wanted[s] for s in order]), strict=True):
            np.testing.assert_array_equal(result.tokens_N, alone[slot][i].tokens_N)
            np.testing.assert_array_equal(result.frame_HWC, alone[slot][i].frame_HWC)
            np.testing.assert_allclose(result.entropy_N, alone[slot][i].entropy_N, atol=1e-4)
    assert any((a.tokens_N != b.tokens_N).any() for a, b in zip(alone[1], alone[2], strict=True))


def test_more_requests_than_the_largest_compiled_batch_are_split():
    pool = DreamPool(make_world(), 2)  # nothing compiled: size 1 is made when it is needed
    for slot in range(2):
        begin(pool, slot)
    together = pool.step([request(0, 2), request(1, 2)])
    assert len(together) == 2
    np.testing.assert_array_equal(together[0].tokens_N, together[1].tokens_N)  # same past, same action, no noise


def test_the_last_frames_bring_back_the_whole_memory(pool):
    begin(pool, 0)
    tape = [*PROMPT_TOKENS]
    for frame in range(2, 20):
        tape.append(pool.step([request(0, frame)])[0].tokens_N)
    wanted = [pool.step([request(0, frame)])[0] for frame in range(20, 26)]
    count = pool.replay_frames
    assert count == 6  # 2 layers, a window of 4
    for base in (0, 20 - count):  # where it was, and with the clock set back
        pool.rebuild(1, np.stack(tape[20 - count :]), ACTIONS[20 - count : 20].tolist(), 20 - count - base)
        got = [pool.step([StepRequest(1, int(ACTIONS[f]), f, f - base, 7, 0.0, 2)])[0] for f in range(20, 26)]
        for mine, theirs in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(mine.tokens_N, theirs.tokens_N)
            np.testing.assert_allclose(mine.entropy_N, theirs.entropy_N, atol=1e-3)
    pool.rebuild(1, np.stack(tape[21 - count :]), ACTIONS[21 - count : 20].tolist(), 0)  # one frame too few
    short = [pool.step([StepRequest(1, int(ACTIONS[f]), f, f, 7, 0.0, 2)])[0] for f in range(20, 21)]
    assert np.abs(short[0].entropy_N - wanted[0].entropy_N).max() > 1e-3


def test_a_pool_without_places_is_refused():
    with pytest.raises(ConfigError, match="0 players"):
        DreamPool(make_world(), 0)
