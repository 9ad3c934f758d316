"""Diffusion dynamics: continuous latents of the next frame from noise, by diffusion forcing or shortcut forcing.

Legend: B batch · T time · N tokens of a frame · L latent size · D width. A level is a number l in 0..levels and stands
for tau = l / levels; a step size is an exponent e and stands for 2^e / levels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from worldmodel.config import DynamicsConfig, FrameConfig, LamConfig
from worldmodel.models.blocks import Memory
from worldmodel.models.dynamics import Dynamics, Scalars
from worldmodel.models.flow import data_of, draw_levels, draw_steps, mix, ramp, shortcut_target, velocity_of
from worldmodel.models.layers import Stats

CONTEXT_NOISE = 0x5EED  # keeps the noise of remembered frames apart from that of sampling


class DiffusionDynamics(Dynamics):
    """Every frame has a noise level of its own; a network that sees noisier and cleaner frames before it denoises it.

    Source: Chen et al., "Diffusion Forcing" (2024), on the straight path of flow matching with the ramp weight and the
    slightly corrupted context of Hafner et al., Dreamer 4 (2025). Ours tells the network the true level of the
    corrupted context, and can train on exactly that context (`DiffusionConfig.history = context`).
    """

    def __init__(
        self,
        config: DynamicsConfig,
        frame: FrameConfig,
        latent_dim: int,
        *,
        num_actions: int,
        lam: LamConfig | None,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(config, frame, num_actions=num_actions, lam=lam, rngs=rngs)
        dim, levels = config.blocks.dim, config.diffusion.levels
        self.latent_dim = latent_dim
        self.latent_in = nnx.Linear(latent_dim, dim, rngs=rngs)
        self.level_table = nnx.Param(0.1 * jax.random.normal(rngs.params(), (levels + 1, dim)))
        if config.diffusion.shortcut:
            sizes = int(np.log2(levels)) + 1
            self.step_table = nnx.Param(0.1 * jax.random.normal(rngs.params(), (sizes, dim)))
        zeros = nnx.initializers.zeros_init()
        self.latent_out = nnx.Linear(dim, latent_dim, kernel_init=zeros, rngs=rngs)
        self.mean_L = Stats(jnp.zeros((latent_dim,), jnp.float32))
        self.spread = Stats(jnp.ones((), jnp.float32))

    @property
    def context(self) -> int:
        """Level of frames in the memory."""
        diffusion = self.config.diffusion
        return round(diffusion.levels * (1.0 - diffusion.context_noise))

    def initialize(self, frames_BTX: np.ndarray) -> None:
        """Mean and spread of real latents: noise and data then have one scale."""
        flat_SL = np.asarray(frames_BTX, np.float64).reshape(-1, frames_BTX.shape[-1])
        self.mean_L[...] = jnp.asarray(flat_SL.mean(axis=0), jnp.float32)
        self.spread[...] = jnp.asarray(max(float((flat_SL - flat_SL.mean(axis=0)).std()), 1e-6), jnp.float32)

    def normalize(self, latent_XL: Array) -> Array:
        """Latents of the tokenizer on the scale of the noise."""
        return (latent_XL.astype(jnp.float32) - self.mean_L[...]) / self.spread[...]

    def to_latent(self, data_XL: Array) -> Array:
        """Inverse of `normalize`, within the range of the tokenizer's tanh."""
        return jnp.clip(data_XL * self.spread[...] + self.mean_L[...], -1.0, 1.0)

    def embed(self, x_BTNL: Array, level_BT: Array, exponent_BT: Array, action_BTD: Array) -> Array:
        """Noised latents, their level and step size, and the action: transformer input (B, T, prefix + N, D)."""
        level_BTD = self.level_table[...][level_BT]
        if self.config.diffusion.shortcut:
            level_BTD = level_BTD + self.step_table[...][exponent_BT]
        return self.with_action(self.latent_in(x_BTNL), action_BTD) + level_BTD[:, :, None]

    def read(self, hidden_BTND: Array, x_BTNL: Array, level_BT: Array) -> tuple[Array, Array]:
        """What the network says, and the data that it stands for: each float32 (B, T, N, L)."""
        said_BTNL = self.latent_out(hidden_BTND[:, :, hidden_BTND.shape[2] - self.frame.tokens :].astype(jnp.float32))
        if self.config.diffusion.prediction == "x":
            return said_BTNL, said_BTNL
        return said_BTNL, data_of(x_BTNL, said_BTNL, self.tau(level_BT))

    def tau(self, level_BT: Array) -> Array:
        """Level numbers to levels in 0..1, to be broadcast over a frame."""
        return (level_BT / self.config.diffusion.levels)[..., None, None]

    def __call__(
        self,
        x_BTNL: Array,
        level_BT: Array,
        exponent_BT: Array,
        action_BTD: Array,
        context_BTNL: Array | None = None,
        *,
        key: Array | None = None,
    ) -> tuple[Array, Array]:
        """Denoise every frame.

        Args:
            x_BTNL: noised, normalized latents.
            level_BT: their level numbers.
            exponent_BT: step sizes asked for; 0 is the finest. Without a shortcut model it changes nothing.
            action_BTD: conditioning.
            context_BTNL: the same frames as the memory holds them: frame t then sees these before it, and only itself
                at its own level. None: frame t sees the noised frames before it (diffusion forcing).
            key: dropout key; None evaluates.

        Returns:
            What the network says (data or velocity), and the data that it stands for.
        """
        x_BTND = self.embed(x_BTNL, level_BT, exponent_BT, action_BTD)
        if context_BTNL is None:
            return self.read(self.blocks(x_BTND, key=key), x_BTNL, level_BT)
        known = self.embed(context_BTNL, jnp.full_like(level_BT, self.context), jnp.zeros_like(level_BT), action_BTD)
        return self.read(self.blocks.two_stream(known, x_BTND, key=key), x_BTNL, level_BT)

    def loss(self, frames_BTX: Array, action_BTD: Array, key: Array) -> tuple[Array, Scalars]:
        """See `Dynamics.loss`: squared error of what the network predicts, under the ramp weight.

        With a shortcut model the first clips of the batch learn large steps from two half ones; their error, too, is
        that of the data, which is the velocity's times (1 - tau), as in Dreamer 4.
        """
        diffusion = self.config.diffusion
        noise_key, level_key, step_key, context_key, drop_key = jax.random.split(key, 5)
        data_BTNL = self.normalize(frames_BTX)
        B, T = data_BTNL.shape[:2]
        level_BT, exponent_BT = draw_levels(level_key, (B, T), diffusion.levels), jnp.zeros((B, T), jnp.int32)
        large = max(1, round(B * diffusion.shortcut_share)) if diffusion.shortcut else 0
        if large:
            exponents, starts = draw_steps(step_key, (large, T), diffusion.levels)
            exponent_BT, level_BT = exponent_BT.at[:large].set(exponents), level_BT.at[:large].set(starts)
        x_BTNL = mix(data_BTNL, jax.random.normal(noise_key, data_BTNL.shape), self.tau(level_BT))
        context = None
        if diffusion.history == "context":
            context = mix(data_BTNL, jax.random.normal(context_key, data_BTNL.shape), self.context / diffusion.levels)
        target_BTNL = data_BTNL
        if large:
            part = None if context is None else context[:large]

            def predict(x: Array, level: Array, step: Array) -> Array:
                numbers = jnp.round(level[..., 0, 0] * diffusion.levels).astype(jnp.int32)
                exponent = jnp.round(jnp.log2(step[..., 0, 0] * diffusion.levels)).astype(jnp.int32)
                return jax.lax.stop_gradient(self(x, numbers, exponent, action_BTD[:large], part)[1])

            size = (2.0 ** exponent_BT[:large] / diffusion.levels)[..., None, None]
            jumped = shortcut_target(predict, x_BTNL[:large], self.tau(level_BT[:large]), size)
            target_BTNL = target_BTNL.at[:large].set(jumped)
        said_BTNL, _ = self(x_BTNL, level_BT, exponent_BT, action_BTD, context, key=drop_key)
        if diffusion.prediction == "v":
            target_BTNL = velocity_of(x_BTNL, target_BTNL, self.tau(level_BT))
        error_BT = jnp.mean((said_BTNL - target_BTNL) ** 2, axis=(2, 3))
        # Frame 0 is the prompt: nothing will ever be asked about it.
        weighted_BA = (ramp(level_BT / diffusion.levels) * error_BT)[:, 1:]
        scalars = {"flow_loss": jnp.mean(weighted_BA[large:])}
        if large:
            scalars["shortcut_loss"] = jnp.mean(weighted_BA[:large])
        return jnp.mean(weighted_BA), scalars

    def report(self, frames_BTX: Array, action_BTD: Array) -> Scalars:
        """See `Dynamics.report`: error, in data variances, of the data predicted from noise alone and half noise."""
        data_BTNL = self.normalize(frames_BTX)
        levels = self.config.diffusion.levels
        known_key, noise_key = jax.random.split(jax.random.key(0))
        context = mix(data_BTNL, jax.random.normal(known_key, data_BTNL.shape), self.context / levels)
        noise_BTNL = jax.random.normal(noise_key, data_BTNL.shape)
        scalars: Scalars = {}
        for name, level in (("from_noise_mse", 0), ("from_half_mse", levels // 2)):
            numbers_BT = jnp.full(data_BTNL.shape[:2], level)
            x_BTNL = mix(data_BTNL, noise_BTNL, level / levels)
            got = self(x_BTNL, numbers_BT, jnp.zeros_like(numbers_BT), action_BTD, context)[1]
            scalars[name] = jnp.mean((got - data_BTNL)[:, 1:] ** 2)
        return scalars

    # ------------------------------------------------------------------------------------------------------- sampling

    def as_context(self, frame_BNL: Array, time: Array, key: Array) -> Array:
        """A finished frame as it is remembered: normalized, with a little noise that its number and the key decide."""
        noise = jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, CONTEXT_NOISE), time), frame_BNL.shape)
        return mix(self.normalize(frame_BNL), noise, self.context / self.config.diffusion.levels)

    def remember(self, frame_BX: Array, action_BD: Array, memory: Memory, time: Array, key: Array) -> Memory:
        """See `Dynamics.remember`."""
        known_B1NL = self.as_context(frame_BX, time, key)[:, None]
        level_B1 = jnp.full(known_B1NL.shape[:2], self.context)
        x_B1ND = self.embed(known_B1NL, level_B1, jnp.zeros_like(level_B1), action_BD[:, None])
        return self.blocks.cached_frame(x_B1ND[:, 0], memory, time)[1]

    def cached_data(
        self, x_BNL: Array, level: Array, exponent: int, action_BD: Array, memory: Memory, time: Array
    ) -> Array:
        """Predicted data (B, N, L), normalized, of frame number `time` at one level, after what is remembered."""
        level_B1 = jnp.broadcast_to(level, (x_BNL.shape[0], 1))
        x_B1ND = self.embed(x_BNL[:, None], level_B1, jnp.full_like(level_B1, exponent), action_BD[:, None])
        hidden_BND, _ = self.blocks.cached_frame(x_B1ND[:, 0], memory, time)
        return self.read(hidden_BND[:, None], x_BNL[:, None], level_B1)[1][:, 0]

    def next_frame_data(
        self, context_BPNL: Array, x_BNL: Array, level: Array, exponent: int, action_BTD: Array
    ) -> Array:
        """As `cached_data` from all past frames as they are remembered (`as_context`); recomputes all of them."""
        B, P = context_BPNL.shape[:2]
        level_BT = jnp.full((B, P + 1), self.context).at[:, P].set(level)
        exponent_BT = jnp.zeros((B, P + 1), jnp.int32).at[:, P].set(exponent)
        whole_BTNL = jnp.concatenate([context_BPNL, x_BNL[:, None]], axis=1)
        return self(whole_BTNL, level_BT, exponent_BT, action_BTD)[1][:, -1]
