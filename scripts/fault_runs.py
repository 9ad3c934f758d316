"""Tiny runs of both learners, started, disturbed and compared by `scripts/faults.py`.

A run takes seconds: its processes are forked from a server that has imported the learner already, so that a campaign
pays for the imports once and not at every restart. Apart from that they are what a user starts: the entry's `main` with
its flags under torchrun's variables, and `worldmodel.train.loop.train` on a data set in the record format, joined under
JAX's variables. Faults of the process itself (a slow disk, a gradient that is not a number, a clock that jumps) are
planted in the child before it begins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import multiprocessing.process
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.text.shards import write_shard

ROOT = Path(__file__).resolve().parents[1]
PRELOAD = {"lm": "submissions.jepa_mamba.train_gpt", "world": "worldmodel.train.loop"}
STEPS = {"lm": 24, "world": 24}
CHECKPOINT_EVERY = {"lm": 4, "world": 6}
SLOW_FSYNC_S = 0.03
CLOCK_JUMP_S = 0.05  # between two settings of a clock that jumps
PEER_GRACE_S = {"lm": 30.0, "world": 60.0}  # for a rank to notice that another one is gone
LM_OPTIONS: dict[str, Any] = {
    "device": "cpu", "kernels": "torch", "tokenizer": "byte", "vocab_size": 256, "model_dim": 32, "num_layers": 3,
    "d_state": 8, "headdim": 16, "embed_dim": 24, "mlp_mult": 2, "chunk_size": 16, "train_seq_len": 32,
    "train_batch_tokens": 256, "micro_batch_tokens": 128, "iterations": STEPS["lm"], "warmup_steps": 1,
    "max_wallclock_seconds": 0.0, "train_log_every": 1, "val_loss_every": 10, "val_batch_size": 256,
    "checkpoint_every": CHECKPOINT_EVERY["lm"], "checkpoint_keep": 2, "temp_calib_tokens": 256, "sigreg_timesteps": 8,
    "ema_decay": 0.9, "ema_start_fraction": 0.2, "eval_modes": "carried", "budget_bytes": 0,
}  # fmt: skip


# ---------------------------------------------------------------- data


def make_lm_data(folder: Path) -> Path:
    """Byte shards of random words, 0xFF before each document."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, rng.integers(2, 8))) for _ in range(50)]
    for split, documents in (("train", 120), ("val", 4)):
        texts = [b"\xff" + b" ".join(words[i] for i in rng.zipf(1.5, 40) % 50) for _ in range(documents)]
        tokens_N = np.frombuffer(b"".join(texts), np.uint8).astype(np.uint16)
        write_shard(folder / f"tiny_{split}_000000.bin", tokens_N)
    return folder


def make_world_data(folder: Path) -> Path:
    """Records of a bright square that moves left, stays or moves right by the action taken."""
    from worldmodel.data.records import RecordLayout, RecordWriter, encode_episode, write_manifest

    folder.mkdir(parents=True, exist_ok=True)
    layout = RecordLayout((16, 16, 3), num_actions=3, group_frames=4)
    rng, splits = np.random.default_rng(0), {}
    for split, episodes in (("train", 12), ("val", 3)):
        with RecordWriter(folder / f"{split}-00000.array_record", layout) as writer:
            for _ in range(episodes):
                actions_T, place = rng.integers(0, 3, 16), 0
                frames_THWC = np.zeros((16, 16, 16, 3), np.uint8)
                for t, action in enumerate(actions_T):
                    frames_THWC[t, 4:12, 4 * place : 4 * place + 4] = (255, 128, 0)
                    place = (place + int(action) - 1) % 4
                writer.write(encode_episode(layout, frames_THWC, actions_T))
        assert writer.summary is not None
        splits[split] = {"files": [dataclasses.asdict(writer.summary)]}
    manifest = {
        "kind": "frames", "name": "square", "item_shape": [16, 16, 3], "dtype": "uint8", "group_frames": 4,
        "num_actions": 3, "action_names": ["left", "stay", "right"], "fps": 15.0, "complete": True,
        "source": {"type": "synthetic"}, "splits": splits,
    }  # fmt: skip
    write_manifest(folder, manifest)
    return folder


def lm_arguments(data: Path, run: Path, **changes: Any) -> list[str]:
    """The entry's flags of one tiny run."""
    options = {**LM_OPTIONS, "data_path": data, "runs_dir": run.parent, "run_id": run.name, **changes}
    return [f"--{name}={value}" for name, value in options.items()]


