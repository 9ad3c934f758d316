"""Whole training steps of the entry on synthetic tokens: time, peak memory, and a breakdown that adds up.

    python scripts/bench step [--preset demo] [--set NAME=VALUE ...] [--steps N]
    python scripts/bench step --preset demo --against FOLDER      # CPU time beside another checkout, A B A B

The first line of the breakdown is the step; the phases below it are consecutive, so their sum is the step. Phases are
timed by CUDA events on a GPU and by the process's CPU clock elsewhere, where the load of the machine hardly shows.

What runs in another checkout is this file alone, with that checkout's entry: it uses nothing of ours but the names that
the entry has had from its first version.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from submissions.jepa_mamba import train_gpt

PHASES: tuple[str, ...] = ("forward", "backward", "gradients", "muon", "adam", "publish", "other")


def configure(options: Mapping[str, Any]) -> Any:
    """The entry's Config with these options. Raises ValueError for options that this version does not have."""
    known = {f.name for f in fields(train_gpt.Config)}
    if set(options) - known:
        raise ValueError(f"this version of the entry has no option {', '.join(sorted(set(options) - known))}")
    return replace(train_gpt.Config(), **options)


def synthetic_batch(config: Any, tokens: int, device: torch.device, seed: int = 0) -> Any:
    """A step's batch of random tokens in documents of about 400; deterministic in the seed."""
    generator = np.random.Generator(np.random.Philox(seed))
    shape = (tokens // config.train_seq_len, config.train_seq_len)
    x_BT, y_BT = (torch.from_numpy(generator.integers(0, config.vocab_size, shape)) for _ in range(2))
    ids_BT = torch.from_numpy((generator.random(shape) < 1 / 400).cumsum(axis=1).astype(np.int32))
    return train_gpt.StepBatch(x_BT.to(device), y_BT.to(device), ids_BT.to(device), {})


class Stopwatch:
    """Times what lies between marks: CUDA events on a GPU, CPU time of this process elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def mark(self, ending: str) -> None:
        """The phase `ending` ends here."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((ending, event))
        else:
            self.marks.append((ending, time.process_time()))

    def phases_ms(self) -> dict[str, float]:
        """Milliseconds of each phase since the first mark; their sum is the time between the first and the last."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        found: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        for (_, before), (ending, after) in zip(self.marks, self.marks[1:], strict=False):
            found[ending] += before.elapsed_time(after) if self.device.type == "cuda" else 1e3 * (after - before)
        self.marks.clear()
        return found


def bracketed(function: Callable, watch: Stopwatch, before: str, inside: str) -> Callable:
    """`function` with a mark on both sides: what ran until the call was `before`, the call is `inside`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        watch.mark(before)
        result = function(*args, **kwargs)
        watch.mark(inside)
        return result

    return call


class StepBench:
    """The entry's trainer with synthetic batches, in a process set up for its device as the entry sets it up."""

    def __init__(self, options: Mapping[str, Any], device: torch.device, tokens: int | None = None) -> None:
        self.config = configure(options)
        self.device = device
        self.tokens = tokens or self.config.train_batch_tokens
        self.config = replace(self.config, train_batch_tokens=self.tokens)
        ranks = self.ranks = train_gpt.join_ranks(device.type, {})
        self.kernels = train_gpt.select_kernels(self.config.kernels, device)
        self.trainer = train_gpt.Trainer(self.config, self.kernels, ranks)
        self.batch = synthetic_batch(self.config, self.tokens, device)
        self.done = 0
        self.trainer.masters.publish(train_gpt.on_grid_at(self.at, self.config))

    @property
    def at(self) -> Any:
        return train_gpt.Progress(self.done, 0.0)

    def step(self) -> dict[str, torch.Tensor]:
        losses = self.trainer.step(self.batch, self.at)
        self.done += 1
        return losses

    def times_ms(self, steps: int) -> list[float]:
        """Milliseconds of each of `steps` steps, undisturbed: device time on a GPU, CPU time elsewhere."""
        watch, times = Stopwatch(self.device), []
        for _ in range(steps):
            watch.mark("other")
            self.step()
            watch.mark("other")
            times.append(sum(watch.phases_ms().values()))
        return times

    def breakdown_ms(self, steps: int) -> dict[str, float]:
        """Medians of the phases of eager steps, scaled so that they add up to the median step; with "step"."""
        trainer, watch, rows = self.trainer, Stopwatch(self.device), []
        kept = trainer.loss, trainer.masters.accumulate_gradients, trainer.masters.publish
        steppers = {kind: optimizer.step for kind, optimizer in trainer.optimizers.items()}
        trainer.loss = bracketed(trainer.loss, watch, "other", "forward")
        trainer.masters.accumulate_gradients = bracketed(kept[1], watch, "backward", "gradients")
        trainer.masters.publish = bracketed(kept[2], watch, "other", "publish")
        for kind, optimizer in trainer.optimizers.items():
            optimizer.step = bracketed(steppers[kind], watch, "other", "muon" if kind == "muon" else "adam")
        try:
            for _ in range(steps):
                watch.mark("other")
                self.step()
                watch.mark("other")
                rows.append(watch.phases_ms())
        finally:
            trainer.loss, trainer.masters.accumulate_gradients, trainer.masters.publish = kept
            for kind, optimizer in trainer.optimizers.items():
                optimizer.step = steppers[kind]
        total = statistics.median(sum(row.values()) for row in rows)
        parts = {phase: statistics.median(row[phase] for row in rows) for phase in PHASES}
        scale = total / max(sum(parts.values()), 1e-9)
        return {"step": total} | {phase: value * scale for phase, value in parts.items()}


def operations_ms(bench: StepBench, steps: int, top: int = 25) -> list[dict[str, Any]]:
    """Where the step's time goes by kernel (GPU) or operator (CPU), largest first; a last row holds the rest.

    On a GPU the rest is also the time in which no kernel ran. The sum of all rows is the median undisturbed step.
    """
    cuda = bench.device.type == "cuda"
    step_ms = statistics.median(bench.times_ms(steps))
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(steps):
            bench.step()
        if cuda:
            torch.cuda.synchronize()
    rows = []
    for event in profile.key_averages():
        self_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        rows.append({"name": event.key, "ms": self_us / 1e3 / steps, "calls": event.count / steps})
    rows.sort(key=lambda row: -row["ms"])
    rows = rows[:top]
    scale = min(1.0, step_ms / max(sum(row["ms"] for row in rows), 1e-9))  # the profiler slows small operators
    rows = [row | {"ms": row["ms"] * scale} for row in rows]
    rest_ms = step_ms - sum(row["ms"] for row in rows)
    return [*rows, {"name": "rest and idle" if cuda else "rest", "ms": rest_ms, "calls": 0.0}]


def matmul_flops(options: Mapping[str, Any], tokens: int) -> int:
    """FLOPs of the matrix products of one step in its plain form, counted on tensors without values.

    One window is counted, times the windows of the step; Newton-Schulz is added once, as on one GPU.
    """
    config = configure(options)
    shape = (1, config.train_seq_len)
    kernels = train_gpt.select_kernels("torch", torch.device("cpu"))
    with torch.device("meta"):
        model = train_gpt.TrainingModel(config, kernels)
        x_BT, y_BT = (torch.empty(shape, dtype=torch.int64) for _ in range(2))
        ids_BT = torch.empty(shape, dtype=torch.int32) if config.document_reset else None
        count = min(config.sigreg_timesteps or shape[1], shape[1])
        positions = torch.zeros(count, dtype=torch.int64) if config.sigreg_mode == "timestep" else None

    def in_place(_: Sequence[int], left: Sequence[int], right: Sequence[int], **__: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        loss, _ = model(x_BT, y_BT, ids_BT, config.sigreg_lambda or None, positions)
        loss.backward()
    newton_schulz = 0
    for name, parameter in model.named_parameters():
        if train_gpt.optimizer_group(name, parameter) == "muon":
            short, long = sorted(parameter.shape)
            newton_schulz += config.muon_backend_steps * (4 * short * short * long + 2 * short**3)
    return counter.get_total_flops() * (tokens // config.train_seq_len) + newton_schulz


def serve() -> None:
    """Worker: one JSON line of options on standard input, then a number of steps a line; answers with times."""
    options = json.loads(sys.stdin.readline())
    torch.set_num_threads(int(options.pop("threads")))
    bench = StepBench(options, torch.device("cpu"))
    first = bench.step()
    said = {"loss": float(first["loss"]), "norm": float(first["grad_norm"])}
    print(json.dumps(said | {"tuning": getattr(bench.ranks, "tuning", "none")}), flush=True)
    for line in sys.stdin:
        print(json.dumps(bench.times_ms(int(line))), flush=True)


class Worker:
    """`serve` in a process that imports the entry of a given checkout."""

    def __init__(self, root: Path, options: Mapping[str, Any]) -> None:
        code = "import runpy, sys; sys.path[0] = sys.argv[1]; runpy.run_path(sys.argv[2])['serve']()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(root), str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=root,
            env=os.environ | {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
            text=True,
        )
        self.first = self.ask(json.dumps(options))

    def ask(self, line: str) -> Any:
        """Send a line, wait for the answer. Raises RuntimeError if the worker died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the worker ended with status {self.process.wait()}; its message is above")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(
    ours: Path, theirs: Path, options: Mapping[str, Any], rounds: int, steps: int, threads: int
) -> dict[str, Any]:
    """CPU milliseconds a step of two checkouts, alternating, with the same options, seed and tokens."""
    from common.cpu import processor_name  # not at the head of the file: old checkouts, in which it runs, lack it

    sides = {"ours": Worker(ours, {**options, "threads": threads})}
    try:
        sides["theirs"] = Worker(theirs, {**options, "threads": threads})
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(rounds):
            for side, worker in sides.items():
                times[side] += worker.ask(str(steps))
    finally:
        for worker in sides.values():
            worker.close()
    medians = {side: statistics.median(values) for side, values in times.items()}
    return {
        "machine": {"cpu": processor_name(), "cores": os.cpu_count(), "torch": torch.__version__},
        "cpu_ms": medians,
        "ratio": medians["ours"] / medians["theirs"],
        "quartiles_ms": {side: statistics.quantiles(values, n=4) for side, values in times.items()},
        "first_step": {side: worker.first for side, worker in sides.items()},
        "rounds": rounds,
        "steps": steps,
        "threads": threads,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(
        "python scripts/bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo", help="of the entry (default %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="options of the entry")
    parser.add_argument("--against", type=Path, help="another checkout, whose CPU time stands beside ours")
    parser.add_argument("--rounds", type=int, default=5, help="alternations with --against")
    parser.add_argument("--steps", type=int, default=5, help="steps of one timing")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch on a CPU (default %(default)s)")
    parser.add_argument("--operations", action="store_true", help="also by kernel or operator")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args(argv)
    options: dict[str, Any] = dict(train_gpt.read_preset(arguments.preset))
    for pair in arguments.set:
        name, _, text = pair.partition("=")
        options[name] = train_gpt.parse_value(name, text, "--set")
    if arguments.against is not None:
        here = Path(__file__).resolve().parents[2]
        sizes = (arguments.rounds, arguments.steps, arguments.threads)
        print(json.dumps(compare(here, arguments.against.resolve(), options, *sizes), indent=1))
        return 0
    torch.set_num_threads(arguments.threads)
    bench = StepBench(options, torch.device(arguments.device))
    bench.times_ms(2)
    report: dict[str, Any] = {"tokens": bench.tokens, "kernels": bench.kernels.name}
    report["step_ms"] = statistics.median(bench.times_ms(arguments.steps))
    report["breakdown_ms"] = bench.breakdown_ms(arguments.steps)
    if arguments.operations:
        report["operations"] = operations_ms(bench, arguments.steps)
    print(json.dumps(report, indent=1))
    return 0
