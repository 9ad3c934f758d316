"""The Fréchet distance against its formula, and what the random features tell apart."""

import numpy as np
import pytest

from worldmodel.evaluate.frechet import FEATURES, clip_features, frechet_distance, frechet_entries


def test_the_distance_of_normal_distributions_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(60_000, 3)) * [1.0, 2.0, 0.5] + [0.0, 1.0, 0.0]
    b = rng.normal(size=(60_000, 3)) * [3.0, 2.0, 0.5] + [2.0, 1.0, -1.0]
    # Both covariances are diagonal: the squared difference of spreads, and of means.
    expected = (3.0 - 1.0) ** 2 + 2.0**2 + 1.0**2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b), rel=1e-9)


def clips(count: int, seed: int) -> np.ndarray:
    """A bright square that moves to the right, from anywhere."""
    rng = np.random.default_rng(seed)
    frames = np.zeros((count, 8, 32, 32, 3), np.float32)
    for row, (y, x) in enumerate(rng.integers(0, 24, (count, 2))):
        for t in range(8):
            frames[row, t, y : y + 8, (x + 2 * t) % 32 :][:, :8] = 0.9
    return frames


def test_features_see_content_and_motion_and_are_those_of_every_machine():
    real = clips(4, 0)
    features = np.asarray(clip_features(real))
    assert features.shape == (4, FEATURES)
    still = np.repeat(real[:, :1], 8, axis=1)
    backwards = real[:, ::-1]
    scale = features.std(axis=0).mean()
    for other in (still, backwards, 1.0 - real):
        assert np.abs(np.asarray(clip_features(other)) - features).max() > 0.05 * scale
    grey = np.asarray(clip_features(np.full((1, 4, 16, 16, 3), 0.75, np.float32)))[0]
    np.testing.assert_allclose(grey[:3], GREY, rtol=1e-3)


GREY = [0.0017181, -0.0093615, 0.1571633]


def test_what_is_drawn_alike_lies_at_the_floor_and_what_is_not_above_it():
    rng = np.random.default_rng(1)
    real = rng.normal(size=(160, 6))
    others = {"same": rng.normal(size=(160, 6)), "moved": rng.normal(size=(160, 6)) + 1.0}
    entries = frechet_entries(real, others, samples=60, seed=0)
    assert entries is not None
    assert entries["clips_each"] == 80
    assert entries["floor"]["value"] > 0
    same, moved = entries["same_above_floor"], entries["moved_above_floor"]
    assert same["low"] < 0 < same["high"]
    assert moved["low"] > 1
    assert moved["value"] == pytest.approx(entries["moved"]["value"] - entries["floor"]["value"])
    for name in ("floor", "same", "moved"):
        assert entries[name]["low"] < entries[name]["value"] < entries[name]["high"]
    assert entries == frechet_entries(real, others, samples=60, seed=0)
    assert frechet_entries(real[:7], {"same": real[:7]}, samples=5, seed=0) is None
