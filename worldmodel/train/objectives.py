"""What each stage minimises, and what it reports: small objects that the one loop (`worldmodel/train/loop.py`) drives.

Legend: B batch · T time · N tokens of a frame · V codes · A transitions · H W C as in frames.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from common.errors import ConfigError
from worldmodel.config import TrainConfig
from worldmodel.evaluate.metrics import psnr_db, ssim
from worldmodel.models.dynamics import Dynamics
from worldmodel.models.jepa import Jepa
from worldmodel.models.kinds import build_dynamics
from worldmodel.models.lam import ActionEncoder, LatentActionModel
from worldmodel.models.layers import frames_to_unit, freeze
from worldmodel.models.quantizer import Quantizer, TanhBottleneck
from worldmodel.models.token_dynamics import TokenDynamics
from worldmodel.models.tokenizer import Tokenizer, encode_in_chunks
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


def codebook_scalars(quantizer: Quantizer, loss: Array) -> Scalars:
    """The codebook's loss and the share of codes that the last training step did not use; nothing without codes."""
    if isinstance(quantizer, TanhBottleneck):
        return {}
    return {"vq_loss": loss, "codes_idle": jnp.mean((quantizer.idle_V[...] > 0).astype(jnp.float32))}


def bits_per_frame(nats_per_token: Array, tokens: int) -> Array:
    """Bits of a frame of that many tokens."""
    return nats_per_token * tokens / np.log(2.0)


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
        scalars = {"mse": mse, "psnr_db": psnr_db(mse), **codebook_scalars(model.quantizer, output.quantized.loss)}
        return mse + output.quantized.loss, scalars

    def after_update(self, model: Tokenizer) -> None:
        """See `Objective.after_update`."""
        model.quantizer.reset_dead()

    def report(self, model: Tokenizer, frozen: Tree, batch: Batch) -> Scalars:
        """See `Objective.report`."""
        output = model(batch["frames_BTHWC"])
        true, got = frames_to_unit(batch["frames_BTHWC"]), jnp.clip(output.frames_BTHWC, 0.0, 1.0)
        scalars = {"psnr_db": psnr_db(jnp.mean((true - got) ** 2)), "ssim": jnp.mean(ssim(true, got))}
        if not model.continuous:
            scalars |= code_usage(output.quantized.codes_X, self.config.tokenizer.quantizer.codes)
        return scalars


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
        vq_loss = output.quantized.loss
        scalars = {"mse": mse, "psnr_db": psnr_db(mse), **codebook_scalars(model.actions.quantizer, vq_loss)}
        return mse + vq_loss, scalars

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


class JepaObjective:
    """Error of the next embedding plus SIGReg of all embeddings; gradients flow through both sides."""

    name = "jepa"
    batch_keys: tuple[str, ...] = ("frames_BTHWC", "actions_BT")

    def __init__(self, config: TrainConfig, *, num_actions: int) -> None:
        self.config, self.num_actions = config, num_actions
        self.frozen: Tree = {}

    def build(self, rngs: nnx.Rngs) -> Jepa:
        """See `Objective.build`."""
        return Jepa(self.config.jepa, num_actions=self.num_actions, rngs=rngs)

    def initialize(self, model: Jepa, clips: dict[str, np.ndarray], key: Array) -> None:
        """See `Objective.initialize`: nothing depends on data."""

    def loss(self, model: Jepa, frozen: Tree, batch: Batch, key: Array) -> tuple[Array, Scalars]:
        """See `Objective.loss`."""
        direction_key, drop_key = jax.random.split(key)
        output = model(batch["frames_BTHWC"], batch["actions_BT"][:, :-1], key=drop_key)
        error = jnp.mean((output.predicted_BAL - output.embedding_BTL[:, 1:]) ** 2)
        regularity = model.regularity(output.embedding_BTL, direction_key)
        total = error + self.config.jepa.sigreg_weight * regularity
        return total, {"prediction_mse": error, "sigreg": regularity}

    def after_update(self, model: Jepa) -> None:
        """See `Objective.after_update`: nothing to do."""

    def report(self, model: Jepa, frozen: Tree, batch: Batch) -> Scalars:
        """See `Objective.report`: errors as shares of the embeddings' variance, which says whether they collapsed."""
        output = model(batch["frames_BTHWC"], batch["actions_BT"][:, :-1])
        embedding = output.embedding_BTL
        variance = jnp.mean(jnp.var(embedding, axis=(0, 1)))
        return {
            "prediction_error_share": jnp.mean((output.predicted_BAL - embedding[:, 1:]) ** 2) / variance,
            "copy_error_share": jnp.mean((embedding[:, 1:] - embedding[:, :-1]) ** 2) / variance,
            "embedding_variance": variance,
            "sigreg": model.regularity(embedding, jax.random.key(0)),
        }


