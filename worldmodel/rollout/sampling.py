"""Rollouts of every kind of dynamics: a sampler of one frame, and the exact memory of the frames before it.

Legend: B batch · T time · N tokens of a frame · P prompt frames · F future frames · A transitions · D width · X a
frame's axes: N for tokens, N L for latents.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.errors import ConfigError
from worldmodel.config import RolloutConfig
from worldmodel.models.blocks import Memory
from worldmodel.models.diffusion import DiffusionDynamics
from worldmodel.models.dynamics import Dynamics
from worldmodel.models.token_dynamics import CausalDynamics, MaskGitDynamics
from worldmodel.rollout.causal import sample_frame_in_order
from worldmodel.rollout.denoising import denoise_frame, step_exponent
from worldmodel.rollout.maskgit import sample_frame


def cached_next_frame(
    model: Dynamics, memory: Memory, action_BD: Array, time: Array, config: RolloutConfig, key: Array
) -> tuple[Array, Memory]:
    """Sample frame number `time` and remember it.

    Args:
        model: dynamics of any kind.
        memory: of the frames before.
        action_BD: conditioning of this frame.
        time: int32 scalar.
        config: sampling.
        key: random key of the whole rollout; a frame's noise depends on it and on `time`.

    Returns:
        The frame (B, N) or (B, N, L) and the memory with it.
    """
    shape_BN = (action_BD.shape[0], model.frame.tokens)
    frame_key = jax.random.fold_in(key, time)
    if isinstance(model, MaskGitDynamics):
        frame_BX = sample_frame(
            lambda tokens, masked: model.cached_logits(tokens, masked, action_BD, memory, time)[0],
            shape_BN, config, frame_key,
        )  # fmt: skip
    elif isinstance(model, CausalDynamics):
        frame_BX = sample_frame_in_order(
            lambda tokens: model.cached_logits(tokens, action_BD, memory, time), shape_BN, config, frame_key
        )
    else:
        assert isinstance(model, DiffusionDynamics)
        exponent = step_exponent(model.config.diffusion, config.decode_steps)
        data_BNL = denoise_frame(
            lambda x, level: model.cached_data(x, level, exponent, action_BD, memory, time),
            (*shape_BN, model.latent_dim), model.config.diffusion.levels, config, frame_key,
        )  # fmt: skip
        frame_BX = model.to_latent(data_BNL)
    return frame_BX, model.remember(frame_BX, action_BD, memory, time, key)


def whole_next_frame(
    model: Dynamics, history_BPX: Array, action_BTD: Array, config: RolloutConfig, key: Array
) -> Array:
    """As `cached_next_frame` from all frames before, each recomputed: slow, for tests."""
    shape_BN, time = (action_BTD.shape[0], model.frame.tokens), history_BPX.shape[1]
    frame_key = jax.random.fold_in(key, time)
    if isinstance(model, DiffusionDynamics):
        exponent = step_exponent(model.config.diffusion, config.decode_steps)
        known = jnp.stack([model.as_context(history_BPX[:, t], jnp.int32(t), key) for t in range(time)], axis=1)
        data_BNL = denoise_frame(
            lambda x, level: model.next_frame_data(known, x, level, exponent, action_BTD),
            (*shape_BN, model.latent_dim), model.config.diffusion.levels, config, frame_key,
        )  # fmt: skip
        return model.to_latent(data_BNL)

    def whole(tokens_BN: Array) -> Array:
        return jnp.concatenate([history_BPX, tokens_BN[:, None]], axis=1)

    if isinstance(model, CausalDynamics):
        return sample_frame_in_order(
            lambda tokens: model(whole(tokens), action_BTD)[:, -1], shape_BN, config, frame_key
        )
    assert isinstance(model, MaskGitDynamics)
    return sample_frame(
        lambda tokens, masked: model.next_frame_logits(whole(tokens), masked, action_BTD), shape_BN, config, frame_key
    )


def remember_prompt(model: Dynamics, prompt_BPX: Array, action_BTD: Array, key: Array) -> Memory:
    """Memory of the true prompt frames.

    Args:
        model: dynamics.
        prompt_BPX: tokens or latents.
        action_BTD: conditioning of at least the P prompt frames.
        key: random key of the whole rollout.

    Returns:
        What every layer remembers.
    """

    def remember(memory: Memory, inputs: tuple[Array, Array, Array]) -> tuple[Memory, None]:
        frame_BX, action_BD, time = inputs
        return model.remember(frame_BX, action_BD, memory, time, key), None

    P = prompt_BPX.shape[1]
    inputs = (prompt_BPX.swapaxes(0, 1), action_BTD[:, :P].swapaxes(0, 1), jnp.arange(P))
    memory, _ = jax.lax.scan(remember, model.blocks.empty_memory(prompt_BPX.shape[0]), inputs)
    return memory


def rollout_frames(model: Dynamics, prompt_BPX: Array, actions_BA: Array, config: RolloutConfig, key: Array) -> Array:
    """The frames that follow a prompt.

    Args:
        model: dynamics.
        prompt_BPX: tokens or latents of the true first frames.
        actions_BA: action numbers of the P - 1 + F transitions from frame 0 on (-1 unknown).
        config: sampling; `horizon` is F.
        key: random key; the same key gives the same noise whatever the actions.

    Returns:
        int32 tokens (B, F, N) or float32 latents (B, F, N, L).

    Raises:
        ConfigError: too few actions, an action outside the model's range (checked by `check_actions`), a number of
            steps that a shortcut model was not trained for, or a rollout longer than a learned time table.
    """
    P, F = prompt_BPX.shape[1], config.horizon
    if actions_BA.shape[1] < P - 1 + F:
        raise ConfigError(f"{P} prompt frames and {F} future ones need {P - 1 + F} actions, got {actions_BA.shape[1]}")
    model.blocks.check_length(P + F)
    action_BTD = model.shift_actions(model.embed_action_codes(actions_BA[:, : P - 1 + F]))
    if not config.use_cache:
        history_BTX = prompt_BPX
        for time in range(P, P + F):
            frame_BX = whole_next_frame(model, history_BTX, action_BTD[:, : time + 1], config, key)
            history_BTX = jnp.concatenate([history_BTX, frame_BX[:, None]], axis=1)
        return history_BTX[:, P:]
    memory = remember_prompt(model, prompt_BPX, action_BTD, key)

    def advance(memory: Memory, inputs: tuple[Array, Array]) -> tuple[Memory, Array]:
        action_BD, time = inputs
        frame_BX, memory = cached_next_frame(model, memory, action_BD, time, config, key)
        return memory, frame_BX

    times = jnp.arange(P, P + F)
    _, frames_FBX = jax.lax.scan(advance, memory, (action_BTD[:, P:].swapaxes(0, 1), times))
    return frames_FBX.swapaxes(0, 1)


def check_actions(actions: np.ndarray, num_actions: int, *, where: str) -> None:
    """Raise ConfigError unless all action numbers are -1 (unknown) or a model's action."""
    bad = actions[(actions < -1) | (actions >= num_actions)]
    if bad.size:
        raise ConfigError(f"{where}: action {int(bad[0])} is outside -1..{num_actions - 1}, the range of this model")
