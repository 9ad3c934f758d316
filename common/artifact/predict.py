"""How many bytes a model of given shapes and grids will have once it is trained, from what trained artifacts had.

Letters: C columns of a row. Random weights would mislead: what a code costs depends on how far the largest weight of a
row lies from its spread, and training decides that. So bits are taken from artifacts of trained models, role by role
(a tensor's name without its layer's number), and only what follows from the shape is computed: a longer Gaussian row
has a larger maximum, hence finer steps over sigma and more codes near zero.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.artifact.budget import SizeReport, StreamSize, TensorSize, tensor_group
from common.errors import ArtifactError, ConfigError
from common.quant.grid import GridSpec, grid_rows, grid_scale_count, parse_grid_spec


@dataclass(frozen=True)
class RoleSize:
    """What one role cost in one artifact.

    Args:
        grid: label of its grid.
        n_weights: of all its tensors.
        model_bits: what Gaussian rows of those lengths would have cost, entropy only.
        code_bytes: what they did cost.
        n_scales: of all its tensors.
        scale_bytes: what those cost.
    """

    grid: str
    n_weights: int
    model_bits: float
    code_bytes: int
    n_scales: int
    scale_bytes: int


@dataclass(frozen=True)
class MeasuredArtifact:
    """One trained artifact, as far as a prediction needs it."""

    label: str
    file_bytes: int
    overhead_bytes: int
    n_tensors: int
    roles: dict[str, RoleSize]


def gaussian_code_bits(spec: GridSpec, columns: int) -> float:
    """Entropy of a code of a Gaussian row of this length, bits; 0 for grids whose step does not follow the maximum.

    The maximum of C half-normal values is taken at its median m, P(|z| < m)^C = 1/2; codes are z qmax / m, rounded.
    """
    if spec.kind != "int" or spec.clip is not None or columns < 1:
        return 0.0
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle / math.sqrt(2)) ** columns < 0.5 else (low, middle)
    step = high / spec.qmax
    edges = [(code + 0.5) * step / math.sqrt(2) for code in range(spec.qmax)]
    inside = [math.erf(edge) for edge in edges]
    shares = [inside[0], *((b - a) / 2 for a, b in zip(inside, [*inside[1:], 1.0], strict=True) for _ in (0, 1))]
    return -sum(share * math.log2(share) for share in shares if share > 0)


def measure_artifact(label: str, report: SizeReport) -> MeasuredArtifact:
    """What a prediction needs of an artifact (of its SizeReport)."""
    sums: dict[str, list[Any]] = {}
    for tensor in report.tensors:
        spec = parse_grid_spec(tensor.grid)
        model_bits = tensor.n_weights * gaussian_code_bits(spec, grid_rows(tensor.shape)[1])
        n_scales = grid_scale_count(tensor.shape, spec)
        role = sums.setdefault(tensor_group(tensor.name), [tensor.grid, 0, 0.0, 0, 0, 0])
        if role[0] != tensor.grid:
            raise ArtifactError(f"{label}: {tensor.name} is on {tensor.grid}, others of its role on {role[0]}")
        for place, value in enumerate(
            (tensor.n_weights, model_bits, tensor.code_bytes, n_scales, tensor.scale_bytes), start=1
        ):
            role[place] += value
    roles = {name: RoleSize(*values) for name, values in sums.items()}
    return MeasuredArtifact(label, report.file_bytes, report.overhead_bytes, len(report.tensors), roles)


def write_measured(measured: Sequence[MeasuredArtifact]) -> bytes:
    """JSON of measured artifacts, read back by read_measured."""
    rows = [{**vars(one), "roles": {name: vars(role) for name, role in one.roles.items()}} for one in measured]
    return json.dumps(rows, indent=1).encode() + b"\n"


def read_measured(path: str | Path) -> list[MeasuredArtifact]:
    """Measured artifacts of a file of write_measured. Raises ArtifactError."""
    try:
        rows = json.loads(Path(path).read_bytes())
        return [
            MeasuredArtifact(**{**row, "roles": {name: RoleSize(**role) for name, role in row["roles"].items()}})
            for row in rows
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"{path}: not sizes of trained artifacts ({error}); python -m common.artifact measure writes them"
        ) from error


def read_layout(path: str | Path) -> dict[str, tuple[tuple[int, ...], GridSpec]]:
    """Shapes and grids by name from JSON {name: {"shape": [...], "grid": "int4"}}.

    Raises:
        ArtifactError: not of that form.
        ConfigError: a grid that does not exist.
    """
    try:
        rows = json.loads(Path(path).read_bytes())
        layout = {name: (tuple(row["shape"]), parse_grid_spec(row["grid"])) for name, row in rows.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        form = '{name: {"shape": [...], "grid": "int4"}}'
        raise ArtifactError(f"{path}: not a layout of the form {form} ({error})") from error
    for name, (shape, _) in layout.items():
        if not all(type(length) is int and length >= 0 for length in shape):
            raise ArtifactError(f"{path}: {name} has shape {list(shape)}; give whole numbers")
    return layout


def predict_size(
    layout: Mapping[str, tuple[tuple[int, ...], GridSpec]], measured: Sequence[MeasuredArtifact]
) -> SizeReport:
    """Bytes of a trained model before it is trained.

    A role costs what Gaussian rows of its lengths would, plus what that role cost beyond it in the measured artifacts
    (pooled, a weight at a time); a role that they lack costs what their other roles on the same grid did. Scales and
    header likewise: bits a scale, bytes a tensor.

    Args:
        layout: shape and grid of each tensor, by name.
        measured: trained artifacts.

    Returns:
        A report like that of an artifact, its bytes predicted.

    Raises:
        ConfigError: no measured artifact has a tensor on one of the grids.
    """
    sizes = []
    for name, (shape, spec) in layout.items():
        alike = [role for one in measured for role in one.roles.values() if role.grid == spec.label]
        same = [
            role for one in measured for key, role in one.roles.items()
            if key == tensor_group(name) and role.grid == spec.label
        ]  # fmt: skip
        pool = same or alike
        weights, scales = sum(role.n_weights for role in pool), sum(role.n_scales for role in pool)
        n_weights, n_scales = math.prod(shape), grid_scale_count(shape, spec)
        if (n_weights and not weights) or (n_scales and not scales):
            raise ConfigError(f"{name} is on the grid {spec.label}, which none of the measured artifacts has")
        beyond = (8 * sum(role.code_bytes for role in pool) - sum(role.model_bits for role in pool)) / max(weights, 1)
        code_bits = n_weights * (gaussian_code_bits(spec, grid_rows(shape)[1]) + beyond)
        scale_bits = 8 * n_scales * sum(role.scale_bytes for role in pool) / max(scales, 1)
        sizes.append(TensorSize(name, shape, spec.label, n_weights, round(code_bits / 8), round(scale_bits / 8)))
    overhead = round(len(layout) * sum(one.overhead_bytes for one in measured) / sum(one.n_tensors for one in measured))
    stored = sum(size.total_bytes for size in sizes)
    stream = StreamSize("predicted", "predicted", sum(size.n_weights for size in sizes), stored)
    return SizeReport(stored + overhead, 0, overhead, tuple(sizes), (stream,))


def report_layout(report: SizeReport) -> dict[str, tuple[tuple[int, ...], GridSpec]]:
    """Shape and grid of each tensor of an artifact."""
    return {tensor.name: (tensor.shape, parse_grid_spec(tensor.grid)) for tensor in report.tensors}


def leave_one_out(
    reports: Mapping[str, SizeReport], known: Sequence[MeasuredArtifact] = ()
) -> dict[str, SizeReport]:
    """Each artifact predicted from all others and those already `known`, by label."""
    measured = {label: measure_artifact(label, report) for label, report in reports.items()}
    others = {label: [*known, *(one for other, one in measured.items() if other != label)] for label in measured}
    return {label: predict_size(report_layout(report), others[label]) for label, report in reports.items()}
