"""Trained worlds to and from one artifact file, through `common/quant` and `common/artifact`.

An artifact holds the tokenizer and the dynamics of a world: what inference needs and nothing else (no optimizer, no
counters). It is read back into fresh models, strictly: every name and shape must be the configuration's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from common.artifact.budget import SizeReport
from common.artifact.container import load_artifact, save_artifact
from common.errors import ArtifactError, CheckpointError, ConfigError
from common.quant.grid import GridSpec, QuantizedTensor, quantize
from worldmodel.config import TrainConfig, from_dict, to_dict
from worldmodel.data.tokenize import tokenizer_sha256
from worldmodel.models.tokenizer import Tokenizer
from worldmodel.rollout.world import World
from worldmodel.train.restore import empty_dynamics
from worldmodel.train.state import Functional, fill_names, flatten_names, values_of

TRAINING_ONLY = ("idle_V", "spare_VL")
FORMAT = "worldmodel-1"
GRIDS: dict[str, tuple[GridSpec, GridSpec]] = {
    # (weight matrices of transformer blocks, tables and the other matrices)
    "int8": (GridSpec("int", 8, "row", "f32", None), GridSpec("int", 8, "row", "f32", None)),
    "int4": (GridSpec("int", 4, "row", "f32", None), GridSpec("int", 8, "row", "f32", None)),
}
# Grid "step": the step of each matrix in sigmas of its rows, by the first part that its name contains; the entropy
# coder charges about log2(1 / step) + 2.05 bits. What pixels and tokens' values come through must be fine, what
# leads to tokens may be coarse (LOG.md has the sweep that says so).
STEP_SIGMAS = (
    ("/path_out/", 0.05),
    ("/codebook", 0.1),
    ("/codes_VL", 0.1),
    ("/token_in/", 0.1),
    ("/latent_", 0.1),
    ("/patch_out/", 0.3),
    ("/layer_", 0.4),
    ("/path_in/", 0.6),
    ("/patch_in/", 0.8),
    ("/token_table", 0.8),
    ("", 0.1),
)
GRID_NAMES = (*GRIDS, "step")
MIN_QUANTIZED_VALUES = 512
MOST_CLAIMED = 1 << 16  # sizes up to this one are plausible in any artifact


def inference_values(model: Any) -> dict[str, np.ndarray]:
    """All arrays of a model that inference reads, by slash-separated name."""
    params, stats = values_of(model)
    flat = {f"params/{name}": value for name, value in flatten_names(params).items()}
    flat |= {f"stats/{name}": value for name, value in flatten_names(stats).items()}
    return {name: np.asarray(value, np.float32) for name, value in flat.items() if not name.endswith(TRAINING_ONLY)}


def weights_sha256(model: Any) -> str:
    """Digest of a model's inference weights (names, shapes, bytes)."""
    digest = hashlib.sha256()
    for name, value in sorted(inference_values(model).items()):
        digest.update(f"{name}:{value.shape};".encode())
        digest.update(np.ascontiguousarray(value, "<f4").tobytes())
    return digest.hexdigest()


def fill_model(model: Any, flat: dict[str, np.ndarray], *, where: str) -> Any:
    """A model with these inference values; counters of training stay as built."""
    params, stats = values_of(model)
    kept = {name: np.asarray(v) for name, v in flatten_names(stats).items() if name.endswith(TRAINING_ONLY)}
    given = {name.removeprefix("stats/"): v for name, v in flat.items() if name.startswith("stats/")}
    weights = {name.removeprefix("params/"): v for name, v in flat.items() if name.startswith("params/")}
    try:
        filled = fill_names(params, weights, where=where), fill_names(stats, {**kept, **given}, where=where)
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    return Functional(model).merge(*filled)


def check_fits(build: Callable[[], Any], flat: dict[str, np.ndarray], *, where: str) -> None:
    """Lay a model out without memory and hold its inference values against those of a file.

    Raises:
        ArtifactError: the model cannot be built, or a name or shape differs.
    """
    try:
        params, stats = values_of(nnx.eval_shape(build))
    except (ConfigError, ValueError, TypeError, ArithmeticError, IndexError, AssertionError, StopIteration) as error:
        raise ArtifactError(f"{where}: describes a model that cannot be built ({str(error)[:300]})") from error
    wanted = {f"params/{name}": tuple(value.shape) for name, value in flatten_names(params).items()}
    wanted |= {f"stats/{name}": tuple(value.shape) for name, value in flatten_names(stats).items()}
    wanted = {name: shape for name, shape in wanted.items() if not name.endswith(TRAINING_ONLY)}
    held = {name: value.shape for name, value in flat.items()}
    if differing := sorted(name for name in wanted.keys() | held.keys() if wanted.get(name) != held.get(name)):
        name = differing[0]
        raise ArtifactError(
            f"{where}: {len(differing)} tensors do not fit the model that it describes, the first {name}: "
            f"{held.get(name, 'absent')} held, {wanted.get(name, 'none')} described"
        )


