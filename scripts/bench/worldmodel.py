"""Measure the world model on this machine: data, training steps, sampling.

    python scripts/bench worldmodel [--parts data train sample] [--json benchmarks/NAME.json]

Takes about three minutes on two cores, most of it compilation. CPU time is the sum over threads, so that a busy machine
can be told from a slow program; timings are medians.

Data: the options of the game are those of procgen by default (hard, with backgrounds) and actions are random, as in
the published case study; windows of 16 frames in batches of 36 are drawn from all windows. All frames are kept. The
start of procgen (loading of its images) is left out.

Training: the published models and mathematics (VQ-VAE tokenizer, latent action model, MaskGIT dynamics with all frames
masked and co-trained latent actions, AdamW, float32) at the sizes of the flags, on random pixels. `dynamics-two-stream`
is our default masking, which runs each clip twice through the blocks.

Sampling: frames dreamed after a prompt of one frame, tokenizer included. `decode_steps` is what was asked for; no more
passes are run than a frame has tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from common.files import write_atomically
from worldmodel.config import (
    BlockConfig,
    DynamicsConfig,
    FrameConfig,
    LamConfig,
    MeshConfig,
    OptimConfig,
    QuantizerConfig,
    RolloutConfig,
    TokenizerConfig,
    TrainConfig,
)
from worldmodel.data.collect import CollectConfig, run_collect
from worldmodel.data.envs import NUM_ACTIONS, EnvOptions, make_procgen
from worldmodel.data.pipeline import make_loader
from worldmodel.models.tokenizer import Tokenizer
from worldmodel.rollout.world import World
from worldmodel.train.loop import initial_state, make_step
from worldmodel.train.objectives import DynamicsObjective, LamObjective, Objective, TokenizerObjective
from worldmodel.train.state import make_mesh, place_batch, state_shardings

SEQ_LEN = 16
BATCH_SIZE = 36
STAGES = ("tokenizer", "lam", "dynamics", "dynamics-two-stream")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall and CPU seconds of one piece of work."""

    wall_s: float
    cpu_s: float


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of the models and batches that are timed."""

    dim: int = 128
    ffn_dim: int = 512
    heads: int = 8
    layers: int = 1
    patch: int = 16
    codes: int = 1024
    latent_dim: int = 32
    latent_actions: int = 6
    batch_size: int = 8
    seq_len: int = 16

    @property
    def blocks(self) -> BlockConfig:
        """One stack of blocks; its window is the whole clip, as published."""
        return BlockConfig(
            dim=self.dim, ffn_dim=self.ffn_dim, heads=self.heads, layers=self.layers, temporal_window=self.seq_len
        )


def timed(work: Callable[[], Any]) -> Timing:
    """Run `work` once."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def median_ms(timings: list[Timing], per: int) -> dict[str, float]:
    """Medians of repeated timings of `per` equal pieces of work, in milliseconds a piece."""
    return {
        "cpu_ms": 1e3 * statistics.median(t.cpu_s for t in timings) / per,
        "wall_ms": 1e3 * statistics.median(t.wall_s for t in timings) / per,
    }


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


