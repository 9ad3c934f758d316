"""Fake quantization of all tensors of a model in one launch: float32 masters in, compute weights out.

Letters: R rows of all tensors together, one program each; T tensors; C columns of a row.

Bitwise equal to `fake_quantize_torch` (and so to grid.py) for finite weights. What makes that so: quotients are
correctly rounded, roundings are done by adding and subtracting 1.5 * 2**23 or on bit patterns, and a clipped grid's sum
of squares halves the row in float64 in the order that grid.py defines.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.quant.grid import BF16_MAX, F32_GRID, FP8_E4M3_MAX, GRID_SCALE_MAX, GRID_SCALE_MIN, GridSpec, grid_rows
from common.triton_support import kernel_is_interpreted, nearest_bf16, require_triton, tl, triton_kernel

# Rules a program follows, in the table's column of that name.
_RULE_INT, _RULE_FP8, _RULE_BF16, _RULE_F32 = range(4)
# Elements that a program takes of a tensor whose values do not depend on each other.
_FREE_CHUNK = 4096


@triton_kernel
def _bounded(x, top):
    """x within +-top; NaN stays."""
    x = tl.maximum(x, -top, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, top, propagate_nan=tl.PropagateNan.ALL)


@triton_kernel
def _fused(a, b, c, INTERPRETED: tl.constexpr):
    """a b + c rounded once. The interpreter's tl.fma rounds twice; float64 holds the product of two float32 exactly."""
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton_kernel
def _quotient(w, scale, inverse, INTERPRETED: tl.constexpr):
    """w / scale correctly rounded, wherever it is not far below 1; inverse = 1 / scale, correctly rounded.

    Source: Markstein 1990, "Computation of elementary functions on the IBM RISC System/6000 processor": a quotient
    within one ulp, corrected by its exact remainder times the correctly rounded inverse, is the correctly rounded one;
    the first of the two corrections brings it within one ulp. Five instructions, where a division that takes any number
    has about twenty and a branch. All remainders are exact while scale stays above 2**-60 or so (the kernel's `lift`).
    """
    ratio = w * inverse
    ratio = _fused(_fused(-scale, ratio, w, INTERPRETED), inverse, ratio, INTERPRETED)
    return _fused(_fused(-scale, ratio, w, INTERPRETED), inverse, ratio, INTERPRETED)


@triton_kernel
def _nearest_fp8(x, signed):
    """float32 within +-448 rounded to e4m3, ties to even, kept as float32; the sign is that of `signed`."""
    bits = signed.to(tl.int32, bitcast=True)
    magnitude = tl.abs(x)
    # Normal numbers keep 3 bits of mantissa; below 2**-6 the grid is uniform with steps of 2**-9.
    pattern = magnitude.to(tl.int32, bitcast=True)
    normal = ((pattern + 0x7FFFF + ((pattern >> 20) & 1)) & -1048576).to(tl.float32, bitcast=True)
    small = (magnitude * 512.0 + 12582912.0) - 12582912.0
    rounded = tl.where(magnitude < 0.015625, small * 0.001953125, normal)
    rounded = (rounded.to(tl.int32, bitcast=True) | (bits & -2147483648)).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, rounded)


@triton_kernel
def _row_sigma(source, columns, WIDTH: tl.constexpr, LEVELS: tl.constexpr):
    """Root mean square of a row, as grid.rms_sigma defines it."""
    c = tl.arange(0, WIDTH)
    w = tl.load(source + c, mask=c < columns, other=0.0).to(tl.float64)
    sums = w * w
    for level in tl.static_range(LEVELS):  # pyright: ignore[reportGeneralTypeIssues]
        # Exactly two terms a sum: the upper half onto the lower.
        sums = tl.sum(sums.reshape((2, WIDTH >> (level + 1))), axis=0)
    mean = tl.sum(sums, axis=0) / columns.to(tl.float64)
    guess = tl.sqrt(mean).to(tl.float32)
    bits = guess.to(tl.int32, bitcast=True)
    below = tl.where(bits == 0, 0.0, (bits - 1).to(tl.float32, bitcast=True))
    above = (bits + 1).to(tl.float32, bitcast=True)
    wide = guess.to(tl.float64)
    lower_mid = (wide + below.to(tl.float64)) * 0.5
    upper_mid = (wide + above.to(tl.float64)) * 0.5
    return tl.where(
        mean <= lower_mid * lower_mid, below, tl.where(mean <= upper_mid * upper_mid, guess, above)
    ).to(tl.float64)


