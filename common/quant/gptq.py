"""Rate-aware rounding: which steps and which codes lose least for the bits that an entropy coder will charge.

Letters: R rows (outputs), C columns (inputs). All arithmetic is NumPy in float64, column after column in an order that
follows from the data: the same input gives the same codes on the same machine.

The expected increase of the loss is taken as 1/2 sum_i g_i (dw_i H dw_i'), with H = E[x x'] over the layer's inputs and
g_i = E[(dL/dy_i)^2] over its outputs, L the loss of one token summed over what it influences (a Kronecker-factored
Fisher matrix with its output factor cut to the diagonal; Martens & Grosse 2015, arXiv:1503.05671).
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from common.errors import ConfigError
from common.quant.grid import round_to_bf16
from common.quant.trellis import TRELLIS_NEXT

GPTQ_DAMPING = 0.01  # of the mean of H's diagonal, added to it
GPTQ_BLOCK = 64  # columns rounded before their errors reach the columns behind them
STEP_MAX_SIGMAS = 3.0
TRELLIS_BLOCK = 32  # the same, smaller: a block's columns follow every survivor from state to state
TRELLIS_ROWS = 128  # of a thread at a time: their survivors stay in the cache
CODE_MARGIN = 1.05  # the largest weight's code stays this far inside the grid, for error feedback and rounded steps
ROW_STEPS_PER_OCTAVE, COLUMN_STEPS_PER_OCTAVE = 8, 4
_WEAKEST_ROW = 1e-4  # of the mean sensitivity: a row whose gradient was never seen is not free


@dataclass(frozen=True)
class LayerStatistics:
    """What the loss says about one weight matrix, from text that may be trained on.

    Args:
        hessian_CC: E[x x'] of its inputs, float64.
        sensitivity_R: E[(dL/dy)^2] of its outputs, float64, L in nats.
    """

    hessian_CC: np.ndarray
    sensitivity_R: np.ndarray

    def rows_cols(self) -> tuple[int, int]:
        return len(self.sensitivity_R), len(self.hessian_CC)


@dataclass(frozen=True)
class Elimination:
    """H with its columns in the order in which they are rounded.

    Args:
        order_C: column indices, the strongest input first or as they are stored.
        upper_CC: U with inverse(H) = U' U, rows and columns in that order.
        cost_C: 1 / U_jj^2: what a unit of squared error in a column costs once the columns after it make up for it.
    """

    order_C: np.ndarray
    upper_CC: np.ndarray
    cost_C: np.ndarray


def eliminate(hessian_CC: np.ndarray, damping: float = GPTQ_DAMPING, ordered: bool = True) -> Elimination:
    """Order the columns, or leave them, and factor the inverse. Raises ConfigError for what is no covariance."""
    diagonal_C = np.diag(hessian_CC)
    if not np.isfinite(hessian_CC).all() or bool((diagonal_C < 0).any()):
        raise ConfigError("the statistics of a layer's inputs are not finite: look at its activations")
    order_C = np.argsort(-diagonal_C, kind="stable") if ordered else np.arange(len(diagonal_C))
    damped_CC = hessian_CC[np.ix_(order_C, order_C)].astype(np.float64)
    damped_CC[np.diag_indices(len(order_C))] += damping * float(diagonal_C.mean()) + 1e-30
    # H = L L' with the last column eliminated first gives U = inverse(L) reversed, without forming inverse(H).
    lower_CC = np.linalg.cholesky(damped_CC[::-1, ::-1])
    upper_CC = np.linalg.inv(lower_CC)[::-1, ::-1]
    return Elimination(order_C, upper_CC, 1.0 / np.diag(upper_CC) ** 2)


def _octave_grid(value: np.ndarray, unit: float, per_octave: int) -> np.ndarray:
    """Nearest unit * 2**(k/per_octave), as bf16: few different values, which cost few bits, whatever the unit."""
    octaves = np.rint(np.log2(value / unit) * per_octave) / per_octave
    return round_to_bf16((unit * np.exp2(octaves)).astype(np.float32))


def plan_scales(
    w_RC: np.ndarray, statistics: LayerStatistics, loss_nats: float, elimination: Elimination, qmax: int
) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which every weight is expected to cost the same loss: what is best for a fixed number of bits.

    A uniform grid of step s has squared error s^2 / 12, so the step of row i and column j is
    sqrt(24 loss_nats / (g_i cost_j)); at most STEP_MAX_SIGMAS of the row, at least what its largest weight needs.

    Args:
        w_RC: weights, float32.
        statistics: of the layer.
        loss_nats: expected loss increase a weight, nats a token: the one knob, the same for all layers.
        elimination: of statistics.hessian_CC.
        qmax: largest code.

    Returns:
        Row scales (R,) and column scales (C,), float32 of bf16 values; the step is their product.
    """
    log_cost_C = np.log(elimination.cost_C)
    column_C = np.empty(len(log_cost_C))
    column_C[elimination.order_C] = np.exp((log_cost_C.mean() - log_cost_C) / 2)
    column_C = _octave_grid(np.clip(column_C, 1 / 8, 8), 1.0, COLUMN_STEPS_PER_OCTAVE)
    sensitivity_R = np.maximum(statistics.sensitivity_R, _WEAKEST_ROW * statistics.sensitivity_R.mean() + 1e-30)
    unit = float(np.sqrt(24 * loss_nats))
    row_R = unit / np.sqrt(sensitivity_R * np.exp(log_cost_C.mean()))
    sigma_R = np.sqrt(np.mean(np.square(w_RC, dtype=np.float64), axis=1))
    finest_R = np.abs(w_RC / column_C).max(axis=1) * CODE_MARGIN / qmax
    row_R = np.maximum(np.minimum(row_R, STEP_MAX_SIGMAS * sigma_R), finest_R)
    return _octave_grid(np.maximum(row_R, 1e-30), unit, ROW_STEPS_PER_OCTAVE), column_C


def gptq_codes(
    w_RC: np.ndarray, row_R: np.ndarray, column_C: np.ndarray, qmax: int, elimination: Elimination, rate: float = 1.0
) -> np.ndarray:
    """Round column by column, each column's error made up for by the columns after it.

    Source: GPTQ (Frantar et al. 2022, arXiv:2210.17323). Ours adds the rate: a code k of a row whose weights have
    spread s (in steps) costs about k^2 log2(e) / (2 s^2) bits, and one bit is worth ln(2) / 6 squared steps (the slope
    of a uniform grid's error against its rate), so squared error plus cost is least at round(u / (1 + 1 / (12 s^2)))
    instead of round(u).

    Args:
        w_RC: weights.
        row_R, column_C: scales; the step is their product.
        qmax: largest code.
        elimination: of the layer's Hessian.
        rate: weight of the coder's cost, 1 as derived; 0 is plain GPTQ.

    Returns:
        (R, C) int8.
    """
    n_columns = w_RC.shape[1]
    step_RC = (row_R[:, None].astype(np.float64) * column_C[None, elimination.order_C]).T.copy()
    left_RC = w_RC[:, elimination.order_C].astype(np.float64).T.copy()  # columns as contiguous rows
    sigma_R = np.sqrt(np.mean(np.square(left_RC), axis=0)) + 1e-30
    shrink_RC = 1.0 / (1.0 + rate / 12.0 * (step_RC / sigma_R) ** 2)
    codes_RC = np.empty(left_RC.shape, np.int8)
    upper_CC = elimination.upper_CC / np.diag(elimination.upper_CC)[:, None]
    for first in range(0, n_columns, GPTQ_BLOCK):
        last = min(first + GPTQ_BLOCK, n_columns)
        errors = np.empty((last - first, left_RC.shape[1]))
        for column in range(first, last):
            value_R, step_R = left_RC[column], step_RC[column]
            code_R = np.clip(np.rint(value_R / step_R * shrink_RC[column]), -qmax, qmax)
            codes_RC[column] = code_R
            error_R = value_R - code_R * step_R
            errors[column - first] = error_R
            left_RC[column + 1 : last] -= upper_CC[column, column + 1 : last, None] * error_R
        left_RC[last:] -= upper_CC[first:last, last:].T @ errors
    back_C = np.empty(n_columns, np.intp)
    back_C[elimination.order_C] = np.arange(n_columns)
    return np.ascontiguousarray(codes_RC[back_C].T)


def trellis_codes(
    w_RC: np.ndarray, row_R: np.ndarray, column_C: np.ndarray, qmax: int, elimination: Elimination, rate: float
) -> np.ndarray:
    """The codes of gptq_codes on a trellis grid: of every row the path that loses least.

    Source: Viterbi's algorithm with GPTQ's error feedback inside. Ours keeps for every path that survives a row of
    weights with that path's own errors made up for; a path of the past does not know the errors of another.

    Args:
        w_RC: weights.
        row_R, column_C: scales; the step is their product.
        qmax: largest code.
        elimination: of the layer's Hessian, not ordered: a path goes through the columns as they are stored.
        rate: see gptq_codes.

    Returns:
        (R, C) int8.

    Numerics: float64. Rows do not see each other: the number of threads changes nothing.
    """
    parts = [slice(first, first + TRELLIS_ROWS) for first in range(0, len(w_RC), TRELLIS_ROWS)]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        found = pool.map(lambda part: _best_paths(w_RC[part], row_R[part], column_C, qmax, elimination, rate), parts)
        return np.concatenate(list(found))


def _best_paths(
    w_RC: np.ndarray, row_R: np.ndarray, column_C: np.ndarray, qmax: int, elimination: Elimination, rate: float
) -> np.ndarray:
    """trellis_codes of some rows; S: states, each the end of one survivor."""
    (n_rows, n_columns), n_states = w_RC.shape, len(TRELLIS_NEXT)
    half_S = (np.arange(n_states) & 1) / 2
    # (S, 2): the states, and the parities of the code, from which each state is reached.
    arrivals = [np.argwhere(state == TRELLIS_NEXT) for state in range(n_states)]
    from_S2, parity_S2 = (np.array([[pair[i] for pair in pairs] for pairs in arrivals]) for i in (0, 1))
    step_CR = (row_R[:, None].astype(np.float64) * column_C[None]).T.copy()
    plain_CR = w_RC.astype(np.float64).T
    # Error and rate together are (1 + p) (value - shrunk)^2 and what the choice does not change, in squared steps.
    price_CR = rate / 12.0 * (step_CR / (np.sqrt(np.mean(np.square(plain_CR), axis=0)) + 1e-30)) ** 2
    weight_CR = (elimination.cost_C / elimination.cost_C.mean())[:, None] * np.square(step_CR)
    upper_CC = elimination.upper_CC / np.diag(elimination.upper_CC)[:, None]
    rows = np.arange(n_rows)
    left_SCR = np.repeat(plain_CR[None], n_states, axis=0)
    loss_SR = np.full((n_states, n_rows), np.inf)
    loss_SR[0] = 0.0
    codes_CSR = np.empty((n_columns, n_states, n_rows), np.int8)
    from_CSR = np.empty((n_columns, n_states, n_rows), np.uint8)
    for first in range(0, n_columns, TRELLIS_BLOCK):
        last = min(first + TRELLIS_BLOCK, n_columns)
        width = last - first
        # One array for what follows a path from state to state: the block's weights, then the block's errors.
        carried = np.concatenate([left_SCR[:, first:last], np.zeros((n_states, width, n_rows))], axis=1)
        origin_SR = np.repeat(np.arange(n_states)[:, None], n_rows, axis=1)
        for at, column in enumerate(range(first, last)):
            value_SR = carried[:, at] / step_CR[column]
            price_R = price_CR[column]
            wanted_SR = value_SR / (1.0 + price_R) - half_S[:, None]
            near_SR = np.clip(np.rint(wanted_SR), 1 - qmax, qmax - 1)
            off_SR = wanted_SR - near_SR
            toward_SR = np.where(off_SR < 0, -1.0, 1.0)
            scale_R = weight_CR[column] * (1.0 + price_R)
            fixed_SR = loss_SR + weight_CR[column] * price_R / (1.0 + price_R) * np.square(value_SR)
            near_loss_SR = fixed_SR + scale_R * np.square(off_SR)
            next_loss_SR = fixed_SR + scale_R * np.square(off_SR - toward_SR)
            odd_SR = near_SR.astype(np.int8) & 1 == 1
            # By parity of the code, even first.
            loss_2SR = np.where([odd_SR, ~odd_SR], next_loss_SR, near_loss_SR)
            code_2SR = np.where([odd_SR, ~odd_SR], near_SR + toward_SR, near_SR)
            one_SR, two_SR = (loss_2SR[parity_S2[:, i], from_S2[:, i]] for i in (0, 1))
            second_SR = two_SR < one_SR
            loss_SR = np.where(second_SR, two_SR, one_SR)
            from_SR = np.where(second_SR, from_S2[:, 1:], from_S2[:, :1])
            parity_SR = np.where(second_SR, parity_S2[:, 1:], parity_S2[:, :1])
            code_SR = code_2SR[parity_SR, from_SR, rows]
            codes_CSR[column], from_CSR[column] = code_SR, from_SR
            error_SR = carried[from_SR, at, rows] - (code_SR + half_S[from_SR]) * step_CR[column]
            carried = np.take_along_axis(carried, from_SR[:, None], axis=0)
            origin_SR = np.take_along_axis(origin_SR, from_SR, axis=0)
            carried[:, width + at] = error_SR
            carried[:, at + 1 : width] -= upper_CC[column, column + 1 : last, None] * error_SR[:, None]
        if last < n_columns:
            rest_SCR = np.take_along_axis(left_SCR[:, last:], origin_SR[:, None], axis=0)
            left_SCR[:, last:] = rest_SCR - upper_CC[first:last, last:].T @ carried[:, width:]
    state_R = np.argmin(loss_SR, axis=0)
    codes_CR = np.empty((n_columns, n_rows), np.int8)
    for column in reversed(range(n_columns)):
        codes_CR[column] = codes_CSR[column, state_R, rows]
        state_R = from_CSR[column, state_R, rows]
    return np.ascontiguousarray(codes_CR.T)
