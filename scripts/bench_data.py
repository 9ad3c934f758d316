"""Measure the world model's data path on this machine: collection from CoinRun, size on disk, loading through Grain.

    python scripts/bench_data.py [--frames 51200] [--json benchmarks/data.json]

Takes about half a minute. The options of the game are procgen's defaults (hard, with backgrounds) and actions are
random, as in the published case study; windows of 16 frames in batches of 36 are drawn from all windows. All frames are
kept. The start of procgen (loading of its images) is left out. CPU time is the sum over threads, so that a busy machine
can be told from a slow program.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from worldmodel.data.collect import CollectConfig, run_collect
from worldmodel.data.envs import NUM_ACTIONS, EnvOptions, make_procgen
from worldmodel.data.pipeline import make_loader

SEQ_LEN = 16
BATCH_SIZE = 36


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall and CPU seconds of one piece of work."""

    wall_s: float
    cpu_s: float


def timed(work: Callable[[], Any]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def bench_simulation(options: EnvOptions, steps: int) -> dict[str, float]:
    """The floor under collection: the game alone, one thread, frames thrown away."""
    env = make_procgen(options, num_envs=16, start_level=0, num_levels=500, rand_seed=0)
    rng = np.random.default_rng(0)

    def play() -> None:
        for _ in range(steps):
            env.observe()
            env.act(rng.integers(0, NUM_ACTIONS, 16, dtype=np.int32))

    play()
    timing = timed(play)
    env.close()
    frames = 16 * steps
    return {"frames_per_s": frames / timing.wall_s, "cpu_us_per_frame": 1e6 * timing.cpu_s / frames}


def bench_collect(options: EnvOptions, folder: Path, frames: int, workers: int) -> dict[str, float]:
    """Collect a training split of `frames` frames in four shards."""
    config = CollectConfig(
        out_dir=folder,
        env=options,
        policy="random",
        train_frames=frames,
        val_frames=0,
        test_frames=0,
        shard_steps=max(1, frames // 16 // 4),
        workers=workers,
        quiet=True,
    )
    manifests: list[dict[str, Any]] = []
    timing = timed(lambda: manifests.append(run_collect(config)))
    split = manifests[0]["splits"]["train"]
    return {
        "workers": workers,
        "frames": split["frames"],
        "episodes": split["episodes"],
        "kept_frames_per_s": split["frames"] / timing.wall_s,
        "cpu_us_per_frame": 1e6 * timing.cpu_s / split["frames"],
        "bytes_per_frame": split["bytes"] / split["frames"],
    }


def bench_loader(folder: Path, num_threads: int, batches: int) -> dict[str, float]:
    """Draw batches for training from a collected set."""
    loader = make_loader(
        folder,
        split="train",
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        seed=0,
        num_threads=num_threads,
        prefetch_batches=4,
    )
    for _ in range(10):
        next(loader)

    def load() -> None:
        for _ in range(batches):
            next(loader)

    timing = timed(load)
    loader.close()
    samples = BATCH_SIZE * batches
    return {
        "threads": num_threads,
        "samples_per_s": samples / timing.wall_s,
        "cpu_us_per_sample": 1e6 * timing.cpu_s / samples,
    }


def main() -> None:
    """Run all measurements and print them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=51_200, help="frames to collect")
    parser.add_argument("--batches", type=int, default=150, help="batches to load for each number of threads")
    parser.add_argument("--repeats", type=int, default=2, help="collections to make; the fastest is reported")
    parser.add_argument("--json", type=Path, default=None, help="where the figures go as JSON")
    arguments = parser.parse_args()
    options = EnvOptions()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        report: dict[str, Any] = {
            "machine": {"cores": cores, "processor": platform.processor() or platform.machine()},
            "load_before": os.getloadavg()[0],
            "env": dataclasses.asdict(options),
            "simulation_alone": bench_simulation(options, 300),
            "collect": [],
            "loader": [],
        }
        for workers in sorted({1, cores}):
            runs = [
                bench_collect(options, Path(folder) / f"{workers}-{repeat}", arguments.frames, workers)
                for repeat in range(arguments.repeats)
            ]
            report["collect"].append(max(runs, key=lambda run: run["kept_frames_per_s"]))
        for num_threads in sorted({0, 1, cores}):
            report["loader"].append(bench_loader(Path(folder) / "1-0", num_threads, arguments.batches))
    report["load_after"] = os.getloadavg()[0]
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
