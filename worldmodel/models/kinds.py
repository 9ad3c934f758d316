"""The dynamics model that a configuration names."""

from __future__ import annotations

import numpy as np
from flax import nnx

from worldmodel.config import TrainConfig
from worldmodel.models.diffusion import DiffusionDynamics
from worldmodel.models.dynamics import Dynamics
from worldmodel.models.token_dynamics import CausalDynamics, MaskGitDynamics


def build_dynamics(
    config: TrainConfig, *, num_actions: int, codes_VL: np.ndarray | None = None, rngs: nnx.Rngs
) -> Dynamics:
    """A fresh dynamics model.

    Args:
        config: of stage dynamics.
        num_actions: recorded actions of the data set.
        codes_VL: the tokenizer's code vectors; None where trained values will replace them. Unused with latents.
        rngs: random keys.

    Returns:
        The model of `config.dynamics.kind`.
    """
    lam = config.lam if config.dynamics.action_source != "ground-truth" else None
    frame, quantizer = config.tokenizer.frame, config.tokenizer.quantizer
    if config.dynamics.kind == "diffusion":
        return DiffusionDynamics(
            config.dynamics, frame, quantizer.latent_dim, num_actions=num_actions, lam=lam, rngs=rngs
        )
    if codes_VL is None:
        rows_V = np.arange(quantizer.codes, dtype=np.float32)[:, None]
        codes_VL = np.broadcast_to(rows_V, (quantizer.codes, quantizer.latent_dim))
    kind = MaskGitDynamics if config.dynamics.kind == "maskgit" else CausalDynamics
    return kind(config.dynamics, frame, codes_VL, num_actions=num_actions, lam=lam, rngs=rngs)