def check_plausible(config: TrainConfig, tensors: dict[str, np.ndarray], *, where: str) -> None:
    """Refuse sizes that no model made of these tensors can have, before anything is built.

    Raises:
        ArtifactError: one is too large or not positive.
    """
    most = max(MOST_CLAIMED, sum(value.size for value in tensors.values()))
    sizes = {
        f"{part}.{name}": value
        for part in ("tokenizer", "lam", "dynamics")
        for name, value in flatten_names(to_dict(getattr(config, part))).items()
        if isinstance(value, int) and not isinstance(value, bool)
    }
    sizes |= {f"fsq_levels {i}": level for i, level in enumerate(config.tokenizer.quantizer.fsq_levels)}
    sizes["values of the codebook"] = config.tokenizer.quantizer.codes * config.tokenizer.quantizer.latent_dim
    for name, value in sizes.items():
        limit = len(tensors) + 64 if name.endswith("layers") else most
        if not 0 <= value <= limit:
            raise ArtifactError(f"{where}: {name} is {value}; what it holds allows 0 to {limit}")


def grid_of(grid: str, name: str) -> GridSpec:
    """The grid of a matrix by its full name ("tokenizer/params/..."), for a name of GRID_NAMES."""
    if grid == "step":
        sigmas = next(sigmas for part, sigmas in STEP_SIGMAS if part in name)
        return GridSpec("int", 8, "row", "bf16", 127 * sigmas)
    return GRIDS[grid][0 if name.endswith("/kernel") and "/layer_" in name else 1]


def export_world(world: World, path: str | Path, *, grid: str = "int8", overwrite: bool = False) -> SizeReport:
    """Quantize a world and write it to one file.

    Linear kernels are stored as (inputs, outputs) and quantized per output, so each is transposed first: a row of the
    grid is then one output unit.

    Args:
        world: float world.
        path: file.
        grid: int8, int4 (matrices of blocks at 4 bits, the rest at 8), or step (free steps, under 4 bits a weight).
        overwrite: replace an existing file.

    Returns:
        Where every byte went.

    Raises:
        ConfigError: unknown grid, or the file exists.
    """
    if grid not in GRID_NAMES:
        raise ConfigError(f"unknown grid {grid!r}; choose from {', '.join(GRID_NAMES)}")
    if Path(path).exists() and not overwrite:
        raise ConfigError(f"{path} exists; choose another --out or pass --overwrite")
    tensors: dict[str, QuantizedTensor | np.ndarray] = {}
    for prefix, model in (("tokenizer", world.tokenizer), ("dynamics", world.dynamics)):
        for name, value in inference_values(model).items():
            full = f"{prefix}/{name}"
            if value.ndim == 2 and value.size >= MIN_QUANTIZED_VALUES:
                rows = np.ascontiguousarray(value.T) if name.endswith("/kernel") else value
                tensors[full] = quantize(rows, grid_of(grid, full), full)
            else:
                tensors[full] = value
    meta = {
        "format": FORMAT,
        "grid": grid,
        "num_actions": world.num_actions,
        "config": to_dict(world.config),
        "tokenizer_sha256": tokenizer_sha256(world.tokenizer),
        "dynamics_sha256": weights_sha256(world.dynamics),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return save_artifact(path, tensors, meta)


def load_exported(path: str | Path) -> World:
    """A world from an artifact, in fresh models.

    Raises:
        ArtifactError: damaged, not a world, or not of the configuration that it states.
    """
    tensors, meta = load_artifact(path)
    actions = meta.get("num_actions")
    if meta.get("format") != FORMAT or type(actions) is not int or not 0 <= actions < 1 << 15:
        raise ArtifactError(
            f"{path}: meta format is {meta.get('format')!r}, expected {FORMAT!r}: not a world-model artifact"
        )
    try:
        config = from_dict(TrainConfig, meta["config"], where=str(path))
    except (ConfigError, KeyError) as error:
        raise ArtifactError(f"{path}: its configuration is not readable ({error}); export it again") from error
    check_plausible(config, tensors, where=str(path))
    parts: dict[str, dict[str, np.ndarray]] = {"tokenizer": {}, "dynamics": {}}
    for full, value in tensors.items():
        prefix, _, name = full.partition("/")
        if prefix not in parts:
            raise ArtifactError(f"{path}: unknown tensor {full!r}; expected names under tokenizer/ and dynamics/")
        quantized = value.ndim == 2 and value.size >= MIN_QUANTIZED_VALUES
        parts[prefix][name] = value.T if quantized and name.endswith("/kernel") else value
    for name, build in (
        ("tokenizer", lambda: Tokenizer(config.tokenizer, rngs=nnx.Rngs(0))),
        ("dynamics", lambda: empty_dynamics(config, meta["num_actions"])),
    ):
        check_fits(build, parts[name], where=f"{path}, {name}")
    tokenizer = fill_model(Tokenizer(config.tokenizer, rngs=nnx.Rngs(0)), parts["tokenizer"], where=str(path))
    dynamics = fill_model(empty_dynamics(config, meta["num_actions"]), parts["dynamics"], where=str(path))
    return World(
        config, tokenizer, dynamics, meta["num_actions"], source=f"artifact ({meta.get('grid')}) {Path(path).name}"
    )