def world_config(data: Path, run: Path, **changes: Any) -> Any:
    """Configuration of one tiny tokenizer run."""
    from worldmodel.config import (
        BlockConfig,
        FrameConfig,
        MeshConfig,
        OptimConfig,
        QuantizerConfig,
        TokenizerConfig,
        TrainConfig,
    )

    blocks = BlockConfig(dim=16, ffn_dim=32, heads=2, layers=1, temporal=False, temporal_window=4)
    codes = QuantizerConfig(codes=16, latent_dim=8, metric="euclidean", kmeans_init=True, dead_after_steps=5)
    tokenizer = TokenizerConfig(FrameConfig(16, 16, 3, patch=8), blocks, blocks, codes, linear_path=True)
    base = TrainConfig(
        stage="tokenizer", run_dir=str(run), data_dir=str(data), tokenizer=tokenizer,
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=2, decay_steps=2, beta2=0.95, ema=0.9), steps=STEPS["world"],
        batch_size=8, seq_len=4, log_every=1, eval_every=12, eval_clips=8, checkpoint_every=CHECKPOINT_EVERY["world"],
        init_clips=8, tensorboard=False, loader_threads=1,
    )  # fmt: skip
    mesh = MeshConfig(**changes.pop("mesh", {}))
    return dataclasses.replace(base, mesh=mesh, **changes)


# ---------------------------------------------------------------- in the child


def plant(learner: str, faults: dict[str, Any]) -> None:
    """Faults of the process itself."""
    if "slow_disk" in faults:
        fsync = os.fsync

        def slow_fsync(handle: int) -> None:
            time.sleep(SLOW_FSYNC_S)
            fsync(handle)

        os.fsync = slow_fsync
    if "clock" in faults:
        real = time.time

        def jumping() -> float:
            rng = random.Random(f"{faults['clock']} {time.monotonic() // CLOCK_JUMP_S}")
            return real() + rng.choice((-1, 1)) * rng.uniform(0, 1e8)

        time.time = jumping
    for name in faults.get("call", ()):
        module, function = name.split(":")
        getattr(importlib.import_module(module), function)()
    if "nan_steps" in faults:
        nan_steps = frozenset(faults["nan_steps"])
        if learner == "lm":
            from submissions.jepa_mamba import train_gpt

            gradients = train_gpt.Trainer.gradients

            def poisoned(self: Any, *arguments: Any) -> Any:
                losses = gradients(self, *arguments)
                if int(self.current["step"]) in nan_steps:
                    self.masters.flat_gradient[7] = float("nan")
                return losses

            train_gpt.Trainer.gradients = poisoned  # pyright: ignore[reportAttributeAccessIssue]
        else:
            from worldmodel.train import loop, objectives

            loss, make_step = objectives.TokenizerObjective.loss, loop.make_step

            def poisoned_loss(self: Any, model: Any, frozen: Any, batch: Any, key: Any) -> Any:
                value, rest = loss(self, model, frozen["frozen"], batch, key)
                return value * frozen["factor"], rest

            def make_poisoned_step(*arguments: Any) -> Any:
                step = make_step(*arguments)

                def poisoned_step(state: Any, frozen: Any, batch: Any) -> Any:
                    factor = np.float32("nan" if int(state["step"]) in nan_steps else 1)
                    return step(state, {"frozen": frozen, "factor": factor}, batch)

                return poisoned_step

            objectives.TokenizerObjective.loss = poisoned_loss
            loop.make_step = make_poisoned_step


def child(learner: str, data: str, run: str, changes: dict, environ: dict, log: str, faults: dict) -> None:
    """One process of a run, with its output in a file. Exits as the learner's command would."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environ)
    plant(learner, faults)
    if learner == "lm":
        from submissions.jepa_mamba.train_gpt import main

        sys.exit(main(lm_arguments(Path(data), Path(run), **changes)))
    from common.console import TrainingConsole
    from common.errors import GolfError
    from worldmodel.train.loop import train
    from worldmodel.train.processes import joined

    try:
        with joined(os.environ) as speaks:
            train(world_config(Path(data), Path(run), **changes), console=TrainingConsole(speaks))
    except GolfError as error:  # as worldmodel.cli does
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------- in the harness


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclasses.dataclass
class Ended:
    """How the processes of an attempt ended."""

    codes: list[int]
    output: str
    seconds: float
    first_step_s: float | None  # from the start to the first step that was logged


class Attempt:
    """The processes of one start of a run."""

    def __init__(self, learner: Learner, run: Path, changes: dict[str, Any], faults: dict[str, Any]) -> None:
        self.learner, self.run = learner, run
        self.log = learner.scratch / f"{run.name}.out"  # not beside the run, whose disk may be full
        self.log.write_bytes(b"")
        self.started_s = time.monotonic()
        self.first_step_s: float | None = None
        if learner.name == "world":
            changes = {"mesh": {"data": learner.processes * learner.devices}, **changes}
        port = free_port()
        self.processes: list[multiprocessing.process.BaseProcess] = []
        for rank in range(learner.processes):
            environ = learner.environ(rank, port)
            arguments = (learner.name, str(learner.data), str(run), changes, environ, str(self.log), faults)
            process = learner.context.Process(target=child, args=arguments)  # pyright: ignore[reportAttributeAccessIssue]
            process.start()
            self.processes.append(process)

    def look(self) -> bool:
        """Whether a process still runs; notes the first logged step on the way."""
        if self.first_step_s is None and b"\nstep " in b"\n" + self.log.read_bytes():
            self.first_step_s = time.monotonic() - self.started_s
        return any(process.is_alive() for process in self.processes)

    def wait_s(self, seconds: float) -> bool:
        """Let it run for a time; False if it ended."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            if not self.look():
                return False
            time.sleep(max(0.0, min(0.01, until_s - time.monotonic())))
        return self.look()

    def wait_for(self, condition: Any) -> bool:
        """Let it run until a condition holds; False if it ended first."""
        while not condition():
            if not self.look():
                return condition()
            time.sleep(0.002)
        return True

    def send(self, number: int, ranks: Sequence[int]) -> None:
        for rank in ranks:
            if self.processes[rank].is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.processes[rank].pid or 0, number)

    def end(self, grace_s: float | None = None) -> Ended:
        """Wait for the end; after a grace period (torchrun's part) what still runs is killed."""
        until_s = time.monotonic() + grace_s if grace_s is not None else float("inf")
        while self.look():
            if time.monotonic() > until_s:
                self.send(signal.SIGKILL, range(len(self.processes)))
            time.sleep(0.01)
        for process in self.processes:
            process.join()
        self.look()
        codes = [int(process.exitcode or 0) for process in self.processes]
        output = self.log.read_text(encoding="utf-8", errors="replace")
        return Ended(codes, output, time.monotonic() - self.started_s, self.first_step_s)


