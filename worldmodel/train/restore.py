"""Trained models back from run folders, for later stages, rollout, evaluation and export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from common.errors import CheckpointError
from worldmodel.config import LamConfig, TokenizerConfig, TrainConfig, from_dict, read_json, to_dict
from worldmodel.models.dynamics import Dynamics
from worldmodel.models.jepa import Jepa
from worldmodel.models.kinds import build_dynamics
from worldmodel.models.lam import LatentActionModel
from worldmodel.models.tokenizer import Tokenizer
from worldmodel.train.checkpoint import Checkpoints
from worldmodel.train.state import Functional, values_of


def load_run_config(run_dir: str | Path) -> TrainConfig:
    """The config of a run folder."""
    return from_dict(
        TrainConfig, read_json(Path(run_dir) / "config.json", what="the config of a run"), where=str(run_dir)
    )


def load_values(run_dir: str | Path, build: Callable[[nnx.Rngs], Any]) -> Any:
    """A model with a run's newest weights (the averaged ones where the run kept an average).

    Args:
        run_dir: run folder.
        build: makes a model of its configuration. Only laid out: nothing random is drawn to be thrown away.
    """
    config = load_run_config(run_dir)
    model = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    params, stats = values_of(model)
    name = "ema" if config.optim.ema > 0 else "params"
    checkpoints = Checkpoints(run_dir, keep=1, read_only=True)
    try:
        values = checkpoints.restore_values({name: params, "stats": stats})
    finally:
        checkpoints.close()
    return Functional(model).merge(jax.tree.map(jax.numpy.asarray, values[name]), values["stats"])


def _require_stage(run_dir: str | Path, stage: str) -> TrainConfig:
    config = load_run_config(run_dir)
    if config.stage != stage:
        raise CheckpointError(f"{run_dir} is a run of stage {config.stage}, expected {stage}")
    return config


def _require_equal(run_dir: str | Path, saved: Any, expected: Any) -> None:
    if expected is not None and saved != expected:
        names = sorted(k for k, v in to_dict(saved).items() if v != to_dict(expected)[k])
        raise CheckpointError(
            f"{run_dir} was trained with another model configuration (fields {', '.join(names)} differ); "
            "point to a run of this configuration or train one"
        )


def load_tokenizer(run_dir: str | Path, expected: TokenizerConfig | None = None) -> Tokenizer:
    """The tokenizer of a run.

    Args:
        run_dir: run folder of stage tokenizer.
        expected: config that it must have been trained with.

    Returns:
        The model with trained weights.

    Raises:
        CheckpointError: another stage or configuration, or no checkpoint.
    """
    config = _require_stage(run_dir, "tokenizer")
    _require_equal(run_dir, config.tokenizer, expected)
    return load_values(run_dir, lambda rngs: Tokenizer(config.tokenizer, rngs=rngs))


def load_lam(run_dir: str | Path, expected: LamConfig | None = None) -> LatentActionModel:
    """The stand-alone action model of a run. See `load_tokenizer`."""
    config = _require_stage(run_dir, "lam")
    _require_equal(run_dir, config.lam, expected)
    return load_values(run_dir, lambda rngs: LatentActionModel(config.lam, rngs=rngs))


def load_jepa(run_dir: str | Path, num_actions: int) -> Jepa:
    """The JEPA world model of a run. See `load_tokenizer`."""
    config = _require_stage(run_dir, "jepa")
    return load_values(run_dir, lambda rngs: Jepa(config.jepa, num_actions=num_actions, rngs=rngs))


def load_dynamics(run_dir: str | Path, num_actions: int) -> tuple[TrainConfig, Dynamics]:
    """The dynamics model of a run and its config.

    Args:
        run_dir: run folder of stage dynamics.
        num_actions: of the data set (recorded actions).

    Returns:
        Config and model with trained weights.

    Raises:
        CheckpointError: another stage, another number of actions, or no checkpoint.
    """
    config = _require_stage(run_dir, "dynamics")
    return config, load_values(run_dir, lambda rngs: build_dynamics(config, num_actions=num_actions, rngs=rngs))
