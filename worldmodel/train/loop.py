"""The training loop, for every stage: build or resume, step, log, evaluate, checkpoint, stop cleanly.

Legend: B batch · T time.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from common.console import TrainingConsole, peak_memory_bytes
from common.errors import ConfigError, DataError, TrainingError
from common.files import write_atomically
from worldmodel.config import TrainConfig, resume_differences, to_dict
from worldmodel.data.pipeline import make_loader
from worldmodel.data.records import open_dataset
from worldmodel.data.tokenize import tokenizer_sha256
from worldmodel.data.tokens import require_tokenizer
from worldmodel.runs import RunFolder, RunLog, SilentLog
from worldmodel.train.checkpoint import Checkpoints
from worldmodel.train.objectives import (
    DynamicsObjective,
    JepaObjective,
    LamObjective,
    Objective,
    TokenizerObjective,
)
from worldmodel.train.optim import make_optimizer
from worldmodel.train.processes import Stop, agreed, meet, stop_signals
from worldmodel.train.restore import load_lam, load_tokenizer
from worldmodel.train.state import Functional, Tree, make_mesh, place_batch, state_shardings, values_of

EVAL_SEED = 20_240


class Loader(Protocol):
    """What the loop needs of a data source."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...

    def __next__(self) -> dict[str, np.ndarray]: ...

    def state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


class Source:
    """The data of a run: loader of the training split, fixed clips of both splits, number of actions."""

    def __init__(self, config: TrainConfig) -> None:
        """Open the data set of a config (and its tokenised form where one is named)."""
        self.config = config
        train = open_dataset(config.data_dir, "train")
        frame = config.tokenizer.frame
        if tuple(train.frame_shape) != (frame.height, frame.width, frame.channels):
            raise DataError(
                f"{config.data_dir}: frames are {tuple(train.frame_shape)}, this configuration expects "
                f"{(frame.height, frame.width, frame.channels)}; "
                "collect or import at that size, or change tokenizer.frame"
            )
        self.num_actions = train.num_actions
        self._train = train

    def loader(self, *, with_frames: bool) -> Loader:
        """Shuffled windows of the training split, this process's share; without pixels where the stage needs none."""
        config = self.config
        return make_loader(
            config.data_dir,
            split="train",
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=config.loader_threads,
            with_tokens=config.token_dir or None,
            with_frames=with_frames,
        )

    def initial_clips(self) -> dict[str, np.ndarray]:
        """Fixed training clips for data-dependent initialisation."""
        count = min(self.config.init_clips, self._train.num_windows(self.config.seq_len))
        return self._train.fixed_windows(count, self.config.seq_len, seed=self.config.seed)

    def validation_clips(self) -> dict[str, np.ndarray]:
        """Fixed validation clips, the same at every evaluation and for every run with this data."""
        val = open_dataset(self.config.data_dir, "val")
        count = min(self.config.eval_clips, val.num_windows(self.config.seq_len))
        return val.fixed_windows(count, self.config.seq_len, seed=EVAL_SEED)


def make_objective(config: TrainConfig, num_actions: int) -> Objective:
    """The objective of a stage, with the frozen models that it needs read from their run folders."""
    if config.stage == "tokenizer":
        return TokenizerObjective(config)
    if config.stage == "lam":
        return LamObjective(config)
    if config.stage == "jepa":
        return JepaObjective(config, num_actions=num_actions)
    if not config.tokenizer_run:
        raise ConfigError("stage dynamics needs tokenizer_run, the run folder of a trained tokenizer")
    tokenizer = load_tokenizer(config.tokenizer_run, expected=config.tokenizer)
    if config.token_dir:
        require_tokenizer(config.token_dir, tokenizer_sha256(tokenizer))
    lam = None
    if config.dynamics.action_source == "latent-frozen":
        lam = load_lam(config.lam_run, expected=config.lam)
    return DynamicsObjective(config, tokenizer, num_actions=num_actions, lam=lam)


