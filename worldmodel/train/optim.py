"""Learning-rate schedules and optimizers, from config."""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from common.errors import ConfigError
from worldmodel.config import OptimConfig
from worldmodel.train.state import is_block_matrix, is_matrix


def make_schedule(config: OptimConfig, peak: float, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warmup, then flat and linear decay (wsd) or half a cosine, ending at 0.

    Args:
        config: schedule name and lengths.
        peak: largest rate.
        steps: length of the run.

    Returns:
        Function of the step number.

    Raises:
        ConfigError: warmup and decay are longer than the run.
    """
    if config.schedule == "cosine":
        if config.warmup_steps >= steps:
            raise ConfigError(f"warmup_steps {config.warmup_steps} must be below steps {steps}")
        return optax.warmup_cosine_decay_schedule(0.0, peak, config.warmup_steps, steps, 0.0)
    stable = steps - config.warmup_steps - config.decay_steps
    if stable < 0:
        raise ConfigError(f"warmup_steps {config.warmup_steps} + decay_steps {config.decay_steps} exceed steps {steps}")
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, max(config.warmup_steps, 1)),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, max(config.decay_steps, 1)),
        ],
        [config.warmup_steps, config.warmup_steps + stable],
    )


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Gradient clipping, then AdamW, or Muon for block matrices with AdamW for the rest.

    Args:
        config: rates, momenta, decay.
        steps: length of the run.

    Returns:
        An optax transformation over a tree of parameters; its state covers those parameters only.
    """

    def decay_mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(is_matrix, params)

    schedule = make_schedule(config, config.learning_rate, steps)
    if config.optimizer == "adamw":
        core = optax.adamw(schedule, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=decay_mask)
    else:

        def muon_dims(params: Any) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, x: MuonDimensionNumbers() if is_block_matrix(path, x) else None, params
            )

        core = muon(
            make_schedule(config, config.muon_learning_rate, steps),
            beta=0.95,
            weight_decay=config.weight_decay,
            weight_decay_mask=decay_mask,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_learning_rate=schedule,
            muon_weight_dimension_numbers=muon_dims,
        )
    clip = [optax.clip_by_global_norm(config.gradient_clip)] if config.gradient_clip > 0 else []
    return optax.chain(*clip, core)
