"""Which rows and columns of a weight matrix have large codes: the contexts of the entropy coder.

Letters: R rows, C columns. A row (a unit's inputs) and a column (what one input feeds) have their own spread; the
spread of a code is about their product. Classes are whole steps of its logarithm, so the context of the code in row i
and column j is simply row_class[i] + column_class[j], and one table serves all codes of about that spread, of whatever
tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.artifact.rans import RANS_MAX_TABLES, context_histogram, histogram_cost_bits
from common.errors import ArtifactError
from common.quant.grid import QuantizedTensor, fp8_e4m3_values, grid_rows

CLASS_FORMS = ("none", "tensor", "row", "cross")  # what a tensor brings: nothing, one class, R classes, R + C
CLASS_MIN_VALUES = 1024  # smaller tensors: one class
CLASS_STEPS = (2, 4, 8)  # classes an octave of spread: those tried
_COLUMN_SPAN = RANS_MAX_TABLES // 3


def class_count(shape: tuple[int, ...], form: str) -> int:
    """How many class values a tensor of this shape brings in a form of CLASS_FORMS."""
    n_rows, n_columns = grid_rows(shape)
    return {"none": 0, "tensor": 1, "row": n_rows, "cross": n_rows + n_columns}[form]


def spread_classes(classes: np.ndarray, shape: tuple[int, ...], form: str) -> np.ndarray:
    """Context of every code of a tensor, uint8 in C order, from its (class_count,) uint8 classes.

    Raises ArtifactError if a row's and a column's class add up to more than 255.
    """
    n_rows, n_columns = grid_rows(shape)
    if form == "none":
        return np.zeros(n_rows * n_columns, np.uint8)
    if form == "tensor":
        return np.repeat(classes, n_rows * n_columns)
    if form == "row":
        return np.repeat(classes, n_columns)
    row_R, column_C = classes[:n_rows], classes[n_rows:]
    if int(row_R.max(initial=0)) + int(column_C.max(initial=0)) > 255:
        raise ArtifactError(f"classes {int(row_R.max())} of a row and {int(column_C.max())} of a column exceed 255")
    return (row_R[:, None] + column_C).reshape(-1)


_Spread = tuple[float, np.ndarray, np.ndarray, np.ndarray]


def _log_spreads(q: QuantizedTensor) -> _Spread:
    """log2 of the root mean square of codes: of the tensor, of rows alone, and of rows and columns as a product."""
    level_RC = (q.codes.astype(np.float32) if q.spec.holds_integers else fp8_e4m3_values(q.codes)).reshape(
        grid_rows(q.shape)
    )
    energy_RC = level_RC * level_RC + np.float32(0.05)  # a row of zeros has a spread too: next to nothing
    row_R = energy_RC.mean(axis=1, dtype=np.float64)
    column_C = np.maximum((energy_RC / row_R[:, None].astype(np.float32)).mean(axis=0, dtype=np.float64), 1e-9)
    crossed_R = (energy_RC / column_C.astype(np.float32)).mean(axis=1, dtype=np.float64)
    return float(np.log2(row_R.mean()) / 2), np.log2(row_R) / 2, np.log2(crossed_R) / 2, np.log2(column_C) / 2


def choose_classes(tensors: Sequence[QuantizedTensor]) -> list[tuple[str, np.ndarray]]:
    """Form and classes (uint8) for the tensors of one stream of codes, chosen for the fewest bits.

    Args:
        tensors: on integer or e4m3 grids; codes in the order of the stream.
    """
    spreads = [_log_spreads(q) if q.codes.size >= CLASS_MIN_VALUES else None for q in tensors]
    best: tuple[float, list[tuple[str, np.ndarray]]] | None = None
    for steps in CLASS_STEPS:
        chosen = _classes_at(tensors, spreads, steps)
        n_tables = 1 + max(_largest_context(q.shape, *own) for q, own in zip(tensors, chosen, strict=True))
        counts = np.zeros((n_tables, 256), np.int64)
        for q, (form, classes) in zip(tensors, chosen, strict=True):
            counts += _histogram(q, form, classes, n_tables)
        all_classes = np.concatenate([c for _, c in chosen]) if chosen else np.zeros(0, np.uint8)
        cost_bits = histogram_cost_bits(counts) + histogram_cost_bits(np.bincount(all_classes, minlength=1)[None])
        if best is None or cost_bits < best[0]:
            best = (cost_bits, chosen)
    return best[1] if best else []


def _largest_context(shape: tuple[int, ...], form: str, classes: np.ndarray) -> int:
    n_rows = grid_rows(shape)[0] if form == "cross" else classes.size
    return int(classes[:n_rows].max(initial=0)) + int(classes[n_rows:].max(initial=0))


def _histogram(q: QuantizedTensor, form: str, classes: np.ndarray, n_tables: int) -> np.ndarray:
    contexts = None if form == "none" else spread_classes(classes, q.shape, form)
    return context_histogram(q.codes.reshape(-1).view(np.uint8), contexts, n_tables)


def _classes_at(
    tensors: Sequence[QuantizedTensor], spreads: Sequence[_Spread | None], steps: int
) -> list[tuple[str, np.ndarray]]:
    """Each tensor's cheapest form at so many classes an octave, on one scale of classes for all tensors."""
    rounded: list[tuple[np.ndarray, ...] | None] = []
    for spread in spreads:
        if spread is None:
            rounded.append(None)
            continue
        whole, row_R, crossed_R, column_C = spread
        column = np.rint((column_C - column_C.min()) * steps)
        column = np.maximum(column - max(column.max() - _COLUMN_SPAN, 0), 0)
        crossed = np.rint((crossed_R + column_C.min()) * steps)
        rounded.append((np.rint(np.array([whole]) * steps), np.rint(row_R * steps), crossed, column))
    bases = [min(float(part.min()) for part in item[:3]) for item in rounded if item is not None]
    tops = [max(float(part.max()) for part in item[:3]) for item in rounded if item is not None]
    span = RANS_MAX_TABLES - 1 - _COLUMN_SPAN
    base = max(min(bases, default=0.0), max(tops, default=0.0) - span)
    chosen = []
    for q, item in zip(tensors, rounded, strict=True):
        if item is None:
            chosen.append(("none", np.zeros(0, np.uint8)))
            continue
        whole, row_R, crossed_R, column_C = item
        options = []
        crossed = np.concatenate([crossed_R - base, column_C])
        for form, levels in (("tensor", whole - base), ("row", row_R - base), ("cross", crossed)):
            classes = np.clip(levels, 0, span).astype(np.uint8)
            counts = _histogram(q, form, classes, RANS_MAX_TABLES)
            # the tables are shared: their cost is not this tensor's
            cost = histogram_cost_bits(counts) - 12.0 * np.count_nonzero(counts) + histogram_cost_bits(
                np.bincount(classes)[None]
            )
            options.append((cost, form, classes))
        _, form, classes = min(options, key=lambda option: option[0])
        chosen.append((form, classes))
    return chosen
