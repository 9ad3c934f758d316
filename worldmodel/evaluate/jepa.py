"""Scores of a JEPA world model: prediction in embedding space, probes of what embeddings hold, and surprise.

Legend: S clips · T time · A transitions · L embedding size · K numbers of a state · H W C pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from worldmodel.config import EvaluateConfig, to_dict
from worldmodel.evaluate.metrics import mean_entry
from worldmodel.evaluate.reader import state_entries
from worldmodel.evaluate.suite import fixed_clips, in_batches
from worldmodel.models.jepa import Jepa

RIDGE = 1e-3


def fit_probe(inputs_SX: np.ndarray, targets_SK: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Ridge regression.

    Args:
        inputs_SX: what is read, one row a sample.
        targets_SK: what should be found in it.

    Returns:
        From inputs (..., X) to predictions (..., K).
    """
    mean_X, spread_X = inputs_SX.mean(axis=0), inputs_SX.std(axis=0) + 1e-6

    def prepared(x: np.ndarray) -> np.ndarray:
        return np.concatenate([(x - mean_X) / spread_X, np.ones((*x.shape[:-1], 1))], axis=-1).astype(np.float64)

    x_SX = prepared(inputs_SX)
    gram_XX = x_SX.T @ x_SX + RIDGE * len(x_SX) * np.eye(x_SX.shape[1])
    weight_XK = np.linalg.solve(gram_XX, x_SX.T @ targets_SK)
    return lambda x: prepared(x) @ weight_XK


