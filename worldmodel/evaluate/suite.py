"""The evaluation of a world on a fixed clip set, as one JSON document with bootstrap intervals.

Legend: S clips · B clips of a batch · T time · F future frames · A transitions · H W C frame · N tokens.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.errors import ConfigError
from worldmodel.config import EvaluateConfig, to_dict
from worldmodel.data.records import open_dataset
from worldmodel.evaluate.action_map import score_action_map
from worldmodel.evaluate.metrics import frame_mse, frame_ssim, mean_entry, psnr_difference_entry, psnr_entry
from worldmodel.models.layers import frames_to_unit
from worldmodel.rollout.world import World

MATMUL_SIZE = 2048


def fixed_clips(data_dir: str, config: EvaluateConfig) -> dict[str, np.ndarray]:
    """The clips of an evaluation: the same for the same data, split, number, length and seed."""
    dataset = open_dataset(data_dir, config.split)
    seq_len = config.rollout.prompt_frames + config.rollout.horizon
    count = min(config.clips, dataset.require_windows(seq_len))
    clips = dataset.fixed_windows(count, seq_len, seed=config.seed)
    return {**clips, "data_sha256": np.asarray(dataset.content_sha256)}


def in_batches(rows_SX: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of one shape, the last filled up with repetitions, and how many rows of each count."""
    for start in range(0, len(rows_SX), size):
        index = np.minimum(np.arange(start, start + size), len(rows_SX) - 1)
        yield rows_SX[index], min(size, len(rows_SX) - start)


def random_actions(actions_BA: np.ndarray, first: int, num_actions: int, rng: np.random.Generator) -> np.ndarray:
    """The same actions up to `first`, uniformly random ones from there."""
    changed_BA = actions_BA.copy()
    changed_BA[:, first:] = rng.integers(0, num_actions, changed_BA[:, first:].shape)
    return changed_BA


def evaluate_world(world: World, data_dir: str, config: EvaluateConfig) -> dict[str, Any]:
    """Score a world.

    Args:
        world: models.
        data_dir: data set with the split that the config names.
        config: what to measure.

    Returns:
        JSON-ready document: quality with 95% bootstrap intervals over clips, usage, speed, and what it covers. Bits and
        codebook are null for latents, which have neither; the map of actions, where they are not latent or none is
        recorded.
    """
    clips = fixed_clips(data_dir, config)
    frames_STHWC, actions_ST = clips["frames_BTHWC"], clips["actions_BT"]
    count, prompt, horizon = len(frames_STHWC), config.rollout.prompt_frames, config.rollout.horizon
    if count < 2:
        raise ConfigError(f"{data_dir} split {config.split} gives {count} clips; intervals need at least 2")
    rng = np.random.default_rng(config.seed)
    collected: dict[str, list[np.ndarray]] = {}

    def add(name: str, values: Array | np.ndarray) -> None:
        collected.setdefault(name, []).append(np.asarray(values))

    # Noise is drawn by frame number, so a shorter rollout has the same first frames.
    to_delta = dataclasses.replace(config.rollout, horizon=config.delta_horizon)
    rollout_s = 0.0
    for index, valid in in_batches(np.arange(count), config.batch_size):
        start, frames = int(index[0]), frames_STHWC[index]
        truth = frames_to_unit(jnp.asarray(frames))
        tokens = world.encode(frames)
        driven = world.actions_of(frames, actions_ST[index])
        key = jax.random.fold_in(jax.random.key(config.seed), start)
        rebuilt = world.decode(tokens)
        began_s = time.perf_counter()
        future = world.rollout(tokens[:, :prompt], driven, config.rollout, key)
        dream = world.decode(jnp.concatenate([tokens[:, :prompt], future], axis=1))[:, prompt:].block_until_ready()
        rollout_s += time.perf_counter() - began_s if start else 0.0
        shuffled = random_actions(driven, prompt - 1, world.dynamics.num_actions, rng)
        other = world.rollout(tokens[:, :prompt], shuffled, to_delta, key)
        other = world.decode(jnp.concatenate([tokens[:, :prompt], other], axis=1))[:, prompt:]
        last = jnp.broadcast_to(truth[:, prompt - 1 : prompt], truth[:, prompt:].shape)
        # SSIM costs more than the rollout itself: only the horizons asked for are scored.
        shown = np.asarray([prompt + h - 1 for h in config.horizons])
        add("random_mse", frame_mse(truth[:, prompt : prompt + config.delta_horizon], other)[:valid])
        for name, got in (("rollout", dream), ("oracle", rebuilt[:, prompt:]), ("copy", last)):
            add(f"{name}_mse", frame_mse(truth[:, prompt:], got)[:valid])
            add(f"{name}_ssim", frame_ssim(truth[:, shown], got[:, shown - prompt])[:valid])
        add("tokenizer_mse", jnp.mean(frame_mse(truth, rebuilt), axis=1)[:valid])
        if world.discrete:
            add("bits", world.bits(tokens, driven)[:valid, prompt - 1 :])
            add("tokens", tokens[:valid].reshape(valid, -1))
        add("actions", driven[:valid])
        add("recorded", actions_ST[index][:valid, :-1])
    data = {
        name: np.concatenate(parts) for name, parts in collected.items()
    }
    boot = {"samples": config.bootstrap_samples, "seed": config.seed}
    by_horizon: dict[str, Any] = {}
    for place, h in enumerate(config.horizons):
        mse = {name: data[f"{name}_mse"][:, h - 1] for name in ("rollout", "copy", "oracle")}
        similarity = {name: data[f"{name}_ssim"][:, place] for name in ("rollout", "copy", "oracle")}
        by_horizon[str(h)] = {
            "rollout_psnr_db": psnr_entry(mse["rollout"], **boot),
            "copy_last_psnr_db": psnr_entry(mse["copy"], **boot),
            "tokenizer_oracle_psnr_db": psnr_entry(mse["oracle"], **boot),
            "above_copy_last_db": psnr_difference_entry(mse["rollout"], mse["copy"], **boot),
            "rollout_ssim": mean_entry(similarity["rollout"], **boot),
            "copy_last_ssim": mean_entry(similarity["copy"], **boot),
            "tokenizer_oracle_ssim": mean_entry(similarity["oracle"], **boot),
        }
    delta = config.delta_horizon - 1
    codes, action_codes = world.config.tokenizer.quantizer.codes, world.dynamics.num_actions
    return {
        "weights": world.source,
        "data": {
            "sha256": str(clips["data_sha256"]), "split": config.split, "clips": count,
            "frames_per_clip": prompt + horizon, "seed": config.seed,
        },
        "config": to_dict(config),
        "kind": world.config.dynamics.kind,
        "actions": world.config.dynamics.action_source,
        "tokenizer_psnr_db": psnr_entry(data["tokenizer_mse"], **boot),
        "teacher_forced_bits_per_frame": (
            mean_entry(data["bits"].astype(np.float64).mean(axis=1), **boot) if world.discrete else None
        ),
        "horizons": by_horizon,
        "delta_psnr_db": {
            "horizon": config.delta_horizon,
            **psnr_difference_entry(data["rollout_mse"][:, delta], data["random_mse"][:, delta], **boot),
        },
        "codebook": usage(data["tokens"], codes) if world.discrete else None,
        "action_codes": usage(data["actions"][data["actions"] >= 0], action_codes),
        "action_map": (
            score_action_map(data["actions"], data["recorded"], codes=action_codes, actions=world.num_actions, **boot)
            if world.latent and (data["recorded"] >= 0).any()
            else None
        ),
        "batch_rollout_frames_per_s": (
            (count - min(config.batch_size, count)) * horizon / rollout_s if rollout_s else None
        ),
        "speed": measure_speed(world, frames_STHWC[:1], actions_ST[:1], config),
    }  # fmt: skip


