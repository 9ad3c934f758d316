"""The map from latent to recorded actions: fitted on one half, scored on the other."""

import numpy as np
import pytest

from common.errors import ConfigError
from worldmodel.evaluate.action_map import mutual_information_bits, score_action_map

BOOT = {"samples": 200, "seed": 0}


def test_a_permutation_with_noise_is_found_and_scored_on_other_clips():
    rng = np.random.default_rng(0)
    actions = rng.integers(0, 3, (200, 6))
    codes = np.asarray([2, 0, 1])[actions]
    wrong = rng.random((200, 6)) < 0.2
    codes[wrong] = rng.integers(0, 4, wrong.sum())
    result = score_action_map(codes, actions, codes=4, actions=3, **BOOT)
    assert result["map"][:3] == [1, 2, 0]
    truth = (np.asarray(result["map"])[codes[100:]] == actions[100:]).mean()
    assert result["accuracy"]["value"] == pytest.approx(truth)
    assert result["accuracy"]["low"] < truth < result["accuracy"]["high"]
    assert result["most_frequent_action_accuracy"]["value"] < 0.45
    assert result["above_guess"]["low"] > 0.3
    assert 0.6 < result["mutual_information_bits"] < np.log2(3)


def test_codes_that_mean_nothing_do_not_beat_the_guess():
    rng = np.random.default_rng(0)
    actions = np.where(rng.random((300, 6)) < 0.6, 1, 2)
    result = score_action_map(rng.integers(0, 6, (300, 6)), actions, codes=6, actions=3, **BOOT)
    assert abs(result["above_guess"]["value"]) < 0.03
    assert result["mutual_information_bits"] < 0.02


def test_unknown_actions_do_not_count():
    actions = np.asarray([[0, -1], [1, -1], [0, 1], [-1, -1]] * 2)
    codes = np.asarray([[0, 1], [1, 0], [0, 1], [1, 1]] * 2)
    result = score_action_map(codes, actions, codes=2, actions=2, **BOOT)
    assert result["map"] == [0, 1]
    assert result["accuracy"]["value"] == 1.0
    assert result["fitted_on_transitions"] == 4
    with pytest.raises(ConfigError, match="recorded actions"):
        score_action_map(codes, np.full_like(actions, -1), codes=2, actions=2, **BOOT)


def test_mutual_information_of_known_tables():
    assert mutual_information_bits(np.eye(4)) == pytest.approx(2.0)
    assert mutual_information_bits(np.ones((3, 5))) == pytest.approx(0.0, abs=1e-12)
