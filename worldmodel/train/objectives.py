"""What each stage minimises, and what it reports: small objects that the one loop (`worldmodel/train/loop.py`) drives.

Legend: B batch · T time · N tokens of a frame · V codes · A transitions · H W C as in frames.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from common.errors import ConfigError
from worldmodel.config import TrainConfig
from worldmodel.evaluate.metrics import psnr_db, ssim
from worldmodel.models.blocks import frames_to_unit, freeze
from worldmodel.models.dynamics import Dynamics, draw_mask
from worldmodel.models.lam import ActionEncoder, LatentActionModel
from worldmodel.models.quantizer import Quantizer
from worldmodel.models.tokenizer import Tokenizer
from worldmodel.train.state import Functional, Tree, values_of

Batch = dict[str, Array]
Scalars = dict[str, Array]


class Objective(Protocol):
    """One stage. `frozen` is a tree of arrays that the step receives but never updates or stores."""

    name: str
    frozen: Tree
    batch_keys: tuple[str, ...]

    def build(self, rngs: nnx.Rngs) -> Any:
        """A fresh model."""
        ...

    def initialize(self, model: Any, clips: dict[str, np.ndarray], key: Array) -> None:
        """Data-dependent start, before step 0."""
        ...

    def loss(self, model: Any, frozen: Tree, batch: Batch, key: Array) -> tuple[Array, Scalars]:
        """Scalar loss and cheap scalars; runs every step, so nothing here may decode or score pixels for show."""
        ...

    def after_update(self, model: Any) -> None:
        """Bookkeeping that follows the optimizer (dead-code reset)."""
        ...

    def report(self, model: Any, frozen: Tree, batch: Batch) -> Scalars:
        """Costly metrics on the fixed validation clips; runs only when logged."""
        ...


def code_usage(codes_X: Array, count: int) -> Scalars:
    """Share of codes in use and the perplexity of their frequencies."""
    number_V = jnp.zeros((count,)).at[codes_X.reshape(-1)].add(1.0)
    share_V = number_V / jnp.sum(number_V)
    entropy_nats = -jnp.sum(jnp.where(share_V > 0, share_V * jnp.log(jnp.maximum(share_V, 1e-12)), 0.0))
    return {"codes_used": jnp.sum(number_V > 0).astype(jnp.float32), "code_perplexity": jnp.exp(entropy_nats)}


def bits_per_frame(nats_per_token: Array, tokens: int) -> Array:
    """Bits of a frame of that many tokens."""
    return nats_per_token * tokens / np.log(2.0)


def idle_share(quantizer: Quantizer) -> Array:
    """Share of codes that the last training step did not use."""
    return jnp.mean((quantizer.idle_V[...] > 0).astype(jnp.float32))


class TokenizerObjective:
    """Mean squared error of the reconstruction plus the codebook's loss."""

    name = "tokenizer"
    batch_keys: tuple[str, ...] = ("frames_BTHWC",)

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.frozen: Tree = {}

    def build(self, rngs: nnx.Rngs) -> Tokenizer:
        """See `Objective.build`."""
        return Tokenizer(self.config.tokenizer, rngs=rngs)

    def initialize(self, model: Tokenizer, clips: dict[str, np.ndarray], key: Array) -> None:
        """See `Objective.initialize`."""
        model.initialize(clips["frames_BTHWC"], key)

    def loss(self, model: Tokenizer, frozen: Tree, batch: Batch, key: Array) -> tuple[Array, Scalars]:
        """See `Objective.loss`."""
        output = model(batch["frames_BTHWC"], key=key)
        mse = jnp.mean((output.frames_BTHWC - frames_to_unit(batch["frames_BTHWC"])) ** 2)
        vq_loss, idle = output.quantized.loss, idle_share(model.quantizer)
        return mse + vq_loss, {"mse": mse, "psnr_db": psnr_db(mse), "vq_loss": vq_loss, "codes_idle": idle}

    def after_update(self, model: Tokenizer) -> None:
        """See `Objective.after_update`."""
        model.quantizer.reset_dead()

    def report(self, model: Tokenizer, frozen: Tree, batch: Batch) -> Scalars:
        """See `Objective.report`."""
        output = model(batch["frames_BTHWC"])
        true, got = frames_to_unit(batch["frames_BTHWC"]), jnp.clip(output.frames_BTHWC, 0.0, 1.0)
        return {
            "psnr_db": psnr_db(jnp.mean((true - got) ** 2)),
            "ssim": jnp.mean(ssim(true, got)),
            **code_usage(output.quantized.codes_X, self.config.tokenizer.quantizer.codes),
        }


