"""What a rounding error of each weight costs a world: Fisher statistics of its two losses, from clips.

Legend: B clips of a batch · T time · N tokens of a frame · V codes · H W C as in frames · R rows (outputs or codes) ·
K columns (inputs).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from common.errors import ConfigError
from common.quant.gptq import LayerStatistics
from worldmodel.models.layers import frames_to_unit
from worldmodel.models.quantizer import TanhBottleneck
from worldmodel.models.token_dynamics import MaskGitDynamics, TokenDynamics, draw_mask, standardize_codes
from worldmodel.models.tokenizer import Tokenizer
from worldmodel.rollout.world import World
from worldmodel.train.state import Functional, Tree, flatten_names, values_of

BATCH_CLIPS = 4
# Nats of pixels per nat of tokens. A frame has 12,288 pixel values and 16 tokens: counted alike, the tokenizer would
# get nearly all bits, though what is seen after one frame is mostly the dynamics' error (LOG.md has the sweep).
PIXEL_WEIGHT = 0.01
SEEN_FLOOR = 0.05  # of the mean: a code that these clips lack is not free


def pixel_probe(tokenizer: Tokenizer, frames_BTHWC: Array, key: Array) -> Array:
    """A scalar whose gradient has the Fisher matrix of the pixels as its second moment (nats).

    The likelihood is Gaussian with the reconstruction's own mean squared error; a gradient of unit noise through the
    decoder then has the Gauss-Newton matrix as its second moment. Encoder and codebook get the decoder's gradient
    alike: noise before a rounding adds to its squared error what it would add behind it.
    """
    quantizer = tokenizer.quantizer
    assert not isinstance(quantizer, TanhBottleneck)  # token dynamics stands on codes
    quantized = quantizer(tokenizer.encode_latent(frames_BTHWC))
    chosen_BTNL = quantizer.lookup(quantized.codes_X)
    got_BTHWC = tokenizer.decode_latent(chosen_BTNL + quantized.latent_XL - jax.lax.stop_gradient(quantized.latent_XL))
    mse = jax.lax.stop_gradient(jnp.mean((got_BTHWC - frames_to_unit(frames_BTHWC)) ** 2))
    return jnp.sum(jax.random.normal(key, got_BTHWC.shape) * got_BTHWC) / jnp.sqrt(mse)


def token_probe(dynamics: TokenDynamics, tokens_BTN: Array, batch: dict[str, Array], key: Array) -> Array:
    """The same of the cross-entropy of the tokens that training scores, labels drawn from the model itself."""
    config = dynamics.config
    mask_key, label_key = jax.random.split(key)
    if config.action_source == "ground-truth":
        action_BAD = dynamics.embed_action_codes(batch["actions_BT"][:, :-1])
    else:
        action_BAD = dynamics.action_in(dynamics.lam(batch["frames_BTHWC"]).latent_XL)
    action_BTD = dynamics.shift_actions(action_BAD)
    if isinstance(dynamics, MaskGitDynamics):
        per_frame = config.masking == "current"
        scored_BTN = draw_mask(mask_key, tokens_BTN.shape, config.mask_low, config.mask_high, per_frame=per_frame)
        logits_BTNV = dynamics(tokens_BTN, action_BTD, scored_BTN).logits_BTNV
    else:
        logits_BTNV = dynamics.teacher_forced_logits(tokens_BTN, action_BTD)
        scored_BTN = jnp.ones(logits_BTNV.shape[:-1], bool)
    labels_BTN = jax.random.categorical(label_key, jax.lax.stop_gradient(logits_BTNV))
    nats_BTN = optax.softmax_cross_entropy_with_integer_labels(logits_BTNV, labels_BTN)
    return jnp.sum(nats_BTN * scored_BTN)


def matrix_rows(name: str, value: Any) -> Any:
    """A matrix with one output (or one code) a row: linear kernels are stored as (inputs, outputs)."""
    return value.T if name.endswith("/kernel") else value


def world_statistics(
    world: World, clips: dict[str, np.ndarray], *, pixel_weight: float = PIXEL_WEIGHT, seed: int = 0
) -> dict[str, LayerStatistics]:
    """Kronecker factors of the Fisher matrix of every trained matrix.

    Source: K-FAC (Martens and Grosse 2015, arXiv:1503.05671), its factors as in Shampoo (Gupta et al. 2018,
    arXiv:1802.09568): second moments of rows and of columns of a batch's gradient. Labels are drawn from the model, so
    products between clips average out, and those inside a clip, which factors of single positions miss, are counted.

    Args:
        world: float weights.
        clips: `frames_BTHWC` uint8 and `actions_BT`, of the training split.
        pixel_weight: nats of pixels per nat of tokens.
        seed: of masks, labels and noise.

    Returns:
        By the name of an artifact ("tokenizer/params/..."), for matrices that a gradient reaches; nats a frame.

    Raises:
        ConfigError: fewer than BATCH_CLIPS clips, or a world without tokens.
    """
    if not isinstance(world.dynamics, TokenDynamics):
        raise ConfigError(
            f"statistics are of token losses, which dynamics of kind {world.config.dynamics.kind!r} do not have: "
            "use --grid int8"
        )
    count = len(clips["frames_BTHWC"])
    if count < BATCH_CLIPS:
        raise ConfigError(f"statistics need at least {BATCH_CLIPS} clips, got {count}")
    tokenizer_of, dynamics_of = Functional(world.tokenizer), Functional(world.dynamics)
    tokenizer_params, tokenizer_stats = values_of(world.tokenizer)
    dynamics_params, dynamics_stats = values_of(world.dynamics)
    tied = world.config.dynamics.tie_codebook

    def probe(params: dict[str, Tree], batch: dict[str, Array], key: Array) -> Array:
        pixel_key, token_key = jax.random.split(key)
        tokenizer = tokenizer_of.merge(params["tokenizer"], tokenizer_stats)
        codes = {"codes_VL": standardize_codes(tokenizer.quantizer.codes)} if tied else {}
        dynamics = dynamics_of.merge(params["dynamics"], {**dynamics_stats, **codes})
        pixels = pixel_probe(tokenizer, batch["frames_BTHWC"], pixel_key)
        tokens_BTN = tokenizer.encode(batch["frames_BTHWC"])
        return pixel_weight**0.5 * pixels + token_probe(dynamics, tokens_BTN, batch, token_key)

    @jax.jit
    def moments(params: dict[str, Tree], batch: dict[str, Array], key: Array) -> dict[str, tuple[Array, Array]]:
        found = {}
        for prefix, tree in jax.grad(probe)(params, batch, key).items():
            for name, gradient in flatten_names(tree).items():
                if gradient.ndim == 2:
                    g_RK = matrix_rows(name, gradient)
                    found[f"{prefix}/params/{name}"] = (g_RK.T @ g_RK, jnp.sum(g_RK * g_RK, axis=1))
        return found

    params = {"tokenizer": tokenizer_params, "dynamics": dynamics_params}
    sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    batches = count // BATCH_CLIPS
    for index in range(batches):
        part = slice(index * BATCH_CLIPS, (index + 1) * BATCH_CLIPS)
        batch = {name: clips[name][part] for name in ("frames_BTHWC", "actions_BT")}
        for name, found in moments(params, batch, jax.random.fold_in(jax.random.key(seed), index)).items():
            gram_KK, energy_R = (np.asarray(value, np.float64) for value in found)
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + gram_KK, before[1] + energy_R)
    frames = batches * BATCH_CLIPS * clips["frames_BTHWC"].shape[1]
    statistics = {}
    for name, (gram_KK, energy_R) in sums.items():
        if energy_R.sum() > 0:
            share_R = energy_R / energy_R.mean()
            statistics[name] = LayerStatistics(gram_KK / (frames * len(energy_R)), share_R + SEEN_FLOOR)
    return statistics
