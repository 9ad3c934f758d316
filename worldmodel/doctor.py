"""What a configuration will need: memory and speed of its training step, before any data or run folder exists.

    python -m worldmodel doctor cpu-dynamics
    python -m worldmodel doctor paper-dynamics --batch-size 144 --target h200
    python -m worldmodel doctor cpu-lam --measure-steps 5

The training step and the evaluation report are compiled as training compiles them, and the compiler is asked what they
hold and how much they compute: arguments + temporaries + results that do not take an argument's place. Time is the
floating-point work at the rate of a large matmul of that type plus the bytes touched at the rate of a large copy, both
measured here in seconds or taken from a table.

`--target` predicts another device from a program compiled for this one: fusion, and with it temporaries and bytes,
differ.

Legend: B clips of a batch · T time · H W C pixels · N tokens.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from common.errors import ConfigError
from worldmodel.config import TrainConfig
from worldmodel.evaluate.suite import best_seconds, measured_matmul_flops_per_s
from worldmodel.models.lam import LatentActionModel
from worldmodel.models.tokenizer import Tokenizer
from worldmodel.train.loop import hardware_line, initial_state, make_objective, make_report, make_step
from worldmodel.train.objectives import (
    DynamicsObjective,
    Objective,
)
from worldmodel.train.state import make_mesh, place_batch, state_shardings

COPY_BYTES = 1 << 27
SAMPLE_EVERY_S = 0.002


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at most."""

    name: str
    matmul_flops_per_s: float
    copy_bytes_per_s: float
    """Read and written together."""
    memory_bytes: int | None


# Measured on one H200: a bf16 matmul, a device copy; memory is what its driver offers.
TARGETS = {"h200": Ceilings("h200", 790e12, 4.3e12, 139 << 30)}


def untrained_objective(config: TrainConfig, num_actions: int) -> Objective:
    """The objective of a stage with untrained models in place of those that it would read from run folders."""
    if config.stage != "dynamics":
        return make_objective(config, num_actions)
    lam = None
    if config.dynamics.action_source == "latent-frozen":
        lam = LatentActionModel(config.lam, rngs=nnx.Rngs(0))
    tokenizer = Tokenizer(config.tokenizer, rngs=nnx.Rngs(0))
    return DynamicsObjective(config, tokenizer, num_actions=num_actions, lam=lam)


def random_batch(config: TrainConfig, keys: tuple[str, ...], clips: int, num_actions: int) -> dict[str, np.ndarray]:
    """Arrays of the shapes that a stage's batches have."""
    rng = np.random.default_rng(0)
    frame = {"lam": config.lam.frame, "jepa": config.jepa.frame}.get(config.stage, config.tokenizer.frame)
    lead = (clips, config.seq_len)
    arrays = {
        "frames_BTHWC": lambda: rng.integers(
            0, 256, (*lead, frame.height, frame.width, frame.channels), dtype=np.uint8
        ),
        "actions_BT": lambda: rng.integers(0, num_actions, lead, dtype=np.int32),
        "tokens_BTN": lambda: rng.integers(
            0, max(config.tokenizer.quantizer.codes, 1), (*lead, frame.tokens), dtype=np.int32
        ),
    }
    return {name: arrays[name]() for name in keys}


def held_bytes(compiled: Any) -> int:
    """What a compiled program holds at once, as its compiler counts it."""
    found = compiled.memory_analysis()
    return int(
        found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    )