def linear_probe(
    inputs_SX: np.ndarray, targets_SK: np.ndarray, fit_share: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression from the first part of the rows to the rest.

    Args:
        inputs_SX: what is read, one row a sample; rows of one clip stand together.
        targets_SK: what should be found in it.
        fit_share: rows that the regression is fitted on.

    Returns:
        Squared errors and squared deviations from the fitted rows' mean, each (rows left, K): R^2 = 1 - ratio of sums.
    """
    half = int(len(inputs_SX) * fit_share)
    probe = fit_probe(inputs_SX[:half], targets_SK[:half])
    rest_SK = targets_SK[half:]
    return (probe(inputs_SX[half:]) - rest_SK) ** 2, (rest_SK - targets_SK[:half].mean(axis=0)) ** 2


def imagined_state_error(
    embedding_STL: np.ndarray, imagined_SHL: np.ndarray, clips: dict[str, Any], config: EvaluateConfig
) -> dict[str, Any]:
    """How far the state that a linear probe finds in imagined embeddings lies from the true one, over the horizon.

    The probe is fitted on the true embeddings of half of the clips, errors are of the others. See `state_entries`.
    """
    states_STK = clips["state_BTK"].astype(np.float64)
    half, prompt = len(states_STK) // 2, config.rollout.prompt_frames
    probe = fit_probe(
        embedding_STL[:half].reshape(-1, embedding_STL.shape[-1]), states_STK[:half].reshape(-1, states_STK.shape[-1])
    )
    groups = clips.get("state_groups") or {"state": tuple(range(states_STK.shape[-1]))}
    read = {"dream": probe(imagined_SHL[half:]), "true_frames": probe(embedding_STL[half:, prompt:])}
    return state_entries(
        read, states_STK[half:], prompt, groups, config.horizons, samples=config.bootstrap_samples, seed=config.seed
    )


def violated(frames_STHWC: np.ndarray, at: int, kind: str) -> np.ndarray:
    """The same clips with broken physics from frame `at` on.

    Args:
        frames_STHWC: true clips.
        at: first wrong frame, at least 1.
        kind: "teleport" goes on with the next clip's frames; "repeat" shows frame at - 1 again instead of frame `at`.

    Returns:
        Clips of the same shape.
    """
    wrong = frames_STHWC.copy()
    if kind == "teleport":
        wrong[:, at:] = np.roll(frames_STHWC, 1, axis=0)[:, at:]
    else:
        wrong[:, at] = frames_STHWC[:, at - 1]
    return wrong


def surprise_entries(
    true_SL: np.ndarray, violated_SL: np.ndarray, changed_S: np.ndarray, *, samples: int, seed: int
) -> dict[str, Any]:
    """How often a broken frame surprises more than the true one, over the clips where it differs from it.

    Args:
        true_SL: squared prediction errors of the true frame.
        violated_SL: those of the wrong frame at the same place.
        changed_S: whether the pixels differ at all.
        samples: bootstrap draws, over clips.
        seed: of the draws.

    Returns:
        Share with its interval and the ratio of mean errors; null where no clip differs.
    """
    if not changed_S.any():
        return {"more_surprising": None, "surprise_ratio": None, "clips": 0}
    before, after = true_SL[changed_S].mean(axis=-1), violated_SL[changed_S].mean(axis=-1)
    return {
        "more_surprising": mean_entry((after > before).astype(np.float64), samples=samples, seed=seed),
        "surprise_ratio": float(after.mean() / max(before.mean(), 1e-12)),
        "clips": int(changed_S.sum()),
    }


def evaluate_jepa(model: Jepa, data_dir: str, config: EvaluateConfig) -> dict[str, Any]:
    """Score a JEPA world model on fixed clips.

    Args:
        model: trained.
        data_dir: data set with the split that the config names; clips that hold `state_BTK` are probed for it.
        config: clips, their length (prompt and horizon), horizons and the bootstrap.

    Returns:
        JSON-ready document: error of predicted embeddings as a share of their variance, beside that of repeating the
        last one; R^2 of linear probes, fitted on half of the clips, of the action between two embeddings and of the
        true state where it is known; how far that state lies off in imagined embeddings (null where it is not known);
        surprise at violations.
    """
    clips = fixed_clips(data_dir, config)
    frames_STHWC, actions_ST = clips["frames_BTHWC"], clips["actions_BT"]
    prompt, boot = config.rollout.prompt_frames, {"samples": config.bootstrap_samples, "seed": config.seed}
    graph, state = nnx.split(model)

    @jax.jit
    def look(values: Any, frames: Array, actions: Array) -> tuple[Array, Array, Array]:
        live = nnx.merge(graph, values)
        embedding_BTL, predicted_BAL = live(frames, actions[:, :-1])
        return embedding_BTL, predicted_BAL, live.imagine(embedding_BTL[:, :prompt], actions[:, :-1])

    def run(frames_STHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        parts: list[list[np.ndarray]] = [[], [], []]
        for index, valid in in_batches(np.arange(len(frames_STHWC)), config.batch_size):
            for part, value in zip(parts, look(state, frames_STHWC[index], actions_ST[index]), strict=True):
                part.append(np.asarray(value)[:valid])
        return tuple(np.concatenate(part) for part in parts)  # pyright: ignore[reportReturnType]

    embedding_STL, predicted_SAL, imagined_SHL = run(frames_STHWC)
    variance = float(embedding_STL.reshape(-1, embedding_STL.shape[-1]).var(axis=0).mean())

    def share(error: np.ndarray) -> dict[str, float]:
        return mean_entry((error**2).mean(axis=-1) / max(variance, 1e-12), **boot)

    last_SL = embedding_STL[:, prompt - 1]
    horizons = {
        str(h): {
            "predicted_error_share": share(imagined_SHL[:, h - 1] - embedding_STL[:, prompt + h - 1]),
            "copy_last_error_share": share(last_SL - embedding_STL[:, prompt + h - 1]),
        }
        for h in config.horizons
    }
    # Probes: rows of one clip stand together, so the half that is fitted and the half that is scored share no clip.
    pair_SX = np.concatenate([embedding_STL[:, prompt - 1], embedding_STL[:, prompt]], axis=-1)
    one_hot = np.eye(model.num_actions)[np.maximum(actions_ST[:, prompt - 1], 0)]
    probes = {"action_r2": _r2(*linear_probe(pair_SX, one_hot))}
    if "state_BTK" in clips:
        states_STK = clips["state_BTK"]
        flat = embedding_STL.reshape(-1, embedding_STL.shape[-1])
        errors, deviations = linear_probe(flat, states_STK.reshape(len(flat), -1).astype(np.float64))
        probes["state_r2"] = _r2(errors, deviations)
    error = imagined_state_error(embedding_STL, imagined_SHL, clips, config) if "state_BTK" in clips else None
    surprise = {}
    for kind in ("teleport", "repeat"):
        wrong = violated(frames_STHWC, prompt, kind)
        wrong_STL, expected_SAL, _ = run(wrong)
        changed_S = (wrong[:, prompt] != frames_STHWC[:, prompt]).reshape(len(wrong), -1).any(axis=1)
        surprise[kind] = surprise_entries(
            (predicted_SAL[:, prompt - 1] - embedding_STL[:, prompt]) ** 2,
            (expected_SAL[:, prompt - 1] - wrong_STL[:, prompt]) ** 2,
            changed_S, **boot,
        )  # fmt: skip
    return {
        "stage": "jepa",
        "data": {
            "sha256": str(clips["data_sha256"]), "split": config.split, "clips": len(frames_STHWC),
            "frames_per_clip": frames_STHWC.shape[1], "seed": config.seed,
        },
        "config": to_dict(config),
        "embedding_variance": variance,
        "sigreg": float(model.regularity(jnp.asarray(embedding_STL), jax.random.key(config.seed))),
        "horizons": horizons,
        "probes": probes,
        "state_error": error,
        "surprise": surprise,
    }  # fmt: skip


def _r2(errors_SK: np.ndarray, deviations_SK: np.ndarray) -> float:
    return float(1.0 - errors_SK.sum() / max(deviations_SK.sum(), 1e-12))