def initial_state(
    config: TrainConfig, objective: Objective, clips: dict[str, np.ndarray] | None
) -> tuple[Functional, Tree]:
    """A fresh model and training state.

    Args:
        config: stage config.
        objective: of the stage.
        clips: for data-dependent initialisation; None skips it (a checkpoint will replace the values).

    Returns:
        The model's structure and the state at step 0.
    """
    init_key, data_key, run_key = jax.random.split(jax.random.key(config.seed), 3)
    model = objective.build(nnx.Rngs(params=init_key))
    if clips is not None:
        objective.initialize(model, clips, data_key)
    params, stats = values_of(model)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "stats": stats,
        "opt": make_optimizer(config.optim, config.steps).init(params),
        "ema": jax.tree.map(jnp.copy, params) if config.optim.ema > 0 else {},
        "key": jax.random.key_data(run_key),
        "skipped": jnp.zeros((), jnp.int32),
    }
    return Functional(model), state


def make_step(
    config: TrainConfig, objective: Objective, functional: Functional, mesh: Mesh, state: Tree
) -> Callable[[Tree, Tree, dict[str, Array]], tuple[Tree, dict[str, Array]]]:
    """The compiled training step: (state, frozen, batch) -> (state, scalars); the old state's buffers are reused.

    A step whose loss or gradient is not finite moves the step's number and `skipped`, nothing else. The greatest of a
    batch's `stop_D`, one number a device, comes back as the scalar `stop` (see `worldmodel.train.processes.Stop`).
    """
    optimizer = make_optimizer(config.optim, config.steps)

    def step(state: Tree, frozen: Tree, batch: dict[str, Array]) -> tuple[Tree, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state["key"]), state["step"])

        def loss_of(params: Tree) -> tuple[Array, tuple[dict[str, Array], Tree]]:
            model = functional.merge(params, state["stats"])
            loss, scalars = objective.loss(model, frozen, batch, key)
            return loss, (scalars, values_of(model)[1])

        (loss, (scalars, stats)), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        model = functional.merge(optax.apply_updates(state["params"], updates), stats)
        objective.after_update(model)
        params, stats = values_of(model)
        ema = state["ema"]
        if config.optim.ema > 0:
            # Early averages would remember the initial weights: the decay grows with the step.
            decay = jnp.minimum(config.optim.ema, (1.0 + state["step"]) / (10.0 + state["step"]))
            ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = {"params": params, "stats": stats, "opt": opt, "ema": ema}
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, {name: state[name] for name in new})
        skipped = state["skipped"] + jnp.where(finite, 0, 1)
        new_state = {**kept, "step": state["step"] + 1, "key": state["key"], "skipped": skipped}
        stop = {"stop": batch["stop_D"].max()} if "stop_D" in batch else {}
        return new_state, {"loss": loss, "grad_norm": norm, "skipped": skipped, **scalars, **stop}

    shardings = state_shardings(state, mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_report(
    config: TrainConfig, objective: Objective, functional: Functional
) -> Callable[[Tree, Tree, dict[str, Array]], dict[str, Array]]:
    """The compiled costly metrics, on averaged weights where there are any."""

    def report(state: Tree, frozen: Tree, batch: dict[str, Array]) -> dict[str, Array]:
        params = state["ema"] if config.optim.ema > 0 else state["params"]
        return objective.report(functional.merge(params, state["stats"]), frozen, batch)

    return jax.jit(report)


def hardware_line() -> str:
    """Devices, and the cores that this process may use, for logs and summaries."""
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    cores = len(os.sched_getaffinity(0))
    return f"{jax.device_count()} x {kinds} ({jax.default_backend()}), {cores} CPU core{'s' * (cores > 1)}"


def held_memory_bytes() -> int:
    """The most memory held at once: of the first device where it says so, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", 0)) or peak_memory_bytes()


def request_determinism(config: TrainConfig) -> None:
    """Ask XLA for deterministic GPU kernels; it reads the flag when the backend starts, so call this first."""
    flag = "--xla_gpu_deterministic_ops=true"
    flags = os.environ.get("XLA_FLAGS", "")
    if config.deterministic and flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def train(
    config: TrainConfig,
    *,
    overwrite: bool = False,
    source: Source | None = None,
    on_step: Callable[[int], None] | None = None,
    console: TrainingConsole | None = None,
) -> dict[str, Any]:
    """Train one stage to its end, or until a stop signal; run it again to continue.

    Of several processes (`worldmodel.train.processes.joined`) each gives its rows of every batch and its devices.
    Process 0 writes config, logs and summary and decides what all do about the run folder; a stop signal to any process
    ends all behind the same step.

    Args:
        config: what to train.
        overwrite: discard an earlier run in the same folder.
        source: data; opened from the config by default.
        on_step: called after each step with its number (tests).
        console: what is shown meanwhile; a bar or lines by default.

    Returns:
        The summary: status "finished" or "stopped", steps, seconds, last metrics.

    Raises:
        ConfigError, DataError, CheckpointError: bad configuration, data or run folder; the same in every process, if it
            is the folder or the checkpoints in it.
        TrainingError: too many steps without a finite gradient; the last such batch is in the run folder.
        StorageError: a checkpoint or log cannot be written.
    """
    with stop_signals() as caught:
        return _train(
            config, caught, overwrite=overwrite, source=source, on_step=on_step, console=console or TrainingConsole()
        )


def _train(
    config: TrainConfig,
    caught: list[int],
    *,
    overwrite: bool,
    source: Source | None,
    on_step: Callable[[int], None] | None,
    console: TrainingConsole,
) -> dict[str, Any]:
    request_determinism(config)
    as_json, run_dir = to_dict(config), Path(config.run_dir)
    mine: list[RunFolder] = []  # of the process that writes

    def open_run() -> list[Any]:
        mine.append(RunFolder(run_dir, as_json, overwrite=overwrite))
        return [as_json, mine[0].summary]

    config_of_first, summary = agreed(open_run)
    if config_of_first != as_json:
        differences = resume_differences(config_of_first, as_json) or ["in fields that a resume may change"]
        raise ConfigError(
            f"process {jax.process_index()} was started with another configuration than process 0 "
            f"({'; '.join(differences[:4])}); give all processes the same command"
        )
    if summary is not None:
        return summary
    source = source or Source(config)
    mesh = make_mesh(config.mesh)
    objective = make_objective(config, source.num_actions)
    checkpoints = Checkpoints(run_dir, keep=config.keep_checkpoints, keep_every=config.keep_every)
    loader = source.loader(with_frames="frames_BTHWC" in objective.batch_keys)
    resuming = agreed(lambda: checkpoints.latest is not None)
    functional, state = initial_state(config, objective, None if resuming else source.initial_clips())
    state = jax.device_put(state, state_shardings(state, mesh))
    first = 0
    if resuming:
        first, state, loader_state = checkpoints.restore(state, config=as_json)
        loader.restore(loader_state)
    frozen = jax.device_put(objective.frozen, state_shardings(objective.frozen, mesh))
    validation = place_batch(validation_share(source.validation_clips(), mesh, objective.batch_keys), mesh)
    step_fn = make_step(config, objective, functional, mesh, state)
    report_fn = make_report(config, objective, functional)
    log = SilentLog()
    for run in mine:
        log = RunLog(
            run, console, step=first, steps=config.steps, tensorboard=config.tensorboard, wandb=config.wandb,
            hardware=hardware_line(),
        )  # fmt: skip
    for line in checkpoints.passed_over:
        log.text(line)
    parameters = sum(x.size for x in jax.tree.leaves(state["params"]))
    metrics: dict[str, float] = {}
    batches = iter(loader)
    started_s = window_s = time.perf_counter()
    window_cpu_s, window_step, step, status = time.process_time(), first, first, "finished"
    before: tuple[int, dict[str, np.ndarray], dict[str, Array]] | None = None
    skipped = int(state["skipped"])
    stop = Stop(caught, mesh)
    stopping = stop.at_start()
    try:
        with console.live(config.stage):
            console.waiting(f"{config.stage}: compiling the first step (some seconds to a minute)")
            while step < config.steps and not stopping:
                batch = next(batches)
                given = {name: batch[name] for name in objective.batch_keys}
                state, scalars = step_fn(state, frozen, place_batch({**given, **stop.flags()}, mesh))
                step += 1
                if before is not None:  # one step behind: the devices are busy with this one meanwhile
                    skipped = check_finite(run_dir, config, skipped, *before)
                asked = scalars.pop("stop", None)
                before = (step, batch, scalars)
                logged = step % config.log_every == 0 or step == config.steps
                evaluated = step % config.eval_every == 0 or step == config.steps
                if step == first + 1:
                    jax.block_until_ready(scalars)
                    console.say(f"{config.stage}: first step done after {time.perf_counter() - started_s:.1f} s")
                    if not logged and not evaluated:  # speed is that of compiled steps
                        window_s, window_cpu_s, window_step = time.perf_counter(), time.process_time(), step
                if logged or evaluated:
                    values = {name: float(value) for name, value in jax.device_get(scalars).items()}
                    now_s = time.perf_counter()
                    frames = (step - window_step) * config.batch_size * config.seq_len
                    values["frames_per_s"] = frames / max(now_s - window_s, 1e-9)
                    values["eta_s"] = (config.steps - step) * (now_s - window_s) / (step - window_step)
                    values["memory_bytes"] = held_memory_bytes()
                    values["cpu_ms_per_step"] = 1e3 * (time.process_time() - window_cpu_s) / (step - window_step)
                    if evaluated:
                        report = jax.device_get(report_fn(state, frozen, validation))
                        metrics = {f"val_{name}": float(value) for name, value in report.items()}
                        values |= metrics
                    log.write(step, **values)
                    window_s, window_cpu_s, window_step = time.perf_counter(), time.process_time(), step
                if on_step is not None:
                    on_step(step)
                stopping = stop.asked(asked)
                if step % config.checkpoint_every == 0 or step == config.steps or stopping:
                    checkpoints.save(step, state, config=as_json, loader_state=loader.state())
            if before is not None:
                check_finite(run_dir, config, skipped, *before)
        if step < config.steps:
            status = "stopped"
            log.text(f"stopped by a signal at step {step}; the same command goes on from here")
    except BaseException:
        if jax.process_count() == 1:
            checkpoints.close()
        raise  # of several, what the others do now is not known: nothing here waits for them
    else:
        checkpoints.close()
    finally:
        log.close()
    summary = {
        "status": status,
        "stage": config.stage,
        "steps": step,
        "parameters": parameters,
        "optimizer_values": sum(x.size for x in jax.tree.leaves(state["opt"])),
        "seconds": time.perf_counter() - started_s,
        "seconds_from_step": first,
        "hardware": hardware_line(),
        "frames_per_step": config.batch_size * config.seq_len,
        "metrics": metrics,
    }
    if status == "finished":
        for run in mine:
            run.finish(summary)
    return summary


def check_finite(
    run_dir: Path, config: TrainConfig, skipped: int, step: int, batch: dict[str, np.ndarray], scalars: dict[str, Array]
) -> int:
    """How many steps were skipped up to this one.

    Raises:
        TrainingError: more than the configuration allows; each process has then saved its part of the batch.
    """
    now = int(scalars["skipped"])
    if now <= skipped or now <= config.nonfinite_limit:
        return now
    path = run_dir / f"nonfinite_process{jax.process_index()}.npz"
    content = io.BytesIO()
    arrays: dict[str, Any] = {"step": step, **batch}
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())
    meet("a batch that is not finite")
    raise TrainingError(
        f"{run_dir}: {now} steps had a loss or gradient that is not finite, at most {config.nonfinite_limit} are "
        f"skipped (nonfinite_limit); the last was step {step}, its batch is in {path}. Lower the learning rate or look "
        "at that batch; checkpoints hold finite weights"
    )


def validation_share(clips: dict[str, np.ndarray], mesh: Mesh, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """This process's part of the validation clips that the stage reads, without those beyond a multiple of the devices.

    Args:
        clips: all of them, the same in every process.
        mesh: devices; at least one clip for each is needed.
        keys: what the stage reads of a batch.

    Raises:
        DataError: too few clips.
    """
    each, index = len(clips["actions_BT"]) // mesh.size * mesh.size // jax.process_count(), jax.process_index()
    if each == 0:
        raise DataError(
            f"{len(clips['actions_BT'])} validation clips cannot be split over {mesh.size} devices; raise eval_clips"
        )
    wanted = set(keys) - {"tokens_BTN"} | {"frames_BTHWC"}
    return {name: value[index * each : (index + 1) * each] for name, value in clips.items() if name in wanted}
