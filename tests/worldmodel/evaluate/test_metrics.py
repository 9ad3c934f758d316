"""Metrics against their formulas, intervals against known distributions."""

import jax.numpy as jnp
import numpy as np

from worldmodel.evaluate.metrics import (
    bootstrap_interval,
    mean_entry,
    psnr_db,
    psnr_difference_entry,
    psnr_entry,
    ssim,
)


def test_psnr_of_known_errors():
    np.testing.assert_allclose(psnr_db(jnp.asarray([1.0, 0.01, 0.0])), [0.0, 20.0, 100.0], atol=1e-4)


def reference_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """One window at a time, straight from the definition."""
    offset = np.arange(11) - 5
    w = np.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * 1.5**2))
    w /= w.sum()
    values = []
    for c in range(a.shape[2]):
        for y in range(a.shape[0] - 10):
            for x in range(a.shape[1] - 10):
                p, q = a[y : y + 11, x : x + 11, c], b[y : y + 11, x : x + 11, c]
                mp, mq = (w * p).sum(), (w * q).sum()
                vp, vq, pq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 1e-4) * (2 * pq + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
    return float(np.mean(values))


def test_ssim_equals_its_definition():
    rng = np.random.default_rng(0)
    a = rng.random((14, 13, 3))
    b = np.clip(a + 0.2 * rng.normal(size=a.shape), 0, 1)
    np.testing.assert_allclose(ssim(jnp.asarray(a), jnp.asarray(b)), reference_ssim(a, b), atol=1e-4)
    np.testing.assert_allclose(ssim(jnp.asarray(a[None]), jnp.asarray(a[None])), [1.0], atol=1e-5)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        entry = mean_entry(rng.normal(3.0, 2.0, 80), samples=300, seed=trial)
        hits += entry["low"] <= 3.0 <= entry["high"]
    assert 178 <= hits <= 199


def test_a_difference_on_the_same_clips_is_sharper_than_two_intervals():
    rng = np.random.default_rng(2)
    hard = rng.lognormal(-3, 1.0, 400)
    better, worse = hard * 0.8, hard
    entry = psnr_difference_entry(better, worse, samples=500, seed=0)
    np.testing.assert_allclose(entry["value"], -10 * np.log10(0.8), atol=1e-9)
    assert entry["high"] - entry["low"] < 1e-6
    alone = psnr_entry(better, samples=500, seed=0)
    assert alone["high"] - alone["low"] > 0.3
    np.testing.assert_allclose(alone["value"], -10 * np.log10(better.mean()))


def test_intervals_are_reproducible():
    statistic = lambda index: np.arange(50.0)[index].mean(1)  # noqa: E731
    assert bootstrap_interval(statistic, 50, samples=100, seed=3) == bootstrap_interval(
        statistic, 50, samples=100, seed=3
    )
