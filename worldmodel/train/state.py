"""Models as pure functions of plain dicts, the state of a training run, and where it lives on a mesh.

A training state is a dict of arrays: step, params (by gradient), stats (by bookkeeping), opt (of params only),
ema (average of params, or empty) and key (random key data). Frozen models are not in it.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.errors import CheckpointError, ConfigError
from worldmodel.config import MeshConfig
from worldmodel.models.layers import Stats

Tree = Any
FSDP_MIN_VALUES = 2**14  # smaller arrays are kept whole on every device: splitting them costs more than it saves


class Functional:
    """The structure of a model, apart from its values."""

    def __init__(self, model: nnx.Module) -> None:
        self.graphdef, self._params, self._stats = nnx.split(model, nnx.Param, Stats)

    def merge(self, params: Tree, stats: Tree) -> Any:
        """A live model with these values."""
        params_state = jax.tree.map(lambda x: x, self._params)
        stats_state = jax.tree.map(lambda x: x, self._stats)
        nnx.replace_by_pure_dict(params_state, params)
        nnx.replace_by_pure_dict(stats_state, stats)
        return nnx.merge(self.graphdef, params_state, stats_state)


def values_of(model: nnx.Module) -> tuple[Tree, Tree]:
    """Parameters and bookkeeping of a live model, as plain nested dicts."""
    _, params, stats = nnx.split(model, nnx.Param, Stats)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def flatten_names(tree: Tree) -> dict[str, Any]:
    """Nested dicts to one dict with slash-separated names."""
    flat: dict[str, Any] = {}

    def walk(node: Any, name: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{name}/{key}" if name else str(key))
        else:
            flat[name] = node

    walk(tree, "")
    return flat


def fill_names(template: Tree, flat: dict[str, np.ndarray], *, where: str) -> Tree:
    """Nested dicts of the template's structure, filled by name; strict in names and shapes.

    Args:
        template: nested dicts of arrays that give shape and type.
        flat: values by slash-separated name.
        where: file, for messages.

    Returns:
        Nested dicts of arrays.

    Raises:
        CheckpointError: a name is missing or superfluous, or a shape differs.
    """
    expected = flatten_names(template)
    missing, extra = sorted(set(expected) - set(flat)), sorted(set(flat) - set(expected))
    if missing or extra:
        raise CheckpointError(
            f"{where}: not a model of this configuration; missing {missing[:4]}, unknown {extra[:4]} "
            f"({len(missing)} and {len(extra)} in all)"
        )

    def fill(node: Any, name: str) -> Any:
        if isinstance(node, dict):
            return {key: fill(value, f"{name}/{key}" if name else str(key)) for key, value in node.items()}
        value = np.asarray(flat[name])
        if value.shape != tuple(node.shape):
            raise CheckpointError(
                f"{where}: {name} has shape {value.shape}, this configuration needs {tuple(node.shape)}"
            )
        return jax.numpy.asarray(value.astype(node.dtype))

    return fill(template, "")


def make_mesh(config: MeshConfig) -> Mesh:
    """The device mesh of a config, over the first data x fsdp devices; over all, if there are several processes.

    Raises:
        ConfigError: fewer devices than the mesh needs, or a process without its share of them.
    """
    need, have = config.data * config.fsdp, jax.device_count()
    if need > have:
        raise ConfigError(f"mesh data={config.data} x fsdp={config.fsdp} needs {need} devices, found {have}")
    processes = jax.process_count()
    if processes > 1 and (need < have or have != processes * jax.local_device_count()):
        raise ConfigError(
            f"mesh data={config.data} x fsdp={config.fsdp} takes {need} of the {have} devices of {processes} "
            f"processes, {jax.local_device_count()} of this one; expected all, the same number in each: set "
            f"--mesh.data and --mesh.fsdp to a product of {have}"
        )
    devices = np.asarray(jax.devices()[:need]).reshape(config.data, config.fsdp)
    return Mesh(devices, ("data", "fsdp"))


def state_shardings(state: Tree, mesh: Mesh) -> Tree:
    """Where each array lives: large ones split over `fsdp` along their largest divisible axis, the rest everywhere."""
    parts = mesh.shape["fsdp"]

    def of(x: Any) -> NamedSharding:
        spec: list[str | None] = [None] * x.ndim
        if parts > 1 and x.size >= FSDP_MIN_VALUES:
            for axis in sorted(range(x.ndim), key=lambda a: -x.shape[a]):
                if x.shape[axis] % parts == 0:
                    spec[axis] = "fsdp"
                    break
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(of, state)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Put this process's part of a batch on the devices, clips split over all of them."""
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def is_block_matrix(path: tuple[Any, ...], x: Any) -> bool:
    """Whether a parameter is a weight matrix inside a transformer block (what Muon is for)."""
    names = [str(getattr(part, "key", part)) for part in path]
    return x.ndim == 2 and names[-1] == "kernel" and any(re.fullmatch(r"layer_\d+", name) for name in names)


def is_matrix(path: tuple[Any, ...], x: Any) -> bool:
    """Whether a parameter is a weight matrix (what weight decay is for): not a table, codebook, norm or bias."""
    return x.ndim == 2 and str(getattr(path[-1], "key", path[-1])) == "kernel"
