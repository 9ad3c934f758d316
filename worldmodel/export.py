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
from common.artifact.container import encode_artifact, load_artifact, save_artifact
from common.errors import ArtifactError, ConfigError
from common.quant.gptq import LayerStatistics
from common.quant.grid import BF16_GRID, GridSpec, QuantizedTensor, quantize
from common.quant.plan import ModelPlan, fit_model
from worldmodel.config import TrainConfig, from_dict, to_dict
from worldmodel.data.tokenize import tokenizer_sha256
from worldmodel.fisher import matrix_rows
from worldmodel.models.dynamics import Dynamics
from worldmodel.models.kinds import build_dynamics
from worldmodel.models.token_dynamics import standardize_codes
from worldmodel.models.tokenizer import Tokenizer
from worldmodel.rollout.world import World
from worldmodel.train.state import Functional, fill_names, flatten_names, values_of

TRAINING_ONLY = ("idle_V", "spare_VL")
FORMATS = ("worldmodel-1", "worldmodel-2")  # the first still holds what the second derives from the codebook
DERIVED = "dynamics/stats/codes_VL"
GRIDS: dict[str, tuple[GridSpec, GridSpec]] = {
    # (weight matrices of transformer blocks, tables and the other matrices)
    "int8": (GridSpec("int", 8, "row", "f32", None), GridSpec("int", 8, "row", "f32", None)),
    "int4": (GridSpec("int", 4, "row", "f32", None), GridSpec("int", 8, "row", "f32", None)),
}
FITTED, TRELLIS = "fitted", "trellis"  # steps by what the world's losses say, as many bits as asked for
FITTED_GRIDS = (FITTED, TRELLIS)
GRID_NAMES = (*GRIDS, *FITTED_GRIDS)
FITTED_RATE = 0.25  # weight of the coder's cost in rounding, as for language models
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


def derives_codes(config: TrainConfig) -> bool:
    """Whether the dynamics holds a copy of the codebook, which is not stored: it follows from the tokenizer's."""
    return config.dynamics.kind != "diffusion" and config.dynamics.tie_codebook


def stored_values(world: World) -> dict[str, np.ndarray]:
    """All arrays of an artifact by name, matrices with one output a row, before any rounding.

    Linear kernels are (inputs, outputs) in the model and are transposed: a row of a grid is then one output unit.
    """
    values = {}
    for prefix, model in (("tokenizer", world.tokenizer), ("dynamics", world.dynamics)):
        for name, value in inference_values(model).items():
            full = f"{prefix}/{name}"
            if full != DERIVED:
                values[full] = np.ascontiguousarray(matrix_rows(name, value)) if is_quantized(value) else value
    return values


def model_of(build: Callable[[], Any], flat: dict[str, np.ndarray], *, where: str) -> Any:
    """A model with the inference values of a file; counters of training start at zero.

    The model is laid out without memory first: what the file describes must fit what it holds.

    Raises:
        ArtifactError: the model cannot be built, or a name or shape differs.
    """
    try:
        model = nnx.eval_shape(build)
        params, stats = values_of(model)
    except (ConfigError, ValueError, TypeError, ArithmeticError, IndexError, AssertionError, StopIteration) as error:
        raise ArtifactError(f"{where}: describes a model that cannot be built ({str(error)[:300]})") from error
    described = {f"params/{name}": value for name, value in flatten_names(params).items()}
    described |= {f"stats/{name}": value for name, value in flatten_names(stats).items()}
    counters = {name: np.zeros(v.shape, v.dtype) for name, v in described.items() if name.endswith(TRAINING_ONLY)}
    wanted = {name: tuple(value.shape) for name, value in described.items() if name not in counters}
    held = {name: value.shape for name, value in flat.items()}
    if differing := sorted(name for name in wanted.keys() | held.keys() if wanted.get(name) != held.get(name)):
        name = differing[0]
        raise ArtifactError(
            f"{where}: {len(differing)} tensors do not fit the model that it describes, the first {name}: "
            f"{held.get(name, 'absent')} held, {wanted.get(name, 'none')} described"
        )
    filled = fill_names({"params": params, "stats": stats}, {**flat, **counters}, where=where)
    return Functional(model).merge(filled["params"], filled["stats"])


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


def is_quantized(value: np.ndarray) -> bool:
    """Whether an array is a matrix that lies on a grid: everything but vectors and the smallest tables."""
    return value.ndim == 2 and value.size >= MIN_QUANTIZED_VALUES