def measured_copy_bytes_per_s(repeats: int = 5) -> float:
    """Rate of a large copy on the default device, bytes read and written together."""
    x = jnp.zeros(COPY_BYTES // 4, jnp.float32)
    copy = jax.jit(lambda a: a + 1.0)
    return 2.0 * COPY_BYTES / best_seconds(lambda: copy(x), repeats)


def ceilings_here(dtype: str) -> Ceilings:
    """Those of the default device, measured."""
    stats = jax.local_devices()[0].memory_stats() or {}
    memory = int(stats.get("bytes_limit", 0)) or None
    if memory is None and jax.default_backend() == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Ceilings(hardware_line(), measured_matmul_flops_per_s(dtype), measured_copy_bytes_per_s(), memory)


class _Peak:
    """The most that was held while the block ran: device memory where the device tells, else this process's growth."""

    def __enter__(self) -> _Peak:
        self.on_device = "bytes_in_use" in (jax.local_devices()[0].memory_stats() or {})
        gc.collect()
        if not self.on_device and sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what compiling left behind must not hide what the steps take
        self._base = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self._now())

    @property
    def grown_bytes(self) -> int:
        """Peak less what was held before."""
        return self.peak - self._base

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            self.peak = max(self.peak, self._now())

    def _now(self) -> int:
        if self.on_device:
            return int((jax.local_devices()[0].memory_stats() or {})["bytes_in_use"])
        statm = Path("/proc/self/statm")
        if not statm.exists():
            raise ConfigError("memory of a process on the CPU is measured through /proc, which is not here; leave out "
                              "--measure-steps")  # fmt: skip
        return int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def examine(
    config: TrainConfig,
    *,
    num_actions: int = 15,
    target: Literal["here", "h200"] = "here",
    measure_steps: int = 0,
) -> dict[str, Any]:
    """Predict what training a configuration takes, and measure it when asked.

    Args:
        config: of a stage; its paths are not read.
        num_actions: of the data set.
        target: the default device, or a device of the table.
        measure_steps: training steps, of random frames, to measure on the default device; 0 measures none.

    Returns:
        JSON-ready: parameters, memory of the step, of the report and of the larger (bytes), FLOPs and bytes touched a
        step, the ceilings used, predicted seconds a step, frames/s and hours for all steps, whether it fits; `measured`
        holds the same of the real steps, or is null.

    Raises:
        ConfigError: the mesh needs more devices than there are, or memory cannot be measured here.
    """
    if measure_steps < 0 or num_actions < 1:
        raise ConfigError(f"measure_steps {measure_steps}: expected at least 0; num_actions {num_actions}: at least 1")
    objective = untrained_objective(config, num_actions)
    mesh = make_mesh(config.mesh)
    functional, state = initial_state(config, objective, None)
    shardings = state_shardings(state, mesh)
    batch = random_batch(config, objective.batch_keys, config.batch_size, num_actions)
    report_keys = tuple(dict.fromkeys([*(key for key in objective.batch_keys if key != "tokens_BTN"), "frames_BTHWC"]))
    report_batch = random_batch(config, report_keys, config.eval_clips // mesh.size * mesh.size, num_actions)

    def shapes(tree: Any, where: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)

    def batch_shapes(arrays: dict[str, np.ndarray]) -> Any:
        placed = place_batch({name: value[: mesh.size] for name, value in arrays.items()}, mesh)
        return {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=placed[name].sharding)
            for name, value in arrays.items()
        }

    frozen_shapes = shapes(objective.frozen, state_shardings(objective.frozen, mesh))
    state_shapes = shapes(state, shardings)
    step = make_step(config, objective, functional, mesh, state)
    compiled = step.lower(state_shapes, frozen_shapes, batch_shapes(batch)).compile()  # pyright: ignore
    report = make_report(config, objective, functional)
    compiled_report = report.lower(state_shapes, frozen_shapes, batch_shapes(report_batch)).compile()  # pyright: ignore
    costs = compiled.cost_analysis() or {}
    flops, touched = float(costs.get("flops", 0.0)), float(costs.get("bytes accessed", 0.0))
    dtype = config.dynamics.blocks.compute_dtype if config.stage == "dynamics" else "float32"
    ceilings = ceilings_here(dtype) if target == "here" else TARGETS[target]
    step_s = flops / ceilings.matmul_flops_per_s + touched / ceilings.copy_bytes_per_s
    frames = config.batch_size * config.seq_len
    memory = {"step": held_bytes(compiled), "report": held_bytes(compiled_report)}
    peak = max(memory.values())
    document: dict[str, Any] = {
        "stage": config.stage,
        "compiled_for": hardware_line(),
        "target": target,
        "parameters": sum(x.size for x in jax.tree.leaves(state["params"])),
        "memory_bytes": {**memory, "peak": peak, "of": ceilings.memory_bytes},
        "fits": None if ceilings.memory_bytes is None else peak <= ceilings.memory_bytes,
        "flops_per_step": flops,
        "bytes_touched_per_step": touched,
        "ceilings": dataclasses.asdict(ceilings),
        "seconds_per_step": step_s,
        "frames_per_s": frames / step_s,
        "hours_for_all_steps": config.steps * step_s / 3600,
        "measured": None,
    }
    if measure_steps:
        frozen = jax.device_put(objective.frozen, state_shardings(objective.frozen, mesh))
        arguments = (jax.device_put(state, shardings), frozen, place_batch(batch, mesh))
        del state, batch
        document["measured"] = _measure(compiled, config, *arguments, measure_steps)
    return document


