"""Scores of what is no world by itself: a tokenizer, and a stand-alone latent action model.

Legend: S clips · B clips of a batch · T time · A transitions · H W C pixels.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from worldmodel.config import EvaluateConfig, to_dict
from worldmodel.evaluate.action_map import score_action_map
from worldmodel.evaluate.metrics import frame_mse, frame_ssim, mean_entry, psnr_difference_entry, psnr_entry
from worldmodel.evaluate.suite import fixed_clips, in_batches, usage
from worldmodel.models.lam import LatentActionModel
from worldmodel.models.layers import frames_to_unit
from worldmodel.models.tokenizer import Tokenizer


def evaluate_tokenizer(tokenizer: Tokenizer, data_dir: str, config: EvaluateConfig) -> dict[str, Any]:
    """Reconstruction of fixed clips: the upper end of what dynamics on this tokenizer can reach.

    Args:
        tokenizer: trained.
        data_dir: data set with the split that the config names.
        config: clips, their length (prompt and horizon) and the bootstrap.

    Returns:
        JSON-ready document: PSNR and SSIM with intervals, and the use of the codes where there are any.
    """
    clips = fixed_clips(data_dir, config)
    graph, state = nnx.split(tokenizer)

    @jax.jit
    def rebuild(values: Any, frames: Array) -> tuple[Array, Array]:
        model = nnx.merge(graph, values)
        encoded = model.encode(frames)
        return encoded, model.decode(encoded)

    mse, similarity, codes = [], [], []
    for frames, valid in in_batches(clips["frames_BTHWC"], config.batch_size):
        encoded, rebuilt = rebuild(state, frames)
        truth = frames_to_unit(jnp.asarray(frames))
        mse.append(np.asarray(frame_mse(truth, rebuilt))[:valid].mean(axis=1))
        similarity.append(np.asarray(frame_ssim(truth[:, -1], rebuilt[:, -1]))[:valid])
        if not tokenizer.continuous:
            codes.append(np.asarray(encoded[:valid]))
    boot = {"samples": config.bootstrap_samples, "seed": config.seed}
    return {
        "stage": "tokenizer",
        "kind": tokenizer.config.quantizer.kind,
        "data": _covered(clips, config),
        "config": to_dict(config),
        "tokenizer_psnr_db": psnr_entry(np.concatenate(mse), **boot),
        "tokenizer_ssim": mean_entry(np.concatenate(similarity), **boot),
        "codebook": usage(np.concatenate(codes), tokenizer.config.quantizer.codes) if codes else None,
    }


def evaluate_lam(
    lam: LatentActionModel, data_dir: str, config: EvaluateConfig, *, num_actions: int
) -> dict[str, Any]:
    """Next-frame prediction of a latent action model, and what its actions mean.

    Args:
        lam: trained.
        data_dir: data set with the split that the config names.
        config: clips, their length and the bootstrap.
        num_actions: recorded actions of the data set.

    Returns:
        JSON-ready document: PSNR beside copy-last-frame, use of the codes, the map to recorded actions.
    """
    clips = fixed_clips(data_dir, config)
    graph, state = nnx.split(lam)

    @jax.jit
    def predict(values: Any, frames: Array) -> tuple[Array, Array]:
        output = nnx.merge(graph, values)(frames)
        return jnp.clip(output.frames_BAHWC, 0.0, 1.0), output.quantized.codes_X

    mse, copied, codes = [], [], []
    for frames, valid in in_batches(clips["frames_BTHWC"], config.batch_size):
        predicted, codes_BA = predict(state, frames)
        truth = frames_to_unit(jnp.asarray(frames))
        mse.append(np.asarray(frame_mse(truth[:, 1:], predicted))[:valid].mean(axis=1))
        copied.append(np.asarray(frame_mse(truth[:, 1:], truth[:, :-1]))[:valid].mean(axis=1))
        codes.append(np.asarray(codes_BA)[:valid])
    boot = {"samples": config.bootstrap_samples, "seed": config.seed}
    codes_SA, count = np.concatenate(codes), lam.config.quantizer.codes
    errors, baseline = np.concatenate(mse), np.concatenate(copied)
    return {
        "stage": "lam",
        "data": _covered(clips, config),
        "config": to_dict(config),
        "next_frame_psnr_db": psnr_entry(errors, **boot),
        "copy_last_psnr_db": psnr_entry(baseline, **boot),
        "above_copy_last_db": psnr_difference_entry(errors, baseline, **boot),
        "action_codes": usage(codes_SA, count),
        "action_map": score_action_map(
            codes_SA, clips["actions_BT"][:, :-1], codes=count, actions=num_actions, **boot
        ),
    }  # fmt: skip


def _covered(clips: dict[str, np.ndarray], config: EvaluateConfig) -> dict[str, Any]:
    count, frames = clips["frames_BTHWC"].shape[:2]
    return {
        "sha256": str(clips["data_sha256"]), "split": config.split, "clips": count, "frames_per_clip": frames,
        "seed": config.seed,
    }  # fmt: skip
