"""The flow on Gaussian data, where the posterior denoiser and the flow map are known exactly."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.errors import ConfigError
from worldmodel.config import DiffusionConfig, RolloutConfig
from worldmodel.models.flow import data_of, draw_steps, mix, ramp, schedule, shortcut_target, velocity_of
from worldmodel.rollout.denoising import denoise_frame, step_exponent

LEVELS = 64
MEAN, SPREAD = 1.5, 0.4


def posterior_mean(x, level):
    """E[data | x] for data ~ N(MEAN, SPREAD^2)."""
    gain = level * SPREAD**2 / (level**2 * SPREAD**2 + (1 - level) ** 2)
    return MEAN + gain * (x - level * MEAN)


def flow_map(x, level, next_level):
    """Where the exact flow carries x: places keep their number of standard deviations from the mean."""

    def spread(tau):
        return jnp.sqrt(tau**2 * SPREAD**2 + (1 - tau) ** 2)

    return next_level * MEAN + (x - level * MEAN) * spread(next_level) / spread(level)


def sample(steps: int, temperature: float = 1.0, count: int = 4000):
    config = RolloutConfig(decode_steps=steps, temperature=temperature)
    return np.asarray(
        denoise_frame(lambda x, number: posterior_mean(x, number / LEVELS), (count,), LEVELS, config, jax.random.key(0))
    )


def test_the_sampler_follows_the_exact_flow_and_errs_as_euler_does():
    noise = jax.random.normal(jax.random.key(0), (4000,))
    exact = np.asarray(flow_map(noise, 0.0, 1.0))
    errors = [np.abs(sample(steps) - exact).max() for steps in (8, 16, 32, 64)]
    assert errors[-1] < 0.06
    for coarse, fine in itertools.pairwise(errors):
        assert 1.5 < coarse / fine < 2.8  # first order: half the step, half the error
    drawn = sample(64)
    assert drawn.mean() == pytest.approx(MEAN, abs=0.03)
    assert drawn.std() == pytest.approx(SPREAD, rel=0.05)


def test_writing_predictions_back_without_noise_collapses():
    """The published sampler's fault, as a control: its samples lose their spread and miss the mean."""
    x = jax.random.normal(jax.random.key(0), (4000,))
    for number in schedule(LEVELS, 64)[:-1]:
        x = posterior_mean(x, number / LEVELS)
    assert float(x.std()) < 0.01 * SPREAD
    assert abs(float(x.mean()) - MEAN) > 1.0


def test_temperature_zero_ends_at_the_centre():
    np.testing.assert_allclose(sample(64, temperature=0.0, count=3), MEAN, atol=1e-5)


def test_data_and_velocity_say_the_same():
    data, noise = jnp.asarray([2.0, -1.0]), jnp.asarray([0.5, 0.3])
    x = mix(data, noise, 0.25)
    np.testing.assert_allclose(velocity_of(x, data, 0.25), data - noise, rtol=1e-6)
    np.testing.assert_allclose(data_of(x, data - noise, 0.25), data, rtol=1e-6)
    assert ramp(jnp.asarray(0.0)) == pytest.approx(0.1)
    assert ramp(jnp.asarray(1.0)) == pytest.approx(1.0)


@pytest.mark.parametrize("steps", [1, 3, 25, 64, 99])
def test_schedules_use_trained_levels_only_and_end_at_data(steps):
    numbers = schedule(LEVELS, steps)
    assert (numbers[0], numbers[-1], len(numbers)) == (0, LEVELS, min(steps, LEVELS) + 1)
    assert all(a < b for a, b in itertools.pairwise(numbers))


def test_exact_half_steps_give_the_exact_whole_step():
    """The target of a shortcut model is what its own perfect answer would be."""

    def perfect(x, level, step):
        return data_of(x, (flow_map(x, level, level + step) - x) / step, level)

    x = jnp.linspace(-2.0, 3.0, 7)
    for level, step in ((0.0, 1.0), (0.25, 0.25), (0.5, 0.5), (62 / 64, 2 / 64)):
        got = shortcut_target(perfect, x, jnp.asarray(level), jnp.asarray(step))
        np.testing.assert_allclose(got, perfect(x, level, step), atol=1e-4)


def test_drawn_steps_fit_between_noise_and_data():
    exponent, number = (np.asarray(y) for y in draw_steps(jax.random.key(0), (5000,), LEVELS))
    assert set(exponent) == set(range(1, 7))
    assert (number % 2**exponent == 0).all()
    assert (number + 2**exponent <= LEVELS).all()
    assert set(number[exponent == 5]) == {0, 32}


def test_a_shortcut_model_is_told_its_step_and_takes_no_other():
    shortcut = DiffusionConfig(shortcut=True)
    assert [step_exponent(shortcut, steps) for steps in (1, 2, 4, 64, 100)] == [6, 5, 4, 0, 0]
    assert step_exponent(DiffusionConfig(), 3) == 0
    with pytest.raises(ConfigError, match="power of two"):
        step_exponent(shortcut, 3)
