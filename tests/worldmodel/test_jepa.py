"""The JEPA world model: causality, imagination, and what training makes of a game whose state is known."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from common.errors import ConfigError
from tests.worldmodel.small import BLOCKS, FRAME, NUM_ACTIONS, OPTIM, MemorySource, game_clips, train_config
from worldmodel.config import EvaluateConfig, JepaConfig, RolloutConfig
from worldmodel.evaluate import suite
from worldmodel.evaluate.jepa import evaluate_jepa, linear_probe, surprise_entries, violated
from worldmodel.models.jepa import Jepa
from worldmodel.train.loop import train
from worldmodel.train.restore import load_jepa

JEPA = JepaConfig(
    frame=FRAME, encoder=dataclasses.replace(BLOCKS, layers=1, temporal=False),
    predictor=dataclasses.replace(BLOCKS, layers=1), embedding_dim=8, projections=64,
)  # fmt: skip


def place_of(frames_STHWC: np.ndarray) -> np.ndarray:
    """Column of the bright square, one-hot: the true state of `game_clips`."""
    column_ST = frames_STHWC[:, :, 6, :, 0].argmax(axis=-1) // 4
    return np.eye(4)[column_ST]


def test_predictions_see_the_past_and_imagination_feeds_them_back():
    model = Jepa(JEPA, num_actions=NUM_ACTIONS, rngs=nnx.Rngs(0))
    embedding = jax.random.normal(jax.random.key(0), (2, 6, 8))
    actions = jnp.asarray([[0, 1, 2, 0, 1, 2], [1, 1, 1, -1, 0, 0]])
    predict = jax.jit(model.predict)
    base = predict(embedding, actions)
    np.testing.assert_array_equal(base[:, :3], predict(embedding.at[:, 3:].set(0.0), actions)[:, :3])
    np.testing.assert_array_equal(base[:, :3], predict(embedding, actions.at[:, 3].set(2))[:, :3])
    assert jnp.abs(base[:, 3] - predict(embedding, actions.at[:, 3].set(2))[:, 3]).max() > 1e-4
    imagined = jax.jit(model.imagine)(embedding[:, :2], actions[:, :4])  # frames 2, 3 and 4
    whole = embedding[:, :2]
    for t in range(2, 5):
        padded = jnp.pad(whole, ((0, 0), (0, 6 - t), (0, 0)))
        whole = jnp.concatenate([whole, predict(padded, actions)[:, t - 1 : t]], axis=1)
    np.testing.assert_allclose(imagined, whole[:, 2:], atol=1e-5)


def test_probes_find_what_is_there_on_rows_that_they_have_not_seen():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5))
    errors, deviations = linear_probe(x, x[:, :2] @ rng.normal(size=(2, 3)) + 4.0)
    assert errors.shape == (200, 3)
    assert errors.sum() / deviations.sum() < 1e-4
    errors, deviations = linear_probe(x, rng.normal(size=(400, 1)))
    assert errors.sum() / deviations.sum() > 0.9


def test_violations_and_surprise_are_what_they_say():
    frames = game_clips(3, 5, seed=1)["frames_BTHWC"]
    teleport, repeat = violated(frames, 2, "teleport"), violated(frames, 2, "repeat")
    np.testing.assert_array_equal(teleport[1, 2:], frames[0, 2:])
    np.testing.assert_array_equal(teleport[:, :2], frames[:, :2])
    np.testing.assert_array_equal(repeat[:, 2], frames[:, 1])
    np.testing.assert_array_equal(repeat[:, 3:], frames[:, 3:])
    changed = np.asarray([True, True, False])
    entry = surprise_entries(np.full((3, 2), 1.0), np.asarray([[2.0, 2], [0.5, 0.5], [9, 9]]), changed,
                             samples=20, seed=0)  # fmt: skip
    assert entry["clips"] == 2
    assert entry["more_surprising"]["value"] == 0.5
    assert entry["surprise_ratio"] == pytest.approx(1.25)
    nothing = surprise_entries(np.ones((3, 2)), np.ones((3, 2)), ~np.ones(3, bool), samples=20, seed=0)
    assert nothing["more_surprising"] is None


class StateSet:
    """Stands in for a data set whose clips tell the true state."""

    content_sha256 = "0" * 64

    def require_windows(self, seq_len: int) -> int:
        return 96

    def fixed_windows(self, count: int, seq_len: int, seed: int = 0):
        clips = game_clips(count, seq_len, seed=5)
        return {**clips, "state_BTK": place_of(clips["frames_BTHWC"])}


EVALUATE = EvaluateConfig(clips=96, batch_size=40, horizons=(1, 2), delta_horizon=1, bootstrap_samples=20,
                          rollout=RolloutConfig(prompt_frames=2, horizon=2))  # fmt: skip


def test_an_evaluation_measures_what_it_says(monkeypatch):
    monkeypatch.setattr(suite, "open_dataset", lambda *_: StateSet())
    model = Jepa(JEPA, num_actions=NUM_ACTIONS, rngs=nnx.Rngs(0))
    document = evaluate_jepa(model, "data", EVALUATE)
    json.dumps(document)
    clips = game_clips(96, 4, seed=5)
    output = jax.jit(model)(clips["frames_BTHWC"], clips["actions_BT"][:, :-1])
    embedding = np.asarray(output.embedding_BTL)
    error = ((np.asarray(output.predicted_BAL)[:, 1] - embedding[:, 2]) ** 2).mean()
    variance = embedding.reshape(-1, 8).var(axis=0).mean()
    assert document["embedding_variance"] == pytest.approx(variance, rel=1e-4)
    assert document["horizons"]["1"]["predicted_error_share"]["value"] == pytest.approx(error / variance, rel=1e-3)
    still = (clips["frames_BTHWC"][:, 2] == clips["frames_BTHWC"][:, 1]).all(axis=(1, 2, 3)).sum()
    assert document["surprise"]["repeat"]["clips"] == 96 - still
    assert document["probes"]["state_r2"] > 0.9  # four pictures: any embedding that tells them apart will do


@pytest.mark.slow
def test_training_gives_embeddings_that_hold_the_state_and_are_surprised_by_broken_physics(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "open_dataset", lambda *_: StateSet())
    optim = dataclasses.replace(OPTIM, warmup_steps=10, decay_steps=50, learning_rate=5e-3)
    config = train_config("jepa", str(tmp_path / "run"), jepa=JEPA, optim=optim, steps=250, batch_size=64,
                          eval_every=250, checkpoint_every=250, log_every=250)  # fmt: skip
    metrics = train(config, source=MemorySource(config))["metrics"]
    assert metrics["val_embedding_variance"] > 0.1  # no collapse
    assert metrics["val_prediction_error_share"] < 0.5 * metrics["val_copy_error_share"]
    document = evaluate_jepa(load_jepa(config.run_dir, NUM_ACTIONS), "data", EVALUATE)
    json.dumps(document)
    assert document["probes"]["state_r2"] > 0.8
    assert document["surprise"]["teleport"]["more_surprising"]["value"] > 0.8
    assert document["surprise"]["repeat"]["more_surprising"]["value"] > 0.8
    two = document["horizons"]["2"]
    assert two["predicted_error_share"]["value"] < two["copy_last_error_share"]["value"]


def test_a_jepa_that_would_collapse_is_refused():
    with pytest.raises(ConfigError, match="collapse"):
        JepaConfig(sigreg_weight=0.0)