class LamObjective:
    """Mean squared error of the predicted next frame plus the action codebook's loss."""

    name = "lam"
    batch_keys: tuple[str, ...] = ("frames_BTHWC",)

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.frozen: Tree = {}

    def build(self, rngs: nnx.Rngs) -> LatentActionModel:
        """See `Objective.build`."""
        return LatentActionModel(self.config.lam, rngs=rngs)

    def initialize(self, model: LatentActionModel, clips: dict[str, np.ndarray], key: Array) -> None:
        """See `Objective.initialize`."""
        model.initialize(clips["frames_BTHWC"], key)

    def loss(self, model: LatentActionModel, frozen: Tree, batch: Batch, key: Array) -> tuple[Array, Scalars]:
        """See `Objective.loss`."""
        output = model(batch["frames_BTHWC"], key=key)
        mse = jnp.mean((output.frames_BAHWC - frames_to_unit(batch["frames_BTHWC"][:, 1:])) ** 2)
        vq_loss, idle = output.quantized.loss, idle_share(model.actions.quantizer)
        return mse + vq_loss, {"mse": mse, "psnr_db": psnr_db(mse), "vq_loss": vq_loss, "codes_idle": idle}

    def after_update(self, model: LatentActionModel) -> None:
        """See `Objective.after_update`."""
        model.actions.quantizer.reset_dead()

    def report(self, model: LatentActionModel, frozen: Tree, batch: Batch) -> Scalars:
        """See `Objective.report`."""
        output = model(batch["frames_BTHWC"])
        true = frames_to_unit(batch["frames_BTHWC"])
        return {
            "psnr_db": psnr_db(jnp.mean((true[:, 1:] - jnp.clip(output.frames_BAHWC, 0.0, 1.0)) ** 2)),
            "copy_psnr_db": psnr_db(jnp.mean((true[:, 1:] - true[:, :-1]) ** 2)),
            **code_usage(output.quantized.codes_X, self.config.lam.quantizer.codes),
        }


def frozen_copy(lam: ActionEncoder) -> ActionEncoder:
    """The same action model with parameters turned into plain state, as `Dynamics` holds a frozen one."""
    copy = nnx.clone(lam)
    freeze(copy)
    return copy