def usage(codes: np.ndarray, count: int) -> dict[str, Any]:
    """How many codes occur, how evenly, and (for few codes) how often each."""
    number_V = np.bincount(codes.reshape(-1).astype(np.int64), minlength=count)
    share_V = number_V / max(number_V.sum(), 1)
    positive = share_V[share_V > 0]
    result: dict[str, Any] = {
        "used": int((number_V > 0).sum()),
        "of": count,
        "perplexity": float(np.exp(-(positive * np.log(positive)).sum())),
    }
    if count <= 32:
        result["shares"] = [round(float(share), 5) for share in share_V]
    return result


def measure_speed(
    world: World, frames_BTHWC: np.ndarray, actions_BT: np.ndarray, config: EvaluateConfig
) -> dict[str, Any]:
    """Interactive speed at batch 1, pixels included, and the share of the measured matmul rate that it reaches.

    Args:
        world: models.
        frames_BTHWC: one true clip.
        actions_BT: its actions.
        config: `speed_frames` frames are timed after one warm-up frame.

    Returns:
        frames/s, p50 and p95 ms a frame, FLOPs a frame (of the compiled program) and MFU.
    """
    prompt = config.rollout.prompt_frames
    driven_BA = world.actions_of(frames_BTHWC, actions_BT)
    player = world.player(config.rollout)
    player.reset(frames_BTHWC[:, :prompt], driven_BA[:, : prompt - 1], jax.random.key(config.seed))
    rng = np.random.default_rng(config.seed)
    blocks = world.config.dynamics.blocks
    room = blocks.max_frames - prompt if blocks.position == "learned" else config.speed_frames + 1
    times_ms = []
    for _ in range(min(config.speed_frames + 1, room)):
        action_B = rng.integers(0, world.dynamics.num_actions, 1).astype(np.int32)
        began_s = time.perf_counter()
        np.asarray(player.step(action_B))
        times_ms.append((time.perf_counter() - began_s) * 1e3)
    timed_ms = np.asarray(times_ms[1:])
    p50_ms, p95_ms = np.quantile(timed_ms, [0.5, 0.95])
    flops = player.flops_per_frame()
    peak = measured_matmul_flops_per_s(blocks.compute_dtype)
    return {
        "batch": 1,
        "frames": len(timed_ms),
        "decode_steps": config.rollout.decode_steps,
        "frames_per_s": float(1e3 / timed_ms.mean()),
        "p50_ms": float(p50_ms),
        "p95_ms": float(p95_ms),
        "flops_per_frame": flops,
        "measured_matmul_flops_per_s": peak,
        "mfu": flops / (timed_ms.mean() / 1e3) / peak,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def measured_matmul_flops_per_s(dtype: str, repeats: int = 3) -> float:
    """Rate of a large square matmul on the default device: the ceiling that MFU is measured against here."""
    a = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), jnp.dtype(dtype))
    multiply = jax.jit(lambda x: x @ x)
    multiply(a).block_until_ready()
    best_s = float("inf")
    for _ in range(repeats):
        began_s = time.perf_counter()
        multiply(a).block_until_ready()
        best_s = min(best_s, time.perf_counter() - began_s)
    return 2.0 * MATMUL_SIZE**3 / best_s
