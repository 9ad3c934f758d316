"""A whole model onto grids with free steps, as many bits as a budget allows, each where it buys most.

Letters: R rows, C columns. One number decides everything: the loss that one weight may cost (plan_scales). Equal loss
for every weight of every layer is what a fixed number of bits is best spent on, so layers, roles and rows need no
search of their own; the solver moves that number until the file has the size that is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from common.errors import ArtifactError, ConfigError
from common.quant.gptq import LayerStatistics, eliminate, gptq_codes, plan_scales, trellis_codes
from common.quant.grid import GridSpec, QuantizedTensor, dequantize, quantize, round_to_bf16

FREE_STEP_GRID = GridSpec("int", 8, "cross")
TRELLIS_GRID = GridSpec("trellis", 8, "cross")
BUDGET_FILL = 0.998  # what the solver aims at; it stops between BUDGET_LEAST and 1
BUDGET_LEAST = 0.995
_LOSS_RANGE = (1e-16, 1e-4)  # nats a weight; outside every step stands at its bound


@dataclass(frozen=True)
class ModelPlan:
    """A model on its grids at one loss a weight.

    Args:
        loss_nats: the knob, expected loss increase a weight, nats a token.
        tensors: by name, all of the model.
        expected_nats: expected loss increase by tensor with statistics, from the codes as they are.
    """

    loss_nats: float
    tensors: dict[str, QuantizedTensor]
    expected_nats: dict[str, float]


@dataclass(frozen=True)
class TrainedSteps:
    """The steps on which quantization-aware training ran.

    Args:
        loss_nats: of the plan that they come from.
        scales: its scales, (R + C,) float32, by name.
    """

    loss_nats: float
    scales: dict[str, np.ndarray]


def expected_increase(w: np.ndarray, q: QuantizedTensor, statistics: LayerStatistics) -> float:
    """1/2 sum_i g_i (dw_i H dw_i') of a rounding, nats a token."""
    shape_RC = statistics.rows_cols()
    error_RC = dequantize(q).reshape(shape_RC).astype(np.float64) - w.reshape(shape_RC)
    return 0.5 * float(statistics.sensitivity_R @ ((error_RC @ statistics.hessian_CC) * error_RC).sum(axis=1))


def plan_model(
    weights: Mapping[str, np.ndarray],
    statistics: Mapping[str, LayerStatistics],
    specs: Mapping[str, GridSpec],
    loss_nats: float,
    rate: float,
    trained: TrainedSteps | None = None,
    trellis: bool = False,
) -> ModelPlan:
    """Round every tensor with statistics to free steps by error feedback, every other one to its own grid.

    Args:
        weights: float32 by name.
        statistics: by name of a matrix; weights of that name have R rows and C columns.
        specs: grid of each weight without statistics.
        loss_nats: see plan_scales.
        rate: see gptq_codes.
        trained: steps that the weights were trained on: they are kept, but for one factor that loss_nats decides.
        trellis: on TRELLIS_GRID instead of FREE_STEP_GRID: less loss at equal bits, in some 15 times the time. The same
            loss_nats stands for the same steps there, so the loss is less than it says.

    Raises:
        ConfigError: statistics that do not fit their weight.
    """
    tensors: dict[str, QuantizedTensor] = {}
    expected: dict[str, float] = {}
    for name, w in weights.items():
        layer = statistics.get(name)
        if layer is None:
            tensors[name] = quantize(w, specs[name], name)
            continue
        if w.shape != layer.rows_cols():
            raise ConfigError(f"{name} has shape {w.shape}, its statistics are for {layer.rows_cols()}")
        elimination = eliminate(layer.hessian_CC, ordered=not trellis)
        if trained is not None and name in trained.scales:
            row_R, column_C = np.split(trained.scales[name], [len(w)])
            row_R = round_to_bf16(row_R * np.float32(math.sqrt(loss_nats / trained.loss_nats)))
        else:
            row_R, column_C = plan_scales(w, layer, loss_nats, elimination, FREE_STEP_GRID.qmax)
        grid, find = (TRELLIS_GRID, trellis_codes) if trellis else (FREE_STEP_GRID, gptq_codes)
        codes = find(w, row_R, column_C, grid.qmax, elimination, rate)
        tensors[name] = QuantizedTensor(grid, codes, np.concatenate([row_R, column_C]), w.shape)
        expected[name] = expected_increase(w, tensors[name], layer)
    return ModelPlan(loss_nats, tensors, expected)


def fit_budget(
    make: Callable[[float], ModelPlan],
    size_of: Callable[[ModelPlan], int],
    budget_bytes: int,
    *,
    start_nats: float = 1e-9,
    attempts: int = 16,
) -> tuple[ModelPlan, list[tuple[float, int, float]]]:
    """The finest plan whose file fits, filling at least BUDGET_LEAST of the budget unless every step is at its finest.

    Args:
        make: plan of a loss a weight.
        size_of: bytes of a plan's file; falls as the loss rises.
        budget_bytes: for the file.
        start_nats: where to begin.
        attempts: plans made at most.

    Returns:
        The plan, and every point tried: (loss a weight, bytes, expected loss increase in nats a token).

    Raises:
        ArtifactError: the budget cannot be met: even the coarsest steps are larger.
    """
    points: list[tuple[float, int, float]] = []
    best: tuple[int, ModelPlan] | None = None
    low, high = (float(np.log2(bound)) for bound in _LOSS_RANGE)
    at = float(np.clip(np.log2(start_nats), low, high))
    slope = 0.0  # bytes a doubling of the loss; a weight of half a bit less
    before: tuple[float, int] | None = None
    for _ in range(attempts):
        plan = make(2.0**at)
        size = size_of(plan)
        points.append((2.0**at, size, sum(plan.expected_nats.values())))
        if size <= budget_bytes and (best is None or size > best[0]):
            best = (size, plan)
        if BUDGET_LEAST * budget_bytes <= size <= budget_bytes:
            break
        low, high = (at, high) if size > budget_bytes else (low, at)
        n_free = sum(plan.tensors[name].codes.size for name in plan.expected_nats)
        slope = -n_free / 16
        if before is not None and before[0] != at and (size - before[1]) / (at - before[0]) < slope / 20:
            slope = (size - before[1]) / (at - before[0])
        before = (at, size)
        wanted = at + (BUDGET_FILL * budget_bytes - size) / slope
        if high - low < 1e-3:
            break
        at = wanted if low < wanted < high else (low + high) / 2
    if best is None:
        raise ArtifactError(
            f"{budget_bytes:,} bytes are too few: the smallest file tried has {min(size for _, size, _ in points):,}; "
            "use a smaller model"
        )
    return best[1], sorted(points, key=lambda point: -point[1])


def fit_model(
    weights: Mapping[str, np.ndarray],
    statistics: Mapping[str, LayerStatistics],
    specs: Mapping[str, GridSpec],
    size_of: Callable[[ModelPlan], int],
    budget_bytes: int,
    *,
    rate: float,
    start_nats: float = 1e-9,
    trained: TrainedSteps | None = None,
    trellis: bool = False,
) -> tuple[ModelPlan, list[tuple[float, int, float]]]:
    """fit_budget of plan_model.

    A trellis begins where the uniform grids end, whose codes weigh nearly the same: its own take longer to find.
    """

    def fit(start_nats: float, trellis: bool) -> tuple[ModelPlan, list[tuple[float, int, float]]]:
        return fit_budget(
            lambda loss_nats: plan_model(weights, statistics, specs, loss_nats, rate, trained, trellis),
            size_of,
            budget_bytes,
            start_nats=start_nats,
        )

    plan, points = fit(start_nats, False)
    return fit(plan.loss_nats, True) if trellis else (plan, points)
