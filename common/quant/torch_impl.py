"""The grids of common/quant/grid.py in torch, for training: bitwise equal to the NumPy definition.

Letters: R rows (first axis), C columns (all other axes flattened).

Nothing here asks the device for a value (no .item(), no branch on data), so all of it can run inside a captured CUDA
graph. Run it eagerly or captured, not through a compiler that replaces division by an approximate one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.errors import ConfigError
from common.quant.grid import BF16_MAX, FP8_E4M3_MAX, GRID_SCALE_MAX, GRID_SCALE_MIN, GridSpec, grid_rows


def rms_sigma_torch(w_RC: Tensor) -> Tensor:
    """Root mean square of each row, float32 (R,), as grid.rms_sigma defines it."""
    n_rows, n_columns = w_RC.shape
    if n_columns == 0:
        return w_RC.new_zeros(n_rows)
    width = 1 << (n_columns - 1).bit_length()
    sums = w_RC.new_zeros((n_rows, width), dtype=torch.float64)
    sums[:, :n_columns] = w_RC.double().square()
    while width > 1:
        width //= 2
        sums = sums[:, :width] + sums[:, width:]
    # Divisors are tensors on the device: by a Python number, CUDA multiplies by the reciprocal: other bits.
    mean = sums[:, 0] / sums.new_full((1,), float(n_columns))
    guess = mean.sqrt().float()
    below = torch.nextafter(guess, torch.zeros_like(guess))
    above = torch.nextafter(guess, torch.full_like(guess, float("inf")))
    lower_mid, upper_mid = (guess.double() + below) / 2, (guess.double() + above) / 2
    return torch.where(mean <= lower_mid * lower_mid, below, torch.where(mean <= upper_mid * upper_mid, guess, above))


def grid_scales_torch(w_RC: Tensor, spec: GridSpec) -> Tensor:
    """Scales of a float32 matrix on a grid, already rounded to spec.scale_dtype; float32 (R,), (1,) or (0,)."""
    if spec.scale == "none":
        return w_RC.new_zeros(0)
    if spec.scale == "tensor":
        w_RC = w_RC.reshape(1, -1)
    if spec.clip is not None:
        limit = (rms_sigma_torch(w_RC).double() * spec.clip).float()
    elif w_RC.shape[1] == 0:
        limit = w_RC.new_zeros(w_RC.shape[0])
    else:
        limit = w_RC.abs().amax(dim=1)
    top = limit.new_full((1,), float(spec.qmax if spec.kind == "int" else FP8_E4M3_MAX))
    scales = (limit / top).clamp(GRID_SCALE_MIN, GRID_SCALE_MAX)
    scales = scales.bfloat16().float() if spec.scale_dtype == "bf16" else scales
    return torch.cat([scales, scales.new_ones(w_RC.shape[1])]) if spec.scale == "cross" else scales


def _scale_factors_torch(scales: Tensor, n_rows: int, spec: GridSpec) -> list[Tensor]:
    """As grid.scale_factors."""
    if spec.scale == "none":
        return []
    return [scales[:n_rows, None], scales[None, n_rows:]] if spec.scale == "cross" else [scales[:, None]]


def _grid_codes_torch(w: Tensor, spec: GridSpec, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (int: float32 whole numbers; fp8: float8_e4m3fn; bf16: bfloat16; f32: float32) in rows, and scales."""
    if spec.kind == "trellis":
        raise ConfigError(f"grid {spec.label}: a code depends on its row's, there is none for training to snap to")
    w_RC = w.detach().float().reshape(grid_rows(tuple(w.shape)))
    if scales is None:
        scales = grid_scales_torch(w_RC, spec)
    if spec.kind == "f32":
        return w_RC, scales
    if spec.kind == "bf16":
        return w_RC.clamp(-BF16_MAX, BF16_MAX).bfloat16(), scales
    ratio_RC = w_RC
    for factor in _scale_factors_torch(scales, w_RC.shape[0], spec):
        ratio_RC = ratio_RC / factor
    if spec.kind == "int":
        return ratio_RC.round().clamp(-spec.qmax, spec.qmax), scales
    return ratio_RC.clamp(-FP8_E4M3_MAX, FP8_E4M3_MAX).to(torch.float8_e4m3fn), scales


@torch.no_grad()
def quantize_torch(w: Tensor, spec: GridSpec, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a tensor on its grid, as grid.quantize gives them.

    Args:
        w: any shape and float type (cast to float32 first), any device, finite (not checked: that would wait for the
            device; a NaN shows up as a NaN scale or code, which save_artifact refuses).
        spec: the grid.
        scales: None, or scales that another rule has found, as grid.quantize takes them.

    Returns:
        Codes of w's shape (int8 for "int", uint8 and uint16 bit patterns for "fp8_e4m3" and "bf16", float32 for
        "f32") and float32 scales of (R,), (1,), (R + C,) or (0,) by spec.scale.
    """
    codes_RC, scales = _grid_codes_torch(w, spec, scales)
    if spec.kind == "int":
        codes_RC = codes_RC.nan_to_num(nan=0.0).to(torch.int8)
    elif spec.kind == "fp8_e4m3":
        codes_RC = codes_RC.view(torch.uint8)
    elif spec.kind == "bf16":
        codes_RC = codes_RC.view(torch.uint16)
    else:
        codes_RC = codes_RC.clone()
    return codes_RC.reshape(w.shape), scales


@torch.no_grad()
def fake_quantize_torch(
    w: Tensor, spec: GridSpec, out: Tensor | None = None, scales: Tensor | None = None
) -> Tensor:
    """Nearest value of each weight on its grid: what dequantize(quantize(w, spec)) gives.

    Args:
        w: any shape and float type (cast to float32 first), any device. NaN gives NaN.
        spec: the grid.
        out: None, or a preallocated tensor of w's shape that receives the values. If it is bfloat16, it receives the
            float32 grid value rounded to bfloat16: codes times scale may need more than 8 significant bits, so a
            model that computes in bfloat16 must round the loaded artifact in the same way, as
            `model.load(...).bfloat16()` does.
        scales: None, or scales that another rule has found, float32 on w's device.

    Returns:
        `out`, or a new float32 tensor. No gradient flows through it: training keeps float32 masters apart and hands
        them the gradient taken at this point (the straight-through rule).
    """
    codes_RC, scales = _grid_codes_torch(w, spec, scales)
    values_RC = codes_RC.float()
    for factor in _scale_factors_torch(scales, codes_RC.shape[0], spec):
        values_RC = values_RC * factor
    if spec.kind == "int":
        values_RC = values_RC + 0.0  # a weight rounded up to -0 is code 0, whose value is +0
    values = values_RC.reshape(w.shape)
    if out is None:
        return values.clone() if spec.kind == "f32" else values
    out.copy_(values)
    return out
