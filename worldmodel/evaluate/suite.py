"""The evaluation of a world on a fixed clip set, as one JSON document with bootstrap intervals.

Legend: S clips · B clips of a batch · T time · F future frames · A transitions · H W C frame · N tokens.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.console import peak_memory_bytes
from common.errors import ConfigError
from worldmodel.config import EvaluateConfig, to_dict
from worldmodel.data.records import EpisodeSet, open_dataset
from worldmodel.data.states import known_states
from worldmodel.evaluate.action_map import score_action_map
from worldmodel.evaluate.frechet import clip_features, frechet_entries
from worldmodel.evaluate.metrics import frame_mse, frame_ssim, mean_entry, psnr_difference_entry, psnr_entry
from worldmodel.evaluate.reader import Reader, fidelity_entries, has_train_split, state_entries, trained_reader
from worldmodel.models.layers import frames_to_unit
from worldmodel.rollout.world import World

MATMUL_SIZE = 2048


def fixed_clips(data_dir: str, config: EvaluateConfig) -> dict[str, Any]:
    """The clips of an evaluation: the same for the same data, split, number, length and seed.

    Where the game tells its state, `state_BTK` holds it and `state_groups` says which columns belong together.
    """
    dataset = open_dataset(data_dir, config.split)
    seq_len = config.rollout.prompt_frames + config.rollout.horizon
    count = min(config.clips, dataset.require_windows(seq_len))
    clips = dataset.fixed_windows(count, seq_len, seed=config.seed)
    states = known_states(dataset, clips["windows_B"], seq_len) if isinstance(dataset, EpisodeSet) else None
    known = {} if states is None else {"state_BTK": states.values_BTK, "state_groups": states.groups}
    return {**clips, **known, "data_sha256": np.asarray(dataset.content_sha256)}


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
        recorded; action fidelity and state error, where the data has no training split, no actions or no known state.
    """
    clips = fixed_clips(data_dir, config)
    frames_STHWC, actions_ST = clips["frames_BTHWC"], clips["actions_BT"]
    count, prompt, horizon = len(frames_STHWC), config.rollout.prompt_frames, config.rollout.horizon
    if count < 2:
        raise ConfigError(f"{data_dir} split {config.split} gives {count} clips; intervals need at least 2")
    rng = np.random.default_rng(config.seed)
    reader = reader_of(data_dir, config) if config.reader_steps else None
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
        if reader is not None:
            for name, future_frames in (("dream", dream), ("true_frames", truth[:, prompt:])):
                # One frame before the prompt's last lets the reader see speed, where there is one.
                around = jnp.concatenate([truth[:, max(prompt - 2, 0) : prompt], future_frames], axis=1)
                seen = reader.read(around)
                add(f"read_actions_{name}", seen[0][:valid, -horizon:])
                add(f"read_states_{name}", seen[1][:valid, -horizon:])
        if config.frechet_samples:
            for name, shown_frames in (("real", truth), ("dream", dream), ("tokenizer_oracle", rebuilt)):
                add(f"features_{name}", clip_features(shown_frames[:, -horizon:])[:valid])
        add("actions", driven[:valid])
        add("recorded", actions_ST[index][:valid, :-1])
    data = {name: np.concatenate(parts) for name, parts in collected.items()}
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
        "frechet_random_features": frechet(data, config) if config.frechet_samples else None,
        **readings(data, clips, reader, config),
        "batch_rollout_frames_per_s": (
            (count - min(config.batch_size, count)) * horizon / rollout_s if rollout_s else None
        ),
        "speed": measure_speed(world, frames_STHWC[:1], actions_ST[:1], config),
    }  # fmt: skip


def reader_of(data_dir: str, config: EvaluateConfig) -> Reader | None:
    """The reader of a data set's games, or None where it has no training split to learn from."""
    if not has_train_split(data_dir):
        return None
    return trained_reader(data_dir, open_dataset(data_dir, "train").content_sha256, config.reader_steps, config.seed)


def frechet(data: dict[str, np.ndarray], config: EvaluateConfig) -> dict[str, Any] | None:
    """Distances of dreamed and of reconstructed futures from real ones. See `frechet_entries`."""
    others = {name: data[f"features_{name}"] for name in ("dream", "tokenizer_oracle")}
    return frechet_entries(data["features_real"], others, samples=config.frechet_samples, seed=config.seed)


def readings(
    data: dict[str, np.ndarray], clips: dict[str, Any], reader: Reader | None, config: EvaluateConfig
) -> dict[str, Any]:
    """Action fidelity and state error, each null where it cannot be told."""
    if reader is None:
        return {"action_fidelity": None, "state_error": None}
    boot = {"samples": config.bootstrap_samples, "seed": config.seed}
    prompt = config.rollout.prompt_frames
    names = ("dream", "true_frames")
    seen = {name: data[f"read_actions_{name}"] for name in names}
    fidelity = fidelity_entries(seen, data["recorded"][:, prompt - 1 :], config.horizons, **boot)
    error = None
    if "state_BTK" in clips and reader.state_groups:
        read = {name: data[f"read_states_{name}"] for name in names}
        error = state_entries(read, clips["state_BTK"], prompt, reader.state_groups, config.horizons, **boot)
    return {"reader_steps": reader.steps, "action_fidelity": fidelity, "state_error": error}


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
        frames/s, p50 and p95 ms a frame, FLOPs a frame (of the compiled program), MFU, bytes that the dynamics
        remembers, the most memory held so far (of the device where it says so, else of this process).
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
        "remembered_bytes": player.memory_bytes,
        "peak_memory_bytes": int((jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))
        or peak_memory_bytes(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def best_seconds(call: Callable[[], Array], repeats: int) -> float:
    """Shortest of `repeats` calls until their result is there, after one that compiles."""
    call().block_until_ready()
    best_s = float("inf")
    for _ in range(repeats):
        began_s = time.perf_counter()
        call().block_until_ready()
        best_s = min(best_s, time.perf_counter() - began_s)
    return best_s


def measured_matmul_flops_per_s(dtype: str, repeats: int = 3) -> float:
    """Rate of a large square matmul on the default device: the ceiling that MFU is measured against here."""
    a = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), jnp.dtype(dtype))
    multiply = jax.jit(lambda x: x @ x)
    return 2.0 * MATMUL_SIZE**3 / best_seconds(lambda: multiply(a), repeats)