def bench_data(frames: int, batches: int, repeats: int) -> dict[str, Any]:
    """Collection with one worker and with one a core, then loading from what was collected."""
    options = EnvOptions()
    cores = len(os.sched_getaffinity(0))
    report: dict[str, Any] = {
        "env": dataclasses.asdict(options),
        "simulation_alone": bench_simulation(options, 300),
        "collect": [],
        "loader": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for workers in sorted({1, cores}):
            runs = [
                bench_collect(options, Path(folder) / f"{workers}-{repeat}", frames, workers)
                for repeat in range(repeats)
            ]
            report["collect"].append(sorted(runs, key=lambda run: run["kept_frames_per_s"])[len(runs) // 2])
        for num_threads in sorted({0, 1, cores}):
            report["loader"].append(bench_loader(Path(folder) / "1-0", num_threads, batches))
    return report


def stage_config(stage: str, shapes: Shapes) -> TrainConfig:
    """The published form of a stage at these sizes."""
    frame = FrameConfig(patch=shapes.patch)
    codes = QuantizerConfig(codes=shapes.codes, latent_dim=shapes.latent_dim, codebook_dropout=0.01)
    actions = QuantizerConfig(codes=shapes.latent_actions, latent_dim=shapes.latent_dim, dead_after_steps=50)
    return TrainConfig(
        stage="dynamics" if stage.startswith("dynamics") else stage,  # pyright: ignore[reportArgumentType]
        tokenizer=TokenizerConfig(frame=frame, encoder=shapes.blocks, decoder=shapes.blocks, quantizer=codes),
        lam=LamConfig(frame=frame, encoder=shapes.blocks, decoder=shapes.blocks, quantizer=actions),
        dynamics=DynamicsConfig(
            blocks=shapes.blocks,
            action_source="latent",
            masking="current" if stage == "dynamics-two-stream" else "all",
        ),
        optim=OptimConfig(warmup_steps=1000, decay_steps=1000),
        steps=100_000,
        batch_size=shapes.batch_size,
        seq_len=shapes.seq_len,
    )


def random_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """A tokenizer as it is before training."""
    return Tokenizer(config, rngs=nnx.Rngs(params=0))


class TrainBench:
    """The training step of one stage, compiled, with batches already on the device."""

    def __init__(self, stage: str, shapes: Shapes) -> None:
        config = stage_config(stage, shapes)
        objective: Objective
        if config.stage == "tokenizer":
            objective = TokenizerObjective(config)
        elif config.stage == "lam":
            objective = LamObjective(config)
        else:
            objective = DynamicsObjective(config, random_tokenizer(config.tokenizer), num_actions=NUM_ACTIONS)
        functional, state = initial_state(config, objective, None)
        mesh = make_mesh(MeshConfig())
        self._state = jax.device_put(state, state_shardings(state, mesh))
        self._frozen = jax.device_put(objective.frozen, state_shardings(objective.frozen, mesh))
        self._step = make_step(config, objective, functional, mesh, self._state)
        rng = np.random.default_rng(0)
        frame = config.tokenizer.frame
        shape = (shapes.batch_size, shapes.seq_len, frame.height, frame.width, frame.channels)
        batch = {
            "frames_BTHWC": rng.integers(0, 256, shape, dtype=np.uint8),
            "actions_BT": rng.integers(0, NUM_ACTIONS, shape[:2], dtype=np.int32),
        }
        self._batch = place_batch({name: batch[name] for name in objective.batch_keys}, mesh)
        self.parameters = sum(x.size for x in jax.tree.leaves(self._state["params"]))

    def run(self, steps: int) -> None:
        """Take steps and wait for the last one."""
        for _ in range(steps):
            self._state, scalars = self._step(self._state, self._frozen, self._batch)
            jax.block_until_ready(scalars)


class SampleBench:
    """Dreaming frames with untrained weights: latent actions, arg-max tokens."""

    def __init__(self, shapes: Shapes, decode_steps: int) -> None:
        config = stage_config("dynamics", shapes)
        tokenizer = random_tokenizer(config.tokenizer)
        frame = config.tokenizer.frame
        dynamics = DynamicsObjective(config, tokenizer, num_actions=NUM_ACTIONS).build(nnx.Rngs(params=1))
        self._world = World(config, tokenizer, dynamics, dynamics.num_actions, source="untrained weights")
        self._config = RolloutConfig(prompt_frames=1, horizon=shapes.seq_len - 1, decode_steps=decode_steps)
        rng = np.random.default_rng(0)
        shape = (shapes.batch_size, shapes.seq_len, frame.height, frame.width, frame.channels)
        self._frames = rng.integers(0, 256, shape, dtype=np.uint8)
        self._actions = rng.integers(0, shapes.latent_actions, (shape[0], shape[1] - 1), dtype=np.int32)
        self.frames = shape[0] * self._config.horizon
        self.passes = min(decode_steps, frame.tokens)

    def run(self, clips: int) -> None:
        """Dream batches of clips one after another."""
        for _ in range(clips):
            key = jax.random.key(0)
            jax.block_until_ready(self._world.frames_after(self._frames, self._actions, self._config, key))


def repeat_ms(work: Callable[[int], None], count: int, repeats: int, per: int) -> dict[str, float]:
    """Compile and warm up, then medians of `repeats` runs of `work(count)`."""
    work(2)
    return median_ms([timed(lambda: work(count)) for _ in range(repeats)], count * per)


def bench_train(shapes: Shapes, stages: Sequence[str], steps: int, repeats: int) -> dict[str, Any]:
    """Milliseconds a training step of each of `stages`."""
    report: dict[str, Any] = {"shapes": dataclasses.asdict(shapes)}
    for stage in stages:
        bench = TrainBench(stage, shapes)
        report[stage] = {"parameters": bench.parameters, **repeat_ms(bench.run, steps, repeats, 1)}
    return report


def bench_sample(shapes: Shapes, decode_steps: int, clips: int, repeats: int) -> dict[str, Any]:
    """Milliseconds a dreamed frame."""
    bench = SampleBench(shapes, decode_steps)
    return {
        "shapes": dataclasses.asdict(shapes),
        "decode_steps": decode_steps,
        "passes": bench.passes,
        **repeat_ms(bench.run, clips, repeats, bench.frames),
    }


def machine() -> dict[str, Any]:
    """Where the figures were taken."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "backend": jax.default_backend(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the wanted measurements and print them as JSON."""
    parser = argparse.ArgumentParser(
        "python scripts/bench worldmodel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("data", "train", "sample")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="what to measure")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="training steps to time")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each kind; their median is reported")
    parser.add_argument("--frames", type=int, default=51_200, help="frames to collect")
    parser.add_argument("--batches", type=int, default=150, help="batches to load for each number of threads")
    parser.add_argument("--steps", type=int, default=10, help="training steps in one timing")
    parser.add_argument("--clips", type=int, default=2, help="batches of clips dreamed in one timing")
    parser.add_argument("--decode-steps", type=int, default=25, help="MaskGIT passes a frame")
    parser.add_argument("--sample-layers", type=int, default=2, help="blocks of the dynamics when sampling")
    parser.add_argument("--sample-batch-size", type=int, default=1, help="clips dreamed side by side")
    for field in dataclasses.fields(Shapes):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=int, default=field.default, help="of the trained models (default %(default)s)")
    parser.add_argument("--json", type=Path, default=None, help="where the figures go as JSON")
    arguments = parser.parse_args(argv)
    shapes = Shapes(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Shapes)})
    report: dict[str, Any] = {"machine": machine(), "load_before": os.getloadavg()[0]}
    if "data" in arguments.parts:
        report["data"] = bench_data(arguments.frames, arguments.batches, arguments.repeats)
    if "train" in arguments.parts:
        report["train"] = bench_train(shapes, arguments.stages, arguments.steps, arguments.repeats)
    if "sample" in arguments.parts:
        sampled = dataclasses.replace(shapes, layers=arguments.sample_layers, batch_size=arguments.sample_batch_size)
        report["sample"] = bench_sample(sampled, arguments.decode_steps, arguments.clips, arguments.repeats)
    report["load_after"] = os.getloadavg()[0]
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.json, (text + "\n").encode())
    return 0
