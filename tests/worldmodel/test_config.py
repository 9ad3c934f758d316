"""Configs: JSON and back, unknown keys, impossible combinations, what a resume may change, every preset."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from tests.worldmodel.small import train_config
from worldmodel.coinrun import load_profile
from worldmodel.config import (
    BlockConfig,
    DynamicsConfig,
    EvaluateConfig,
    FrameConfig,
    QuantizerConfig,
    TokenizerConfig,
    TrainConfig,
    from_dict,
    read_json,
    resume_differences,
    to_dict,
)


@pytest.mark.parametrize("name", ["cpu", "gpu", "paper"])
def test_presets_round_trip_and_fit_together(name):
    profile = load_profile(name)
    for stage in (profile.tokenizer, profile.dynamics, profile.dynamics_latent):
        assert from_dict(TrainConfig, to_dict(stage)) == stage
        assert stage.tokenizer == profile.tokenizer.tokenizer
        assert stage.optim.warmup_steps + stage.optim.decay_steps <= stage.steps
    assert profile.dynamics.dynamics.action_source == "ground-truth"
    assert profile.dynamics_latent.dynamics.action_source == "latent"
    assert from_dict(EvaluateConfig, to_dict(profile.evaluate)) == profile.evaluate


@settings(deadline=None)
@given(st.integers(1, 99), st.floats(0, 1, allow_nan=False), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_values_survive_json(steps, rate, horizons):
    config = dataclasses.replace(
        train_config("lam", "x"), steps=steps, optim=dataclasses.replace(train_config("lam", "x").optim, ema=rate)
    )
    assert from_dict(TrainConfig, to_dict(config)) == config
    evaluate = EvaluateConfig(horizons=tuple(horizons))
    assert from_dict(EvaluateConfig, to_dict(evaluate)) == evaluate


@pytest.mark.parametrize(
    "values, message",
    [
        ({"step": 3}, "did you mean 'steps'"),
        ({"optim": {"learning_rat": 1.0}}, r"config\.optim: unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ({"steps": "3"}, "expected int, got '3'"),
        ({"steps": True}, "expected int, got True"),
        ({"stage": "sleep"}, "'sleep' is not one of"),
        ({"optim": 3}, "expected an object for OptimConfig, got int"),
    ],
)
def test_bad_json_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FrameConfig(64, 60, 3, 16), "multiple of patch 16"),
        (lambda: BlockConfig(dim=30, heads=4), "multiple of heads"),
        (lambda: BlockConfig(dim=24, heads=4), "divisible by 4"),
        (lambda: BlockConfig(attention="cudnn"), "bfloat16"),
        (lambda: TokenizerConfig(linear_path=True), "euclidean"),
        (lambda: QuantizerConfig(codes=1), "at least 2"),
        (lambda: DynamicsConfig(mask_low=0.9, mask_high=0.5), "low <= high"),
        (lambda: DynamicsConfig(blocks=BlockConfig(temporal=False)), "temporal attention"),
        (lambda: DynamicsConfig(action_source="latent-frozen") and TrainConfig(
            stage="dynamics", dynamics=DynamicsConfig(action_source="latent-frozen")), "lam_run"),
        (lambda: TrainConfig(stage="lam", seq_len=1), "seq_len >= 2"),
        (lambda: EvaluateConfig(horizons=(99,)), "within rollout.horizon"),
    ],
)  # fmt: skip
def test_impossible_configs_say_why(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_resume_may_change_logging_but_not_arithmetic():
    base = to_dict(train_config("lam", "x"))
    assert resume_differences(base, {**base, "log_every": 9, "run_dir": "y", "eval_clips": 3}) == []
    changed = to_dict(dataclasses.replace(train_config("lam", "x"), batch_size=16))
    assert resume_differences(base, changed) == ["batch_size: saved 8, now 16"]


def test_unreadable_json_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_json(tmp_path / "no.json", what="a config")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_json(tmp_path / "bad.json", what="a config")