def fixed_tensors(values: dict[str, np.ndarray], grid: str) -> dict[str, QuantizedTensor | np.ndarray]:
    """Every matrix on its row-scaled grid, vectors as they are."""
    tensors: dict[str, QuantizedTensor | np.ndarray] = {}
    for name, value in values.items():
        spec = GRIDS[grid][0 if name.endswith("/kernel") and "/layer_" in name else 1]
        tensors[name] = quantize(value, spec, name) if is_quantized(value) else value
    return tensors


def fitted_plan(
    values: dict[str, np.ndarray], statistics: dict[str, LayerStatistics], meta: dict[str, Any], bits: float
) -> ModelPlan:
    """Steps and codes, on meta's grid, of matrices with statistics that fill `bits` a weight; the rest int8 or bf16."""
    fitted = {name: layer for name, layer in statistics.items() if is_quantized(values[name])}
    specs = {name: GridSpec("int", 8) if is_quantized(value) else BF16_GRID for name, value in values.items()}
    budget_bytes = int(bits * sum(value.size for value in values.values()) / 8)
    plan, _ = fit_model(
        values,
        fitted,
        specs,
        lambda plan: len(encode_artifact(plan.tensors, meta)),
        budget_bytes,
        rate=FITTED_RATE,
        trellis=meta["grid"] == TRELLIS,
    )
    return plan


def export_world(
    world: World,
    path: str | Path,
    *,
    grid: str = "int8",
    bits: float = 4.0,
    statistics: dict[str, LayerStatistics] | None = None,
    overwrite: bool = False,
) -> SizeReport:
    """Quantize a world and write it to one file.

    Args:
        world: float world.
        path: file.
        grid: int8, int4 (matrices of blocks at 4 bits, the rest at 8), fitted (steps by the loss), or trellis (such
            steps on two interleaved grids, which takes longer; for worlds what it wins is not measured).
        bits: a weight of the whole file, of the fitted grids; the file has 99.5 to 100% of that.
        statistics: of `world_statistics`, for the fitted grids.
        overwrite: replace an existing file.

    Returns:
        Where every byte went.

    Raises:
        ConfigError: unknown grid, no statistics for it, or the file exists.
        ArtifactError: the bits do not suffice even for the coarsest steps.
    """
    if grid not in GRID_NAMES:
        raise ConfigError(f"unknown grid {grid!r}; choose from {', '.join(GRID_NAMES)}")
    if Path(path).exists() and not overwrite:
        raise ConfigError(f"{path} exists; choose another --out or pass --overwrite")
    meta = {
        "format": FORMATS[-1],
        "grid": grid,
        "num_actions": world.num_actions,
        "config": to_dict(world.config),
        "tokenizer_sha256": tokenizer_sha256(world.tokenizer),
        "dynamics_sha256": weights_sha256(world.dynamics),
    }
    values = stored_values(world)
    if grid not in FITTED_GRIDS:
        tensors = fixed_tensors(values, grid)
    elif statistics is None:
        raise ConfigError(f"the {grid} grid needs statistics of the world's losses (worldmodel/fisher.py)")
    else:
        tensors = fitted_plan(values, statistics, meta, bits).tensors
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return save_artifact(path, tensors, meta)


def load_exported(path: str | Path) -> World:
    """A world from an artifact, in fresh models.

    Raises:
        ArtifactError: damaged, not a world, or not of the configuration that it states.
    """
    tensors, meta = load_artifact(path)
    actions = meta.get("num_actions")
    if meta.get("format") not in FORMATS or type(actions) is not int or not 0 <= actions < 1 << 15:
        raise ArtifactError(
            f"{path}: meta format is {meta.get('format')!r}, expected one of {', '.join(FORMATS)}: "
            "not a world-model artifact"
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
        parts[prefix][name] = matrix_rows(name, value) if is_quantized(value) else value

    def new_tokenizer() -> Tokenizer:
        return Tokenizer(config.tokenizer, rngs=nnx.Rngs(0))

    def new_dynamics() -> Dynamics:
        return build_dynamics(config, num_actions=actions, rngs=nnx.Rngs(0))

    tokenizer = model_of(new_tokenizer, parts["tokenizer"], where=f"{path}, tokenizer")
    if derives_codes(config) and meta["format"] != FORMATS[0]:
        if DERIVED in tensors:
            raise ArtifactError(f"{path}: holds {DERIVED}, which follows from the codebook")
        parts["dynamics"][DERIVED.partition("/")[2]] = standardize_codes(np.asarray(tokenizer.quantizer.codes))
    dynamics = model_of(new_dynamics, parts["dynamics"], where=f"{path}, dynamics")
    return World(
        config, tokenizer, dynamics, meta["num_actions"], source=f"artifact ({meta.get('grid')}) {Path(path).name}"
    )