@triton_kernel
def _on_grid(
    w, rule, top, scale, lift, inverse,
    BF16_TOP: tl.constexpr, RULE_INT: tl.constexpr, RULE_FP8: tl.constexpr, RULE_BF16: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Numbers of one row rounded to its grid."""
    value = w
    if (rule == RULE_INT) | (rule == RULE_FP8):
        # Bounds are on the grid, so bounding first gives the same codes, and numbers small enough to round thus.
        bounded = _bounded(_quotient(w * lift, scale * lift, inverse, INTERPRETED), top)
        if rule == RULE_INT:
            code = (bounded + 12582912.0) - 12582912.0
            value = tl.where(code == 0.0, 0.0, code * scale)
        else:
            value = _nearest_fp8(bounded, w) * scale
    elif rule == RULE_BF16:
        value = tl.where(w != w, w, nearest_bf16(_bounded(w, BF16_TOP)))
    return value


@triton_kernel
def _store_weights(narrow, wide, at, value, inside, to_bf16, INTERPRETED: tl.constexpr):
    """Into bfloat16 or float32."""
    if to_bf16:
        if INTERPRETED:  # whose cast cuts off
            value = tl.where(value != value, value, nearest_bf16(value))
        tl.store(narrow + at, value.to(tl.bfloat16), mask=inside)
    else:
        tl.store(wide + at, value, mask=inside)


@triton_kernel
def _fake_quantize_kernel(
    tensor_of_R,
    row_of_R,
    table_TF,
    clip_T,
    FIELDS: tl.constexpr,
    SCALE_MIN: tl.constexpr,
    SCALE_MAX: tl.constexpr,
    BF16_TOP: tl.constexpr,
    RULE_INT: tl.constexpr,
    RULE_FP8: tl.constexpr,
    RULE_BF16: tl.constexpr,
    CLIPPED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One row: its scale, then its values, to bfloat16 or float32."""
    tensor = tl.load(tensor_of_R + tl.program_id(0))
    row = tl.load(row_of_R + tl.program_id(0)).to(tl.int64)
    entry = table_TF + tensor * FIELDS
    source_address = tl.load(entry)
    target_address = tl.load(entry + 1)
    stride = tl.load(entry + 2)
    numbers = tl.load(entry + 3)
    rule = tl.load(entry + 4).to(tl.int32)
    top = tl.load(entry + 5).to(tl.float32)
    scaled = tl.load(entry + 6) != 0
    stored_in_bf16 = tl.load(entry + 7) != 0
    to_bf16 = tl.load(entry + 8) != 0
    source = source_address.to(tl.pointer_type(tl.float32)) + row * stride
    narrow = target_address.to(tl.pointer_type(tl.bfloat16)) + row * stride
    wide = target_address.to(tl.pointer_type(tl.float32)) + row * stride
    columns = tl.minimum(stride, numbers - row * stride).to(tl.int32)
    # Numbers in eights are read and written 16 bytes at a time; up to seven are left at the end.
    eights = columns
    if ALIGNED:
        source = tl.multiple_of(source, 16)
        narrow = tl.multiple_of(narrow, 16)
        wide = tl.multiple_of(wide, 16)
        eights = tl.multiple_of(columns & -8, 8)
    c = tl.arange(0, BLOCK_C)
    last = eights + tl.arange(0, 8)
    scale = tl.full((), 1.0, tl.float32)
    if scaled:
        clip = tl.load(clip_T + tensor)
        limit = tl.full((), 0.0, tl.float32)
        if CLIPPED and clip > 0:
            limit = (_row_sigma(source, columns, WIDTH, LEVELS) * clip).to(tl.float32)
        else:
            most = tl.zeros((BLOCK_C,), tl.float32)
            for first in range(0, eights, BLOCK_C):
                most = tl.maximum(most, tl.abs(tl.load(source + first + c, mask=first + c < eights, other=0.0)))
            limit = tl.max(most, axis=0)
            if eights < columns:
                few = tl.load(source + last, mask=last < columns, other=0.0)
                limit = tl.maximum(limit, tl.max(tl.abs(few), axis=0))
        scale = tl.div_rn(limit, top)
        scale = tl.minimum(tl.maximum(scale, SCALE_MIN), SCALE_MAX)
        if stored_in_bf16:
            scale = nearest_bf16(scale)
    # Remainders of a quotient by a tiny scale would fall below float32's range: both are brought up, exactly.
    lift = tl.where(scale < 8.673617379884035e-19, 18446744073709551616.0, 1.0)  # 2**-60, 2**64
    inverse = tl.div_rn(1.0, scale * lift)
    for first in range(0, eights, BLOCK_C):
        inside = first + c < eights
        w = tl.load(source + first + c, mask=inside, other=0.0)
        value = _on_grid(
            w, rule, top, scale, lift, inverse, BF16_TOP, RULE_INT, RULE_FP8, RULE_BF16, INTERPRETED
        )
        _store_weights(narrow, wide, first + c, value, inside, to_bf16, INTERPRETED)
    if eights < columns:
        inside = last < columns
        w = tl.load(source + last, mask=inside, other=0.0)
        value = _on_grid(
            w, rule, top, scale, lift, inverse, BF16_TOP, RULE_INT, RULE_FP8, RULE_BF16, INTERPRETED
        )
        _store_weights(narrow, wide, last, value, inside, to_bf16, INTERPRETED)


class FakeQuantizeAll:
    """Compute weights from float32 masters, all tensors in one launch; a plan that is made once and called every step.

    Args:
        masters: contiguous float32 tensors of any shape, on one device.
        specs: the grid of each, or None for a plain copy (rounded to the compute weight's dtype).
        weights: where the values go: contiguous, of the same shapes, bfloat16 or float32.
    Raises:
        ValueError: lists of unequal length, a shape, dtype or device that does not fit, a tensor that is not
            contiguous, or a clipped grid over a row of more than 16,384 columns.
        RuntimeError: Triton is not installed; at a call: a tensor has moved to other memory since the plan was made.

    Numerics: the values are those of `fake_quantize_torch(master, spec, out=weight)`, bit for bit, for finite masters;
    a NaN stays one. The plan keeps the tensors alive and knows them by address: weights that are replaced instead of
    written need a new plan. Nothing waits for the device, so a call can be captured in a CUDA graph.
    """

    def __init__(
        self, masters: Sequence[Tensor], specs: Sequence[GridSpec | None], weights: Sequence[Tensor]
    ) -> None:
        require_triton("FakeQuantizeAll")
        if not len(masters) == len(specs) == len(weights) or not masters:
            raise ValueError(
                f"FakeQuantizeAll: {len(masters)} masters, {len(specs)} grids and {len(weights)} weights; expected as "
                "many of each, at least one"
            )
        self.masters, self.weights = list(masters), list(weights)
        self._addresses = self._where()
        device = masters[0].device
        tensor_of_R, row_of_R, table, clips = [], [], [], []
        widest_clipped, self.aligned = 0, True
        for index, (master, spec, weight) in enumerate(zip(self.masters, specs, self.weights, strict=True)):
            spec = spec or F32_GRID
            if (
                master.dtype != torch.float32
                or weight.dtype not in (torch.bfloat16, torch.float32)
                or master.shape != weight.shape
                or not master.device == weight.device == device
                or not (master.is_contiguous() and weight.is_contiguous())
            ):
                raise ValueError(
                    f"FakeQuantizeAll: tensor {index} is {master.dtype} {tuple(master.shape)} on {master.device}, its "
                    f"weight {weight.dtype} {tuple(weight.shape)} on {weight.device}; expected contiguous float32 "
                    f"masters and contiguous bfloat16 or float32 weights of the same shape, all on {device}"
                )
            free = spec.scale == "none"
            if master.numel() == 0:
                continue
            rows, columns = grid_rows(tuple(master.shape)) if spec.scale == "row" else (1, master.numel())
            stride = min(columns, _FREE_CHUNK) if free else columns
            count = -(-columns // stride) * rows
            if spec.clip is not None:
                widest_clipped = max(widest_clipped, columns)
            top = spec.qmax if spec.kind == "int" else int(FP8_E4M3_MAX)
            rule = {"int": _RULE_INT, "fp8_e4m3": _RULE_FP8, "bf16": _RULE_BF16, "f32": _RULE_F32}[spec.kind]
            table.append(
                [
                    *(master.data_ptr(), weight.data_ptr(), stride, master.numel(), rule, top),
                    *(not free, spec.scale_dtype == "bf16", weight.dtype == torch.bfloat16),
                ]
            )
            clips.append(spec.clip or 0.0)
            tensor_of_R += [len(table) - 1] * count
            row_of_R += range(count)
            starts_aligned = master.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
            self.aligned &= starts_aligned and (count == 1 or stride % 8 == 0)
        if widest_clipped > 16384:
            raise ValueError(
                f"FakeQuantizeAll: a clipped grid over a row of {widest_clipped} columns, at most 16384; use "
                "fake_quantize_torch"
            )
        self.rows = len(tensor_of_R)
        self.width = 1 << (max(widest_clipped, 1) - 1).bit_length()
        self.clipped = widest_clipped > 0
        self.tensor_of_R = torch.tensor(tensor_of_R, dtype=torch.int32, device=device)
        self.row_of_R = torch.tensor(row_of_R, dtype=torch.int32, device=device)
        self.table_TF = torch.tensor(table, dtype=torch.int64, device=device)
        self.clip_T = torch.tensor(clips, dtype=torch.float64, device=device)

    def _where(self) -> list[int]:
        return [t.data_ptr() for tensors in (self.masters, self.weights) for t in tensors]

    @torch.no_grad()
    def __call__(self) -> None:
        """Write all compute weights."""
        if self._where() != self._addresses:
            raise RuntimeError("FakeQuantizeAll: a tensor has moved since the plan was made; make a new plan")
        if self.rows == 0:
            return
        _fake_quantize_kernel[(self.rows,)](
            self.tensor_of_R,
            self.row_of_R,
            self.table_TF,
            self.clip_T,
            FIELDS=9,
            SCALE_MIN=GRID_SCALE_MIN,
            SCALE_MAX=GRID_SCALE_MAX,
            BF16_TOP=BF16_MAX,
            RULE_INT=_RULE_INT,
            RULE_FP8=_RULE_FP8,
            RULE_BF16=_RULE_BF16,
            CLIPPED=self.clipped,
            ALIGNED=self.aligned,
            # A warp a row; a clipped grid holds a whole row in float64.
            BLOCK_C=1024 if self.clipped else 256,
            WIDTH=self.width,
            LEVELS=self.width.bit_length() - 1,
            INTERPRETED=kernel_is_interpreted(_fake_quantize_kernel),
            num_warps=4 if self.clipped else 1,
        )
