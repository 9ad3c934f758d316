"""What every dynamics model is: frames of a tokenizer and actions in, the next frame out, an exact memory of the past.

The kinds are `MaskGitDynamics` and `CausalDynamics` (tokens) and `DiffusionDynamics` (continuous latents). A frame is
int32 (N,) tokens for the first two and float32 (N, L) latents for the third; "frame" below means either.

Legend: B batch · T time · N tokens of a frame · D width · L latent size · A transitions (T - 1) · X a frame's axes, N
or N L · H W C pixels.
"""

from __future__ import annotations

from abc import abstractmethod

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from worldmodel.config import DynamicsConfig, FrameConfig, LamConfig
from worldmodel.models.blocks import Memory, STTransformer
from worldmodel.models.lam import ActionEncoder
from worldmodel.models.layers import freeze

UNKNOWN_ACTION = -1
Scalars = dict[str, Array]


class Dynamics(nnx.Module):
    """Next-frame model, conditioned on recorded or latent actions.

    Source: Bruce et al., "Genie" (2024), section 2.1, "Dynamics model". Ours prepends actions by default.

    Actions are numbered by the frame that they are taken at: action t leads from frame t to frame t + 1, and conditions
    frame t + 1. Frame 0 is conditioned on a learned "unknown" vector, as is any action -1.
    """

    def __init__(
        self,
        config: DynamicsConfig,
        frame: FrameConfig,
        *,
        num_actions: int,
        lam: LamConfig | None,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.frame = config, frame
        dim = config.blocks.dim
        prefix = 1 if config.action_conditioning == "prepend" else 0
        self.blocks = STTransformer(config.blocks, rows=frame.rows, columns=frame.columns, prefix=prefix, rngs=rngs)
        self.unknown_action = nnx.Param(0.02 * jax.random.normal(rngs.params(), (dim,)))
        if config.action_source == "ground-truth":
            self.num_actions = num_actions
            self.action_table = nnx.Param(0.5 * jax.random.normal(rngs.params(), (num_actions, dim)))
        else:
            lam = lam or LamConfig()
            self.num_actions = lam.quantizer.codes
            self.lam = ActionEncoder(lam, rngs=rngs)
            if config.action_source == "latent-frozen":
                freeze(self.lam)
            self.action_in = nnx.Linear(lam.quantizer.latent_dim, dim, rngs=rngs)

    # ------------------------------------------------------------------------------------------------------- actions

    def embed_action_codes(self, actions_BA: Array) -> Array:
        """Action numbers (recorded or latent; -1 unknown) to vectors (B, A, D)."""
        known = (actions_BA >= 0)[..., None]
        index_BA = jnp.maximum(actions_BA, 0)
        if self.config.action_source == "ground-truth":
            vector_BAD = self.action_table[...][index_BA]
        else:
            vector_BAD = self.action_in(self.lam.quantizer.lookup(index_BA))
        return jnp.where(known, vector_BAD, self.unknown_action[...])

    def shift_actions(self, vector_BAD: Array) -> Array:
        """Action vectors of T - 1 transitions to the conditioning of T frames: (B, T, D), frame 0 unknown."""
        first_B1D = jnp.broadcast_to(self.unknown_action[...], (vector_BAD.shape[0], 1, vector_BAD.shape[-1]))
        return jnp.concatenate([first_B1D, vector_BAD.astype(first_B1D.dtype)], axis=1)

    def infer_actions(self, frames_BTHWC: Array) -> Array:
        """Latent action codes (B, T - 1) that the action model reads from true frames."""
        return self.lam(frames_BTHWC).codes_X

    def with_action(self, x_BTND: Array, action_BTD: Array) -> Array:
        """Embedded frame tokens with their conditioning: (B, T, prefix + N, D)."""
        if self.config.action_conditioning == "prepend":
            return jnp.concatenate([action_BTD[:, :, None].astype(x_BTND.dtype), x_BTND], axis=2)
        return x_BTND + action_BTD[:, :, None]

    # ------------------------------------------------------------------------------------------------- what a kind does

    def initialize(self, frames_BTX: np.ndarray) -> None:
        """Data-dependent start from frames of real clips; nothing by default."""

    @abstractmethod
    def loss(self, frames_BTX: Array, action_BTD: Array, key: Array) -> tuple[Array, Scalars]:
        """What training minimises on true frames and their conditioning, and cheap scalars."""

    @abstractmethod
    def report(self, frames_BTX: Array, action_BTD: Array) -> Scalars:
        """Costly metrics on fixed clips, with a true history and nothing known of the scored frame."""

    @abstractmethod
    def remember(self, frame_BX: Array, action_BD: Array, memory: Memory, time: Array, key: Array) -> Memory:
        """The memory with finished frame number `time`; `key` is that of the whole rollout."""
