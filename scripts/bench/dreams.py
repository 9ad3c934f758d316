"""Time and memory of a dreamed frame at batch 1, for every kind of dynamics at a profile's size, untrained weights.

    python scripts/bench dreams                    all variants of `python -m worldmodel ablate`, 1,000 frames of each

Variants take turns, so that a change of the machine's load meets all of them. The memory of a dream is what its layers
remember of the past, in bytes before and after the long dream; beside it the process's resident memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from common.files import write_atomically
from worldmodel.ablate import VARIANTS, changed
from worldmodel.coinrun import load_profile
from worldmodel.config import TrainConfig
from worldmodel.configs.baselines import baselines
from worldmodel.models.tokenizer import Tokenizer
from worldmodel.rollout.world import Player, World
from worldmodel.train.loop import hardware_line
from worldmodel.train.objectives import DynamicsObjective

NUM_ACTIONS = 15
PROMPT = 4


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def untrained_world(config: TrainConfig) -> World:
    """A world of a stage's shape with random weights."""
    config = dataclasses.replace(config, token_dir="")
    tokenizer = Tokenizer(config.tokenizer, rngs=nnx.Rngs(0))
    model = DynamicsObjective(config, tokenizer, num_actions=NUM_ACTIONS).build(nnx.Rngs(1))
    return World(config, tokenizer, model, NUM_ACTIONS, source="untrained weights")


def players(profile_name: str, names: Sequence[str]) -> dict[str, Player]:
    """One player of each variant, after its prompt and one frame, compiled."""
    profile = load_profile(profile_name)
    known = baselines(profile)
    made: dict[str, Player] = {}
    rng = np.random.default_rng(0)
    for name in names:
        variant = VARIANTS[name]
        baseline = known[variant.base]
        world = untrained_world(changed(baseline.train, variant.changes))
        rollout = baseline.rollout or profile.evaluate.rollout
        player = world.player(
            dataclasses.replace(rollout, decode_steps=variant.decode_steps or rollout.decode_steps)
        )
        frame = world.config.tokenizer.frame
        frames = rng.integers(0, 256, (1, PROMPT, frame.height, frame.width, frame.channels), dtype=np.uint8)
        player.reset(frames, np.zeros((1, PROMPT - 1), np.int32), jax.random.key(0))
        np.asarray(player.step(np.zeros(1, np.int32)))
        made[name] = player
    return made


def dream(player: Player, count: int) -> list[float]:
    """Milliseconds of each of `count` frames."""
    times_ms = []
    for index in range(count):
        began_s = time.perf_counter()
        np.asarray(player.step(np.asarray([index % NUM_ACTIONS], np.int32)))
        times_ms.append(1e3 * (time.perf_counter() - began_s))
    return times_ms


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser("python scripts/bench dreams", description=__doc__)
    parser.add_argument("--profile", default="cpu", choices=("cpu", "gpu", "paper"))
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--frames", type=int, default=30, help="of a round")
    parser.add_argument("--long", type=int, default=1000, help="frames of the long dream")
    parser.add_argument("--json", default="", help="file for the result")
    options = parser.parse_args(argv)
    made = players(options.profile, options.variants)
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(options.rounds):
        for name, player in made.items():
            times[name] += dream(player, options.frames)
    result: dict[str, Any] = {"hardware": hardware_line(), "profile": options.profile, "variants": {}}
    head = f"{'variant':>14} {'p50 ms':>8} {'p95 ms':>8} {'late/early':>10}"
    print(f"{head} {'memory kB, before and after':>28} {'RSS +MB':>8}")
    for name, player in made.items():
        held, resident = player.memory_bytes, resident_bytes()
        long_ms = np.asarray(dream(player, options.long))
        tenth = max(1, options.long // 10)
        row = {
            "p50_ms": float(np.median(times[name])), "p95_ms": float(np.quantile(times[name], 0.95)),
            "late_over_early": float(np.median(long_ms[-tenth:]) / np.median(long_ms[:tenth])),
            "memory_bytes": [held, player.memory_bytes], "resident_growth_bytes": resident_bytes() - resident,
        }  # fmt: skip
        result["variants"][name] = row
        print(f"{name:>14} {row['p50_ms']:8.2f} {row['p95_ms']:8.2f} {row['late_over_early']:10.2f} "
              f"{held / 1e3:>13.1f} -> {player.memory_bytes / 1e3:<11.1f} {row['resident_growth_bytes'] / 1e6:8.1f}",
              flush=True)  # fmt: skip
    if options.json:
        write_atomically(Path(options.json), json.dumps(result, indent=1).encode())
    return 0
