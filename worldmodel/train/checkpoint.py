"""Orbax checkpoints of a run (model, optimizer, key, loader state, config): asynchronous, atomic, with retention.

Each carries checksums of what was in memory. A checkpoint is read back and held against them once it is written, before
the next one begins (and so before an older one goes); a restored one is held against them again.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from common.errors import CheckpointError, StorageError
from common.files import storing
from worldmodel.config import resume_differences
from worldmodel.train.processes import agreed
from worldmodel.train.state import Tree, flatten_names

# Orbax and TensorStore raise anything for a file that is not what they wrote, plain Exception too.
DAMAGE = Exception
CHECKSUM_VALUES = 1 << 20  # values summed at once
# Orbax measures how long a write takes by the system's clock and gives up after 20 minutes of it: a clock that is set
# anew meanwhile would end the run. A disk that hangs is waited for, as everywhere else.
ORBAX_TIMEOUT_S = 10 * 365 * 24 * 3600


def encode_loader_state(state: Any) -> dict[str, Any]:
    """Loader state (bytes or JSON) as JSON."""
    if isinstance(state, bytes):
        return {"kind": "bytes", "value": base64.b64encode(state).decode("ascii")}
    return {"kind": "json", "value": state}


def decode_loader_state(value: dict[str, Any]) -> Any:
    """Inverse of `encode_loader_state`. Raises CheckpointError for anything else."""
    try:
        return base64.b64decode(value["value"]) if value["kind"] == "bytes" else value["value"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"loader state {str(value)[:80]} is not one that a checkpoint holds") from error


def checksum(x: Any) -> int:
    """Position-weighted sum modulo 2**64 of an array's bits, over this process's share of it.

    The shares of all processes add up to the same number however the array is laid out. Weights are odd, so no single
    value can change unnoticed.

    Args:
        x: NumPy or JAX array of any type and shape.

    Returns:
        In [0, 2**64).
    """
    shards = [(s.index, s.data) for s in x.addressable_shards if s.replica_id == 0] if isinstance(x, jax.Array) else [
        ((slice(None),) * np.ndim(x), x)
    ]  # fmt: skip
    total = 0
    for index, data in shards:
        values = np.ascontiguousarray(np.asarray(data)).reshape(-1)
        bits = values.view(f"u{values.dtype.itemsize}")
        strides = [math.prod(x.shape[axis + 1 :]) for axis in range(len(x.shape))]
        for first in range(0, values.size, CHECKSUM_VALUES):
            place = np.arange(first, min(first + CHECKSUM_VALUES, values.size))
            if values.size < x.size:  # a shard: places in the whole array
                axes = zip(np.unravel_index(place, data.shape), index, strides, strict=True)
                place = sum((at + (part.start or 0)) * stride for at, part, stride in axes)
            weights = (2 * np.asarray(place, np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            total += int((bits[first : first + CHECKSUM_VALUES] * weights).sum(dtype=np.uint64))
    return total % 2**64


def checksums(state: Tree, *, alone: bool = False) -> dict[str, str]:
    """Checksum of every array of a state by name, over all processes (or of what this one has); hexadecimal."""
    names, sums = [], []
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        names.append(f"{name} {np.dtype(x.dtype).name} {tuple(x.shape)}")
        sums.append(checksum(x))
    if jax.process_count() > 1 and not alone:
        halves = np.array([[s & 0xFFFFFFFF, s >> 32] for s in sums], np.uint32)
        every = np.asarray(multihost_utils.process_allgather(halves)).astype(np.uint64)
        sums = [int(s) for s in (every[..., 0] + (every[..., 1] << np.uint64(32))).sum(axis=0, dtype=np.uint64)]
    return dict(zip(names, (f"{s:016x}" for s in sums), strict=True))


def on_host(target: Tree) -> Tree:
    """A target that is read into host memory: what is asked for as NumPy comes as NumPy. It takes no memory itself."""
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), target)


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """JSON under a checksum of its own."""
    text = json.dumps(value, sort_keys=True)
    return {"sealed": text, "blake2b": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}


def unseal(value: Any, where: str) -> dict[str, Any]:
    """Inverse of `seal`. Raises CheckpointError if it is not what was sealed."""
    text = value.get("sealed") if isinstance(value, dict) else None
    if not isinstance(text, str) or value.get("blake2b") != hashlib.blake2b(text.encode(), digest_size=16).hexdigest():
        raise CheckpointError(f"{where}: configuration and loader state do not fit their checksum; it is damaged")
    try:
        sealed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: what is sealed is not JSON ({error})") from error
    if not isinstance(sealed, dict):
        raise CheckpointError(f"{where}: what is sealed is a {type(sealed).__name__}, expected an object")
    return sealed


class Checkpoints:
    """The checkpoints of one run folder. A step is either there as a whole or not at all."""

    def __init__(self, run_dir: str | Path, *, keep: int, keep_every: int = 0, read_only: bool = False) -> None:
        """Open.

        Args:
            run_dir: run folder.
            keep: newest checkpoints to keep.
            keep_every: steps whose multiples are kept forever; 0 for none.
            read_only: never write or delete, and read alone: no other process takes part.
        """
        self.path = Path(run_dir).resolve() / "checkpoints"
        if read_only and not self.path.is_dir():
            raise CheckpointError(f"{run_dir}: no checkpoints here; expected the run folder of a trained stage")
        alone = ocp.options.MultiprocessingOptions()
        if read_only and jax.process_count() > 1:
            this = jax.process_index()
            alone = ocp.options.MultiprocessingOptions(
                primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"alone{this}"
            )
        options = ocp.CheckpointManagerOptions(
            multiprocessing_options=alone,
            max_to_keep=None if read_only else keep,
            keep_period=keep_every or None,
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=not read_only,
            lightweight_initialize=True,  # else one step with damaged metadata keeps all others from being read
            async_options=ocp.options.AsyncOptions(
                timeout_secs=ORBAX_TIMEOUT_S,
                create_directories_asynchronously=False,  # those are waited for by the clock too, for 300 s at most
            ),
            cleanup_tmp_directories=not read_only,  # what a killed process was writing
        )
        self.passed_over: list[str] = []
        self.damaged: list[int] = []
        self._read_only = read_only
        self._alone = read_only or jax.process_count() == 1
        self._failed = False
        self._unverified: tuple[int, Tree, dict[str, str]] | None = None
        self._manager = ocp.CheckpointManager(self.path, options=options, item_names=("state", "extra"))

    @property
    def latest(self) -> int | None:
        """Newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree, *, config: dict[str, Any], loader_state: Any) -> None:
        """Start writing a checkpoint; the arrays are copied before this returns, so they may be donated."""
        self.verify()
        sums = checksums(state)
        extra = seal({"config": config, "loader": encode_loader_state(loader_state), "checksums": sums})
        if jax.default_backend() == "cpu":
            # On the CPU the "transfer to host" is a view of the very buffer that the next step will reuse.
            state = jax.tree.map(lambda x: x.copy(), state)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra)),
                force=True,
            )
        except DAMAGE as error:
            raise self._not_saved(step, error) from error
        self._unverified = (step, jax.tree.map(ocp.utils.to_shape_dtype_struct, state), sums)

    def _not_saved(self, step: int, error: Exception) -> StorageError:
        self._failed = True
        return StorageError(
            f"{self.path}/{step}: not saved ({type(error).__name__}: {str(error)[:300]}); free space or use another "
            "disk. Older checkpoints are as they were: the same command goes on from the newest"
        )

    def verify(self) -> None:
        """Wait for the checkpoint in writing and read it back.

        Raises:
            StorageError: it cannot be written, or does not read as it was in memory.
        """
        if self._unverified is None:
            return
        (step, abstract, sums), self._unverified = self._unverified, None
        try:
            self._manager.wait_until_finished()
            if jax.process_index():  # one process reads the whole
                return
            with self._reader() as reader:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(on_host(abstract)))
                values = reader._manager.restore(step, args=args)["state"]
            wrong = [name for name, value in checksums(values, alone=True).items() if sums.get(name) != value]
        except DAMAGE as error:
            raise self._not_saved(step, error) from error
        if wrong:
            raise self._not_saved(step, ValueError(f"{wrong[0]} and {len(wrong) - 1} more read back otherwise"))

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Checkpoints]:
        """For reading without the other processes: this object, if there are none."""
        if self._alone:
            yield self
            return
        reader = Checkpoints(self.path.parent, keep=1, read_only=True)
        try:
            yield reader
        finally:
            reader.close()

    def _newest_sound(self, target: Tree, config: dict[str, Any]) -> int:
        """Which step to continue from: process 0 reads and judges whole checkpoints, so that all take the same."""

        def judge() -> list[Any]:
            with self._reader() as reader:
                step, _, _ = reader.restore(on_host(target), config=config)
            self._set_aside(reader.damaged)
            return [step, reader.passed_over]

        step, passed_over = agreed(judge)
        self.passed_over += passed_over
        self._reload()
        return step

    def restore(self, target: Tree, *, config: dict[str, Any], step: int | None = None) -> tuple[int, Tree, Any]:
        """Read a checkpoint onto the devices (and in the layout) of `target`.

        Args:
            target: tree of arrays or ShapeDtypeStructs with shardings; what is NumPy's comes as NumPy.
            config: config that wants to continue.
            step: which; the newest sound one by default.

        Returns:
            Step, state and loader state. Damaged steps are passed over (named in `passed_over`) and set aside.

        Raises:
            CheckpointError: none there, another configuration, or all damaged.
        """
        if step is None and not self._alone:
            step = self._newest_sound(target, config)
        candidates = sorted(self._manager.all_steps(), reverse=True) if step is None else [step]
        if not candidates:
            raise CheckpointError(f"{self.path}: no complete checkpoint to restore")
        abstract = jax.tree.map(
            lambda x: x if isinstance(x, np.ndarray) else ocp.utils.to_shape_dtype_struct(x), target
        )
        for candidate in candidates:
            try:
                extra = self._extra(candidate)
                differences = resume_differences(extra["config"], config)
                if not differences:
                    state = self._read(candidate, "state", ocp.args.StandardRestore(abstract))
                    self._compare(candidate, state, extra)
            except CheckpointError as error:
                self.passed_over.append(f"{error}; trying the one before it")
                self.damaged.append(candidate)
                continue
            if differences:
                raise CheckpointError(
                    f"{self.path}/{candidate} is of another configuration: {'; '.join(differences[:4])}"
                )
            if not self._read_only:
                self._set_aside(self.damaged)
            # A state restored into donated buffers must own its memory: copy once, here.
            return candidate, jax.tree.map(lambda x: x.copy(), state), decode_loader_state(extra["loader"])
        raise CheckpointError("; ".join([*self.passed_over, "none is left: delete them to start over"]))

    def _extra(self, step: int) -> dict[str, Any]:
        """Configuration, loader state and checksums of a step. Raises CheckpointError."""
        extra = unseal(self._read(step, "extra", ocp.args.JsonRestore()), f"{self.path}/{step}")
        parts = ("config", "loader", "checksums")
        if set(extra) != set(parts) or not all(isinstance(extra[part], dict) for part in parts):
            raise CheckpointError(f"{self.path}/{step}: holds {sorted(extra)}, expected config, loader and checksums")
        return extra

    def _compare(self, step: int, state: Tree, extra: dict[str, Any]) -> None:
        sums = checksums(state, alone=self._alone)
        wrong = [name for name, value in sums.items() if extra["checksums"].get(name) != value]
        if wrong:
            raise CheckpointError(
                f"{self.path}/{step}: {wrong[0]} and {len(wrong) - 1} more do not fit their checksums; it is damaged"
            )

    def _set_aside(self, damaged: list[int]) -> None:
        """Move damaged steps out of the way, so that they can be written anew."""
        if not damaged:
            return
        aside = self.path.parent / "checkpoints-damaged"
        with storing(aside):
            aside.mkdir(exist_ok=True)
            for step in damaged:
                (self.path / str(step)).rename(aside / f"{step}-{len(list(aside.iterdir()))}")
        self._reload()

    def _reload(self) -> None:
        """List the steps anew. Unlike opening, this reads metadata, of which nothing is needed here."""
        try:
            self._manager.reload()
        except DAMAGE as error:
            raise CheckpointError(
                f"{self.path}: damaged steps are in {self.path.parent / 'checkpoints-damaged'}, and the metadata of "
                f"another is damaged too ({type(error).__name__}: {str(error)[:200]}); start the same command again"
            ) from error

    def restore_values(self, target: Tree, step: int | None = None) -> Tree:
        """Part of a checkpoint for inference (params, stats, ema), without optimizer state.

        Args:
            target: tree of arrays or of their shapes and types, a subset of the saved one.
            step: which; the newest by default.

        Returns:
            The tree with saved values, on one device, wherever they lay when they were saved.

        Raises:
            CheckpointError: none there, damaged, or of another model.
        """
        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(f"{self.path}: no complete checkpoint to restore")
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), target)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        state = self._read(
            step, "state", ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=True)
        )
        for name, value in flatten_names(state).items():
            expected = flatten_names(abstract)[name]
            if tuple(value.shape) != tuple(expected.shape):
                raise CheckpointError(f"{self.path}/{step}: {name} has shape {value.shape}, expected {expected.shape}")
        self._compare(step, state, self._extra(step))
        return state

    def _read(self, step: int, item: str, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except DAMAGE as error:
            raise CheckpointError(
                f"{self.path}/{step}: cannot restore {item!r} ({type(error).__name__}: {str(error)[:300]}); "
                "it is damaged or of another model: delete that step to fall back to an older one"
            ) from error

    def close(self) -> None:
        """Finish writing, verify and release threads. Raises as `verify`."""
        try:
            self.verify()
        finally:
            # What could not be saved has been said; Orbax says it again.
            with contextlib.suppress(DAMAGE) if self._failed else contextlib.nullcontext():
                self._manager.close()
