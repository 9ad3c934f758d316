"""The decode schedule, the choice of tokens, and rollouts with and without the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from tests.worldmodel.small import DYNAMICS, FRAME, LAM, NUM_ACTIONS
from worldmodel.config import RolloutConfig
from worldmodel.models.token_dynamics import MaskGitDynamics
from worldmodel.rollout.maskgit import mask_counts, sample_frame
from worldmodel.rollout.sampling import check_actions, rollout_frames

CODES = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)


def dynamics(**changes) -> MaskGitDynamics:
    config = dataclasses.replace(DYNAMICS, **changes)
    model = MaskGitDynamics(config, FRAME, CODES, num_actions=NUM_ACTIONS, lam=LAM, rngs=nnx.Rngs(0))
    model.token_table[...] = jax.random.normal(jax.random.key(9), model.token_table.shape)
    return model


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 60))
def test_every_decode_step_fixes_something_and_the_last_everything(tokens, steps):
    counts = mask_counts(tokens, steps)
    assert len(counts) == min(steps, tokens)
    assert counts[-1] == 0
    assert all(later < earlier for earlier, later in zip((tokens, *counts), counts, strict=False))


def test_the_schedule_follows_the_cosine_where_it_can():
    assert mask_counts(256, 4) == (237, 181, 98, 0)
    assert mask_counts(16, 25) == tuple(range(15, -1, -1))


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_exactly_the_scheduled_tokens_are_fixed_most_confident_first(steps):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 8, 5)) * 3)
    seen = []

    def logits_of(tokens, masked):
        seen.append((np.asarray(tokens), np.asarray(masked)))
        return logits

    final = np.asarray(sample_frame(logits_of, (2, 8), RolloutConfig(decode_steps=steps), jax.random.key(0)))
    np.testing.assert_array_equal(final, logits.argmax(-1))
    masked_numbers = [m.sum(1).tolist() for _, m in seen]
    assert masked_numbers == [[8, 8]] + [[c, c] for c in mask_counts(8, steps)[:-1]]
    confidence = np.asarray(jax.nn.log_softmax(logits, axis=-1).max(-1))
    for _, masked in seen[1:]:
        for b in range(2):
            assert confidence[b][~masked[b]].min() > confidence[b][masked[b]].max()


def test_fixed_tokens_never_change():
    shown = []

    def logits_of(tokens, masked):
        shown.append((np.asarray(tokens), np.asarray(masked)))
        return jax.random.normal(jax.random.key(len(shown)), (1, 8, 5))

    final = np.asarray(sample_frame(logits_of, (1, 8), RolloutConfig(decode_steps=4), jax.random.key(0)))
    for tokens, masked in shown:
        np.testing.assert_array_equal(tokens[~masked], final[~masked])


def test_ties_still_give_exact_counts():
    seen = []

    def logits_of(tokens, masked):
        seen.append(int(np.asarray(masked).sum()))
        return jnp.zeros((1, 8, 5))

    sample_frame(logits_of, (1, 8), RolloutConfig(decode_steps=4), jax.random.key(0))
    assert seen == [8, *mask_counts(8, 4)[:-1]]


def test_temperature_samples_from_the_true_distribution():
    logits = jnp.broadcast_to(jnp.log(jnp.asarray([0.7, 0.2, 0.1])), (2000, 1, 3))
    config = RolloutConfig(decode_steps=1, temperature=1.0)
    drawn = np.asarray(sample_frame(lambda *_: logits, (2000, 1), config, jax.random.key(0)))
    np.testing.assert_allclose(np.bincount(drawn.reshape(-1)) / 2000, [0.7, 0.2, 0.1], atol=0.04)
    again = sample_frame(lambda *_: logits, (2000, 1), config, jax.random.key(0))
    np.testing.assert_array_equal(drawn, again)


@pytest.mark.parametrize("source", ["ground-truth", "latent"])
@pytest.mark.parametrize("conditioning", ["prepend", pytest.param("add", marks=pytest.mark.slow)])
def test_rollouts_with_and_without_cache_are_equal(source, conditioning):
    model = dynamics(action_source=source, action_conditioning=conditioning)
    prompt = jax.random.randint(jax.random.key(0), (2, 2, 4), 0, 16)
    actions = np.asarray(jax.random.randint(jax.random.key(1), (2, 7), 0, NUM_ACTIONS))
    config = RolloutConfig(prompt_frames=2, horizon=6, decode_steps=2, temperature=0.7, choice_temperature=1.0)
    cached = rollout_frames(model, prompt, actions, config, jax.random.key(2))
    assert cached.shape == (2, 6, 4)
    slow = dataclasses.replace(config, use_cache=False)
    np.testing.assert_array_equal(cached, rollout_frames(model, prompt, actions, slow, jax.random.key(2)))


def test_actions_steer_the_rollout_from_their_own_frame_on():
    model = dynamics()
    model.action_table[...] = 10.0 * model.action_table[...]
    prompt = jax.random.randint(jax.random.key(0), (4, 2, 4), 0, 16)
    actions = np.zeros((4, 5), np.int64)
    changed = actions.copy()
    changed[:, 3:] = 1  # taken at frame 3: frame 4 is the first to differ, future frame number 2
    config = RolloutConfig(prompt_frames=2, horizon=4)
    one = rollout_frames(model, prompt, actions, config, jax.random.key(2))
    other = rollout_frames(model, prompt, changed, config, jax.random.key(2))
    np.testing.assert_array_equal(one[:, :2], other[:, :2])
    assert (one[:, 2:] != other[:, 2:]).any()


def test_missing_and_impossible_actions_are_named():
    model = dynamics()
    prompt = jnp.zeros((1, 2, 4), jnp.int32)
    with pytest.raises(ConfigError, match="need 5 actions, got 3"):
        rollout_frames(model, prompt, np.zeros((1, 3), int), RolloutConfig(horizon=4), jax.random.key(0))
    with pytest.raises(ConfigError, match=r"action 3 is outside -1\.\.2"):
        check_actions(np.asarray([[0, 3]]), 3, where="rollout")


def test_learned_time_tables_refuse_longer_rollouts():
    blocks = dataclasses.replace(DYNAMICS.blocks, position="learned", max_frames=4)
    prompt = jnp.zeros((1, 2, 4), jnp.int32)
    with pytest.raises(ConfigError, match="max_frames"):
        rollout_frames(dynamics(blocks=blocks), prompt, np.zeros((1, 6), int), RolloutConfig(horizon=3),
                       jax.random.key(0))  # fmt: skip