class Learner:
    """One learner with its tiny data, ready to be started again and again."""

    def __init__(self, name: str, scratch: Path) -> None:
        self.name = name
        self.processes, self.devices = 2, 1
        self.scratch = scratch / name
        self.data = (make_lm_data if name == "lm" else make_world_data)(self.scratch / "data")
        os.environ.update({"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)})
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(self.scratch / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*PRELOAD.values()])

    def environ(self, rank: int, port: int) -> dict[str, str]:
        """What torchrun, or a launcher of JAX's processes, tells one of them; alone, it is told nothing."""
        count, index = str(self.processes), str(rank)
        own = {}
        if self.name == "world":  # optimized code would cost a minute of compilation and save nothing in so few steps
            devices = f"--xla_force_host_platform_device_count={self.devices}"
            own = {"XLA_FLAGS": f"--xla_backend_optimization_level=0 {devices}"}
        if self.processes == 1:
            return own
        if self.name == "world":
            address = f"127.0.0.1:{port}"
            return {**own, "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": index}
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": count}
        return {**rendezvous, "RANK": index, "LOCAL_RANK": index}

    def start(self, run: Path, changes: dict[str, Any] | None = None, faults: dict[str, Any] | None = None) -> Attempt:
        return Attempt(self, run, changes or {}, faults or {})

    def checkpoints(self, run: Path) -> list[Path]:
        """Finished checkpoints, oldest first."""
        folder = run / "checkpoints"
        if self.name == "lm":
            return sorted(folder.glob("step_*.safetensors"))
        return sorted((p for p in folder.glob("*") if p.name.isdigit()), key=lambda p: int(p.name))

    def is_writing(self, run: Path) -> bool:
        """Whether a checkpoint is being written, or was when everything stopped."""
        with contextlib.suppress(FileNotFoundError):
            return any(".tmp" in p.name or "orbax-checkpoint-tmp" in p.name for p in (run / "checkpoints").iterdir())
        return False

    def finished(self, run: Path) -> bool:
        return (run / "summary.json").exists()

    def result(self, run: Path) -> dict[str, bytes]:
        """What a finished run is, bit for bit: named parts whose bytes must be those of the undisturbed run."""
        events = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        timed = ("elapsed_s", "tokens_per_s", "frames_per_s", "cpu_ms_per_step", "eta_s", "memory_bytes")
        log = [{key: value for key, value in event.items() if key not in timed} for event in events]
        parts = {"log.jsonl": json.dumps(log).encode()}
        newest = self.checkpoints(run)[-1]
        if self.name == "lm":
            from submissions.jepa_mamba.train_gpt import read_checkpoint

            _, tensors = read_checkpoint(newest)
            parts |= {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}
            parts["model.artifact"] = (run / "model.artifact").read_bytes()
        else:
            import jax
            import orbax.checkpoint as ocp

            checkpointer, path = ocp.PyTreeCheckpointer(), (newest / "state").resolve()
            # As NumPy: the devices of the processes that wrote it are not all here.
            saved = checkpointer.metadata(path).item_metadata
            assert saved is not None, path
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved.tree)
            state = checkpointer.restore(path, restore_args=as_numpy)
            leaves = jax.tree_util.tree_leaves_with_path(state)
            parts |= {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
        return dict(sorted(parts.items()))


def differing_bytes(a: dict[str, bytes], b: dict[str, bytes]) -> int:
    """Bytes of `a` that `b` lacks or has otherwise; 0 only if the two are equal."""
    lost = sum(len(a.get(name, b"")) or len(b[name]) for name in a.keys() ^ b.keys() if name in a or name in b)
    for name in a.keys() & b.keys():
        if a[name] != b[name]:
            if len(a[name]) != len(b[name]):
                lost += max(len(a[name]), len(b[name]))
            else:
                lost += int((np.frombuffer(a[name], np.uint8) != np.frombuffer(b[name], np.uint8)).sum())
    return lost


def digest_of(parts: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name, value in parts.items():
        digest.update(f"{name} {len(value)}\n".encode() + value)
    return digest.hexdigest()
