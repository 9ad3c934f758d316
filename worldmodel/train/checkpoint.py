"""Orbax checkpoints of a run (model, optimizer, key, loader state, config): asynchronous, atomic, with retention."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from common.errors import CheckpointError
from worldmodel.config import resume_differences
from worldmodel.train.state import Tree, flatten_names


def encode_loader_state(state: Any) -> dict[str, Any]:
    """Loader state (bytes or JSON) as JSON."""
    if isinstance(state, bytes):
        return {"kind": "bytes", "value": base64.b64encode(state).decode("ascii")}
    return {"kind": "json", "value": state}


def decode_loader_state(value: dict[str, Any]) -> Any:
    """Inverse of `encode_loader_state`."""
    return base64.b64decode(value["value"]) if value["kind"] == "bytes" else value["value"]


class Checkpoints:
    """The checkpoints of one run folder. A step is either there as a whole or not at all."""

    def __init__(self, run_dir: str | Path, *, keep: int, keep_every: int = 0, read_only: bool = False) -> None:
        """Open.

        Args:
            run_dir: run folder.
            keep: newest checkpoints to keep.
            keep_every: steps whose multiples are kept forever; 0 for none.
            read_only: never write or delete.
        """
        self.path = Path(run_dir).resolve() / "checkpoints"
        if read_only and not self.path.is_dir():
            raise CheckpointError(f"{run_dir}: no checkpoints here; expected the run folder of a trained stage")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            keep_period=keep_every or None,
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.path, options=options, item_names=("state", "extra"))

    @property
    def latest(self) -> int | None:
        """Newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree, *, config: dict[str, Any], loader_state: Any) -> None:
        """Start writing a checkpoint; the arrays are copied before this returns, so they may be donated."""
        extra = {"config": config, "loader": encode_loader_state(loader_state)}
        if jax.default_backend() == "cpu":
            # On the CPU the "transfer to host" is a view of the very buffer that the next step will reuse.
            state = jax.tree.map(lambda x: x.copy(), state)
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra)),
            force=True,
        )

    def restore(self, target: Tree, *, config: dict[str, Any], step: int | None = None) -> tuple[int, Tree, Any]:
        """Read a checkpoint onto the devices (and in the layout) of `target`.

        Args:
            target: tree of arrays or ShapeDtypeStructs with shardings.
            config: config that wants to continue.
            step: which; the newest by default.

        Returns:
            Step, state and loader state.

        Raises:
            CheckpointError: none there, another configuration, or damaged.
        """
        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(f"{self.path}: no complete checkpoint to restore")
        extra = self._read(step, "extra", ocp.args.JsonRestore())
        differences = resume_differences(extra["config"], config)
        if differences:
            raise CheckpointError(f"{self.path}/{step} is of another configuration: {'; '.join(differences[:4])}")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        state = self._read(step, "state", ocp.args.StandardRestore(abstract))
        # A state restored into donated buffers must own its memory: copy once, here.
        return step, jax.tree.map(lambda x: x.copy(), state), decode_loader_state(extra["loader"])

    def restore_values(self, target: Tree, step: int | None = None) -> Tree:
        """Part of a checkpoint for inference (params, stats, ema), without optimizer state.

        Args:
            target: tree of arrays, a subset of the saved one.
            step: which; the newest by default.

        Returns:
            The tree with saved values.

        Raises:
            CheckpointError: none there, damaged, or of another model.
        """
        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(f"{self.path}: no complete checkpoint to restore")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        state = self._read(
            step, "state", ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=True)
        )
        for name, value in flatten_names(state).items():
            expected = flatten_names(abstract)[name]
            if tuple(value.shape) != tuple(expected.shape):
                raise CheckpointError(f"{self.path}/{step}: {name} has shape {value.shape}, expected {expected.shape}")
        return state

    def _read(self, step: int, item: str, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(
                f"{self.path}/{step}: cannot restore {item!r} ({type(error).__name__}: {str(error)[:300]}); "
                "it is damaged or of another model: delete that step to fall back to an older one"
            ) from error

    def wait(self) -> None:
        """Until all writing is done."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and release threads."""
        self._manager.close()