class DynamicsObjective:
    """Cross-entropy of masked tokens, plus the action codebook's loss when the action model is trained along.

    The tokenizer is frozen: it enters as values of a step, never as parameters. So does a frozen action model.
    """

    name = "dynamics"

    def __init__(
        self, config: TrainConfig, tokenizer: Tokenizer, *, num_actions: int, lam: LatentActionModel | None = None
    ) -> None:
        self.config, self.num_actions = config, num_actions
        source = config.dynamics.action_source
        if (lam is not None) != (source == "latent-frozen"):
            raise ConfigError(f"action_source {source} {'takes no' if lam is not None else 'needs an'} action model")
        self.codes_VL = np.asarray(tokenizer.quantizer.codes)
        self.tokenizer = Functional(tokenizer)
        self.frozen: Tree = {"tokenizer": list(values_of(tokenizer))}
        self.lam = None if lam is None else frozen_copy(lam.actions)
        pixels = ("frames_BTHWC",) if source != "ground-truth" or not config.token_dir else ()
        tokens = ("tokens_BTN",) if config.token_dir else ()
        self.batch_keys: tuple[str, ...] = (*pixels, *tokens, "actions_BT")

    def build(self, rngs: nnx.Rngs) -> Dynamics:
        """See `Objective.build`."""
        config = self.config
        latent = config.dynamics.action_source != "ground-truth"
        return Dynamics(
            config.dynamics,
            config.tokenizer.frame,
            self.codes_VL,
            num_actions=self.num_actions,
            lam=config.lam if latent else None,
            rngs=rngs,
        )

    def initialize(self, model: Dynamics, clips: dict[str, np.ndarray], key: Array) -> None:
        """See `Objective.initialize`. A frozen action model is copied in here, once."""
        if self.config.dynamics.action_source == "latent":
            model.lam.initialize(clips["frames_BTHWC"], key)
        if self.lam is not None:
            nnx.update(model.lam, nnx.state(self.lam))

    def tokens_of(self, frozen: Tree, batch: Batch) -> Array:
        """Tokens (B, T, N) of a batch: as loaded, or from the frozen tokenizer."""
        if "tokens_BTN" in batch:
            return batch["tokens_BTN"]
        return self.tokenizer.merge(*frozen["tokenizer"]).encode(batch["frames_BTHWC"])

    def condition(
        self, model: Dynamics, frozen: Tree, batch: Batch, key: Array | None
    ) -> tuple[Array, Array | None, Array | None]:
        """Conditioning (B, T, D) of every frame, with the action bottleneck's loss and codes where there is one."""
        source = self.config.dynamics.action_source
        if source == "ground-truth":
            return model.shift_actions(model.embed_action_codes(batch["actions_BT"][:, :-1])), None, None
        quantized = model.lam(batch["frames_BTHWC"], key=key if source == "latent" else None)
        latent_BAL = quantized.latent_XL if source == "latent" else jax.lax.stop_gradient(quantized.latent_XL)
        return model.shift_actions(model.action_in(latent_BAL)), quantized.loss, quantized.codes_X

    def loss(self, model: Dynamics, frozen: Tree, batch: Batch, key: Array) -> tuple[Array, Scalars]:
        """See `Objective.loss`."""
        config = self.config.dynamics
        mask_key, drop_key, action_key = jax.random.split(key, 3)
        tokens_BTN = self.tokens_of(frozen, batch)
        action_BTD, vq_loss, _ = self.condition(model, frozen, batch, action_key)
        per_frame = config.masking == "current"
        masked_BTN = draw_mask(mask_key, tokens_BTN.shape, config.mask_low, config.mask_high, per_frame=per_frame)
        output = model(tokens_BTN, action_BTD, masked_BTN, key=drop_key)
        weight_BTN = masked_BTN / jnp.maximum(jnp.sum(masked_BTN), 1)
        nats_BTN = optax.softmax_cross_entropy_with_integer_labels(output.logits_BTNV, tokens_BTN)
        cross_entropy = jnp.sum(nats_BTN * weight_BTN)
        # As if every token of a frame cost what the masked ones do.
        total = cross_entropy
        scalars = {"ce_nats": cross_entropy, "bits_per_frame": bits_per_frame(cross_entropy, tokens_BTN.shape[-1])}
        if config.z_loss > 0.0:
            z_loss = jnp.sum(jax.nn.logsumexp(output.logits_BTNV, axis=-1) ** 2 * weight_BTN)
            total, scalars["z_nats2"] = total + config.z_loss * z_loss, z_loss
        if vq_loss is not None and config.action_source == "latent":
            total = total + config.vq_weight * vq_loss
            scalars["vq_loss"] = vq_loss
            scalars["codes_idle"] = idle_share(model.lam.quantizer)
        return total, scalars

    def after_update(self, model: Dynamics) -> None:
        """See `Objective.after_update`."""
        if self.config.dynamics.action_source == "latent":
            model.lam.quantizer.reset_dead()

    def report(self, model: Dynamics, frozen: Tree, batch: Batch) -> Scalars:
        """See `Objective.report`: every token of every frame but the first masked, true history."""
        tokens_BTN = self.tokens_of(frozen, batch)
        action_BTD, _, codes_BA = self.condition(model, frozen, batch, None)
        masked_BTN = draw_mask(jax.random.key(0), tokens_BTN.shape, 1.0, 1.0, per_frame=True)
        logits = model(tokens_BTN, action_BTD, masked_BTN).logits_BTNV[:, 1:]
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BTN[:, 1:])
        scalars = {
            "full_mask_ce_nats": jnp.mean(nats),
            "bits_per_frame": bits_per_frame(jnp.mean(nats), tokens_BTN.shape[-1]),
            "full_mask_accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == tokens_BTN[:, 1:]),
        }
        if codes_BA is not None:
            scalars |= {f"action_{k}": v for k, v in code_usage(codes_BA, model.num_actions).items()}
        return scalars