def frozen_copy(lam: ActionEncoder) -> ActionEncoder:
    """The same action model with parameters turned into plain state, as `Dynamics` holds a frozen one."""
    copy = nnx.clone(lam)
    freeze(copy)
    return copy


class DynamicsObjective:
    """What a dynamics model minimises, plus the action codebook's loss when the action model is trained along.

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
        quantizer = tokenizer.quantizer
        self.codes_VL = None if isinstance(quantizer, TanhBottleneck) else np.asarray(quantizer.codes)
        self.tokenizer = Functional(tokenizer)
        self.frozen: Tree = {"tokenizer": list(values_of(tokenizer))}
        self.lam = None if lam is None else frozen_copy(lam.actions)
        pixels = ("frames_BTHWC",) if source != "ground-truth" or not config.token_dir else ()
        tokens = ("tokens_BTN",) if config.token_dir else ()
        self.batch_keys: tuple[str, ...] = (*pixels, *tokens, "actions_BT")

    def build(self, rngs: nnx.Rngs) -> Dynamics:
        """See `Objective.build`."""
        return build_dynamics(self.config, num_actions=self.num_actions, codes_VL=self.codes_VL, rngs=rngs)

    def initialize(self, model: Dynamics, clips: dict[str, np.ndarray], key: Array) -> None:
        """See `Objective.initialize`. A frozen action model is copied in here, once."""
        if self.config.dynamics.action_source == "latent":
            model.lam.initialize(clips["frames_BTHWC"], key)
        if self.lam is not None:
            nnx.update(model.lam, nnx.state(self.lam))
        if self.codes_VL is None:
            tokenizer = self.tokenizer.merge(*self.frozen["tokenizer"])
            model.initialize(np.asarray(encode_in_chunks(tokenizer.encode, clips["frames_BTHWC"])))

    def frames_of(self, frozen: Tree, batch: Batch) -> Array:
        """Tokens (B, T, N) or latents (B, T, N, L) of a batch: as loaded, or from the frozen tokenizer."""
        if "tokens_BTN" in batch:
            return batch["tokens_BTN"]
        return self.tokenizer.merge(*frozen["tokenizer"]).encode(batch["frames_BTHWC"])

    def condition(
        self, model: Dynamics, batch: Batch, key: Array | None
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
        model_key, action_key = jax.random.split(key)
        action_BTD, vq_loss, _ = self.condition(model, batch, action_key)
        frames_BTX = self.frames_of(frozen, batch)
        total, scalars = model.loss(frames_BTX, action_BTD, model_key)
        if isinstance(model, TokenDynamics):  # as if every token of a frame cost what the scored ones do
            scalars["bits_per_frame"] = bits_per_frame(scalars["ce_nats"], frames_BTX.shape[-1])
        if vq_loss is not None and config.action_source == "latent":
            total = total + config.vq_weight * vq_loss
            scalars |= codebook_scalars(model.lam.quantizer, vq_loss)
        return total, scalars

    def after_update(self, model: Dynamics) -> None:
        """See `Objective.after_update`."""
        if self.config.dynamics.action_source == "latent":
            model.lam.quantizer.reset_dead()

    def report(self, model: Dynamics, frozen: Tree, batch: Batch) -> Scalars:
        """See `Objective.report`."""
        action_BTD, _, codes_BA = self.condition(model, batch, None)
        frames_BTX = self.frames_of(frozen, batch)
        scalars = model.report(frames_BTX, action_BTD)
        for nats in ("full_mask_ce_nats", "teacher_forced_ce_nats"):
            if nats in scalars:
                scalars["bits_per_frame"] = bits_per_frame(scalars[nats], frames_BTX.shape[-1])
        if codes_BA is not None:
            scalars |= {f"action_{k}": v for k, v in code_usage(codes_BA, model.num_actions).items()}
        return scalars