def _measure(
    compiled: Any, config: TrainConfig, state: Any, frozen: Any, batch: dict[str, jax.Array], steps: int
) -> dict[str, Any]:
    """Run the compiled step, watching memory; the first step's time does not count.

    What is held is the arguments, of known size, and what the process or device grows by while the steps run.
    """
    times_s = []
    arguments_bytes = sum(x.nbytes for x in jax.tree.leaves((state, frozen, batch)))
    with _Peak() as peak:
        for _ in range(steps + 1):
            began_s = time.perf_counter()
            state, scalars = compiled(state, frozen, batch)
            jax.block_until_ready(scalars)
            times_s.append(time.perf_counter() - began_s)
    step_s = float(np.median(times_s[1:]))
    return {
        "steps": steps,
        "memory_bytes": arguments_bytes + peak.grown_bytes,
        "memory_is_of": "device" if peak.on_device else "arguments, and the process's growth in these steps",
        "seconds_per_step": step_s,
        "frames_per_s": config.batch_size * config.seq_len / step_s,
    }


def lines_of(document: dict[str, Any]) -> list[str]:
    """The document for people."""
    memory, ceilings = document["memory_bytes"], document["ceilings"]
    size = "unknown" if memory["of"] is None else f"{memory['of'] / 1e9:.1f} GB"
    fit = {None: "", True: ": fits", False: ": DOES NOT FIT"}[document["fits"]]
    lines = [
        f"stage {document['stage']}, {document['parameters'] / 1e6:.2f} M parameters, compiled for "
        f"{document['compiled_for']}",
        f"memory     step {memory['step'] / 1e9:.2f} GB, evaluation report {memory['report'] / 1e9:.2f} GB, of "
        f"{size}{fit}",
        f"work       {document['flops_per_step'] / 1e9:.2f} GFLOP and "
        f"{document['bytes_touched_per_step'] / 1e9:.2f} GB touched a step",
        f"ceilings   {ceilings['name']}: matmul {ceilings['matmul_flops_per_s'] / 1e9:,.1f} GFLOP/s, copy "
        f"{ceilings['copy_bytes_per_s'] / 1e9:,.1f} GB/s",
        f"predicted  {1e3 * document['seconds_per_step']:.2f} ms a step, {document['frames_per_s']:,.0f} frames/s, "
        f"{document['hours_for_all_steps']:.2f} h for all steps",
    ]
    if document["measured"]:
        measured = document["measured"]
        lines.append(
            f"measured   {1e3 * measured['seconds_per_step']:.2f} ms a step, {measured['frames_per_s']:,.0f} "
            f"frames/s, {measured['memory_bytes'] / 1e9:.2f} GB over {measured['steps']} steps "
            f"({measured['memory_is_of']})"
        )
    return lines
