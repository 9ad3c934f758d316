"""Storage grids for weights: scale, quantize, dequantize. The definition: every backend equals it bit for bit.

Letters: R rows (first axis), C columns (all other axes flattened). A tensor of less than two axes is one row.

What training snaps to, what export writes and what scoring reads is `dequantize(quantize(w, spec))`. Two things make
that possible on different machines and frameworks:

- the scale is rounded to the type it is stored in *before* codes are computed from it, so the rule never sees a scale
  that the file does not hold;
- every operation used is one that IEEE 754 defines exactly (division, multiplication, rounding half to even,
  comparison), and the one sum there is (for a scale in units of sigma) adds in a fixed order in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from common.errors import ArtifactError, ConfigError
from common.quant.trellis import trellis_halves

GRID_KINDS = ("int", "trellis", "fp8_e4m3", "bf16", "f32")
SMALL_CODE_KINDS = ("int", "trellis", "fp8_e4m3")  # codes of a byte, which an entropy coder takes one by one
GRID_SCALES = ("row", "tensor", "cross", "none")
GRID_SCALE_DTYPES = ("bf16", "f32")

# Bounds of every scale. Both are powers of two, hence exact in bf16 and float32. With them no product code * scale is
# ever subnormal (devices disagree about those) or infinite: 448 * 2**118 < 2**127. An all-zero row gets the lower
# bound.
GRID_SCALE_MIN = 2.0**-126
GRID_SCALE_MAX = 2.0**118

FP8_E4M3_MAX = 448.0
BF16_MAX = float(np.uint32(0x7F7F0000).view(np.float32))

# What GridSpec(kind) alone means: bits and scale.
_GRID_KIND_DEFAULTS = {
    "int": (4, "row"), "trellis": (8, "row"), "fp8_e4m3": (8, "row"), "bf16": (16, "none"), "f32": (32, "none"),
}  # fmt: skip


@dataclass(frozen=True)
class GridSpec:
    """Which values a tensor may take in storage, and how its scale is found.

    Args:
        kind: "int": symmetric integers -qmax..qmax, qmax = 2**(bits-1) - 1, times a scale; "trellis": such integers, to
            which the path of the row adds 0 or 1/2 (trellis.py), times a scale; "fp8_e4m3": 8-bit floats (4 exponent
            bits, 3 mantissa bits, no infinity) times a scale; "bf16" and "f32": that type itself.
        bits: nominal width of a code: 2..8 for "int", else 8, 16, 32; 0 becomes 4 for "int", else the kind's width. The
            entropy coder decides what a code costs; the step, scale / sigma, decides size and loss.
        scale: "row" (one scale for each index of the first axis), "tensor" (one), "cross" (one for each row and one for
            each column, the step is their product; "int" and "trellis" only), or "none" (codes are the values); ""
            becomes "none" for "bf16" and "f32", else "row".
        scale_dtype: type in which scales are stored, and to which they are rounded before they are used.
        clip: None: the largest magnitude of the row maps to the largest code. c > 0: c times the row's sigma does,
            larger weights saturate; sigma is the root mean square. The step is then clip / qmax sigmas: any step can
            be had.

    Raises:
        ConfigError: a field or a combination of fields has no meaning.
    """

    kind: str = "int"
    bits: int = 0
    scale: str = ""
    scale_dtype: str = "bf16"
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in GRID_KINDS:
            raise ConfigError(f"grid kind {self.kind!r} is unknown: use one of {', '.join(GRID_KINDS)}")
        kind_bits, kind_scale = _GRID_KIND_DEFAULTS[self.kind]
        if type(self.bits) is not int:
            raise ConfigError(f"grid bits is {self.bits!r}: give a whole number")
        object.__setattr__(self, "bits", self.bits or kind_bits)
        object.__setattr__(self, "scale", self.scale or kind_scale)
        if self.scale not in GRID_SCALES:
            raise ConfigError(f"grid scale {self.scale!r} is unknown: use one of {', '.join(GRID_SCALES)}")
        if self.scale_dtype not in GRID_SCALE_DTYPES:
            raise ConfigError(f"scale dtype {self.scale_dtype!r} is unknown: use one of {', '.join(GRID_SCALE_DTYPES)}")
        if self.kind == "int":
            if not 2 <= self.bits <= 8:
                raise ConfigError(f"an integer grid of {self.bits} bits is not supported: use 2 to 8")
        elif self.scale == "cross" and self.kind != "trellis":
            raise ConfigError(f"scale='cross' is for integer grids only, got kind {self.kind!r}")
        elif self.bits != kind_bits:
            raise ConfigError(f"grid kind {self.kind!r} has {kind_bits} bits, got {self.bits}")
        if self.holds_integers and self.scale == "none":
            raise ConfigError("an integer grid needs a scale: use scale='row' or scale='tensor'")
        if self.kind in ("bf16", "f32") and self.scale != "none":
            raise ConfigError(f"grid kind {self.kind!r} has no scale: use scale='none', got {self.scale!r}")
        if self.clip is not None:
            if self.kind != "int":
                raise ConfigError(f"clip is for integer grids only, got clip={self.clip!r} with kind {self.kind!r}")
            if type(self.clip) not in (int, float) or not (1e-6 <= self.clip <= 1e6):
                raise ConfigError(f"clip is {self.clip!r}: give 1e-6 to 1e6 sigmas, or None for the maximum")
            object.__setattr__(self, "clip", float(self.clip))

    @property
    def holds_integers(self) -> bool:
        """Whether codes are integers in -qmax..qmax."""
        return self.kind in ("int", "trellis")

    @property
    def qmax(self) -> int:
        """Largest code of an integer grid."""
        return 2 ** (self.bits - 1) - 1

    @property
    def label(self) -> str:
        """Short text for tables, read back by parse_grid_spec: "int4", "int6/clip12.85", "fp8/none", "bf16".

        "trellis8/cross" is not: no rule rounds a single weight onto it.
        """
        if self.kind in ("bf16", "f32"):
            return self.kind
        parts = [f"{self.kind}{self.bits}" if self.holds_integers else "fp8"]
        if self.scale != "row":
            parts.append(self.scale)
        if self.scale != "none" and self.scale_dtype != "bf16":
            parts.append(self.scale_dtype)
        if self.clip is not None:
            parts.append(f"clip{self.clip:g}" if float(f"{self.clip:g}") == self.clip else f"clip{self.clip!r}")
        return "/".join(parts)


BF16_GRID = GridSpec("bf16")
F32_GRID = GridSpec("f32")
FP8_ROW_GRID = GridSpec("fp8_e4m3")
FP8_UNSCALED_GRID = GridSpec("fp8_e4m3", scale="none")


def parse_grid_spec(text: str) -> GridSpec:
    """Read a grid from an option's text: KIND[/row|tensor|cross|none][/bf16|f32][/clipSIGMAS].

    KIND is int2..int8, fp8, bf16 or f32; cross stands where row does. Missing parts are row scales stored in
    bf16, without clipping.
    Examples: "int4", "int6/clip12.85", "int8/tensor/f32", "fp8/none".

    Raises:
        ConfigError: the text is not of that form, or names a grid that does not exist.
    """
    head, *options = text.split("/")
    if head in ("bf16", "f32"):
        fields: dict[str, object] = {"kind": head}
    elif head == "fp8":
        fields = {"kind": "fp8_e4m3"}
    elif len(head) == 4 and head.startswith("int") and head[3] in "2345678":
        fields = {"kind": "int", "bits": int(head[3])}
    else:
        raise ConfigError(f"grid {text!r} is unknown: use int2..int8, fp8, bf16 or f32, as in 'int4' or 'fp8/none'")
    seen: set[str] = set()
    for option in options:
        if option in GRID_SCALES:
            key, value = "scale", option
        elif option in GRID_SCALE_DTYPES:
            key, value = "scale_dtype", option
        elif option.startswith("clip"):
            try:
                key, value = "clip", float(option[4:])
            except ValueError:
                raise ConfigError(f"grid {text!r}: {option!r} needs a number of sigmas, as in 'clip12.85'") from None
        else:
            raise ConfigError(f"grid {text!r}: {option!r} is none of row, tensor, cross, none, bf16, f32, clipSIGMAS")
        if key in seen:
            raise ConfigError(f"grid {text!r} gives its {key} twice")
        seen.add(key)
        fields[key] = value
    return GridSpec(**fields)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor on its grid, as it is stored.

    Args:
        spec: its grid.
        codes: of `shape`. "int", "trellis": int8 in -qmax..qmax. "fp8_e4m3": uint8 bit patterns. "bf16": uint16 bit
            patterns. "f32": float32 values.
        scales: float32, each exact in spec.scale_dtype: (R,) for "row", (1,) for "tensor", (R + C,) for "cross" (rows,
            then columns), (0,) for "none".
        shape: of the tensor.
    """

    spec: GridSpec
    codes: np.ndarray
    scales: np.ndarray
    shape: tuple[int, ...]


def grid_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """(R, C) of a shape: rows are the first axis; fewer than two axes make one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def grid_scale_count(shape: tuple[int, ...], spec: GridSpec) -> int:
    """Number of scales that a tensor of this shape has on this grid."""
    return {"none": 0, "tensor": 1, "row": grid_rows(shape)[0], "cross": sum(grid_rows(shape))}[spec.scale]


def round_to_bf16(x: np.ndarray) -> np.ndarray:
    """Nearest bf16 value of each float32, ties to even, as float32; magnitudes above the largest bf16 become infinite.

    Numerics: NaN is not supported; callers refuse it first.
    """
    return (bf16_bits(x).astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_bits(x: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of round_to_bf16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)


def fp8_e4m3_bits(x: np.ndarray) -> np.ndarray:
    """uint8 bit patterns of the nearest e4m3 value of each float32: ties to even, saturating at +-448.

    Source: OCP 8-bit floating point, E4M3: bias 7, subnormals in steps of 2**-9, no infinity, NaN = S.1111.111. Equal
    to torch's cast to float8_e4m3fn after clamping to +-448 (torch's own cast gives NaN from 464 on). Minus zero
    stays minus zero.

    Numerics: NaN is not supported; callers refuse it first.
    """
    x = np.ascontiguousarray(x, np.float32)
    sign = ((x.view(np.uint32) >> np.uint32(24)) & np.uint32(0x80)).astype(np.uint8)
    magnitude = np.minimum(np.abs(x), np.float32(FP8_E4M3_MAX))
    bits = magnitude.view(np.uint32)
    # Normal numbers: round the 23-bit mantissa to 3 bits (a carry runs into the exponent, as it should), then change
    # the bias.
    rounded = (bits + (np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1)))) >> np.uint32(20)
    normal = rounded - np.uint32((127 - 7) << 3)
    # Below 2**-6 the grid is uniform; 8 steps of it are the smallest normal number, whose pattern is 8 as well.
    subnormal = np.rint(magnitude * np.float32(512.0)).astype(np.uint32)
    return sign | np.where(magnitude < np.float32(2.0**-6), subnormal, normal).astype(np.uint8)


def fp8_e4m3_values(codes: np.ndarray) -> np.ndarray:
    """float32 value of each e4m3 bit pattern (uint8). 0x7F and 0xFF are NaN."""
    pattern = np.arange(256)
    exponent, mantissa = (pattern >> 3) & 15, pattern & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value = np.where(pattern & 127 == 127, np.nan, value)
    return np.where(pattern >= 128, -value, value).astype(np.float32)[codes]


def rms_sigma(w_RC: np.ndarray) -> np.ndarray:
    """Root mean square of each row, float32 (R,), in operations that give every backend the same bits.

    Numerics: squares of float32 are exact in float64. The sum halves the row again and again (zero-padded to a power of
    two), adding the upper half to the lower, which is elementwise and hence the same everywhere. Square roots are not
    (torch's on CPU is not correctly rounded), so the library's one is only a guess: the result is the float32 s whose
    neighbourhood holds the mean m, mid(previous, s)**2 < m <= mid(s, next)**2, and both squares are exact in float64.
    """
    n_columns = w_RC.shape[1]
    if n_columns == 0:
        return np.zeros(w_RC.shape[0], np.float32)
    width = 1 << (n_columns - 1).bit_length()
    sums = np.zeros((w_RC.shape[0], width))
    np.square(w_RC, out=sums[:, :n_columns], dtype=np.float64)
    while width > 1:
        width //= 2
        sums = sums[:, :width] + sums[:, width:]
    mean = sums[:, 0] / n_columns
    guess = np.sqrt(mean).astype(np.float32)
    below, above = np.nextafter(guess, np.float32(0)), np.nextafter(guess, np.float32(np.inf))
    lower_mid, upper_mid = (guess.astype(np.float64) + below) / 2, (guess.astype(np.float64) + above) / 2
    return np.where(mean <= lower_mid * lower_mid, below, np.where(mean <= upper_mid * upper_mid, guess, above))


def grid_scales(w_RC: np.ndarray, spec: GridSpec) -> np.ndarray:
    """Scales of a float32 matrix on a grid, float32, already rounded to spec.scale_dtype.

    Returns:
        (R,), (1,), (R + C,) or (0,) by spec.scale; every scale lies in GRID_SCALE_MIN..GRID_SCALE_MAX. Columns of
        "cross" get 1: a rule that knows better (gptq.plan_scales) gives quantize its own.
    """
    if spec.scale == "none":
        return np.zeros(0, np.float32)
    if spec.scale == "tensor":
        w_RC = w_RC.reshape(1, -1)
    if spec.clip is not None:
        with np.errstate(over="ignore"):  # infinite: bounded below
            limit = (rms_sigma(w_RC).astype(np.float64) * spec.clip).astype(np.float32)
    else:
        limit = np.abs(w_RC).max(axis=1, initial=np.float32(0))
    top = np.float32(spec.qmax if spec.kind == "int" else FP8_E4M3_MAX)
    scales = np.clip(limit / top, np.float32(GRID_SCALE_MIN), np.float32(GRID_SCALE_MAX))
    scales = round_to_bf16(scales) if spec.scale_dtype == "bf16" else scales
    return np.concatenate([scales, np.ones(w_RC.shape[1], np.float32)]) if spec.scale == "cross" else scales


def scale_factors(scales: np.ndarray, shape: tuple[int, ...], spec: GridSpec) -> list[np.ndarray]:
    """What codes are multiplied by, in this order: nothing, (R, 1) or (1, 1), and for "cross" then (1, C)."""
    if spec.scale == "none":
        return []
    if spec.scale != "cross":
        return [scales[:, None]]
    n_rows = grid_rows(shape)[0]
    return [scales[:n_rows, None], scales[None, n_rows:]]


def quantize(w: np.ndarray, spec: GridSpec, name: str = "tensor", scales: np.ndarray | None = None) -> QuantizedTensor:
    """Put a tensor on its grid.

    Source: symmetric absmax quantization, q = clip(round(w / s), -qmax, qmax). Ours differs from the usual code in
    that s is rounded to its stored type first, and in the bounds on s.

    Args:
        w: any shape, any float type (cast to float32 first), finite.
        spec: the grid.
        name: what to call the tensor in an error.
        scales: None, or scales that another rule has found, as QuantizedTensor holds them: free steps.

    Returns:
        Codes and scales; see QuantizedTensor.

    Raises:
        ArtifactError: w holds NaN or infinity, or is not of a float type; scales are of another number or not exact in
            their stored type.
        ConfigError: the grid is "trellis".

    Numerics: float32 division, rounding half to even. Integer codes of an all-zero row are 0 with scale
    GRID_SCALE_MIN. Rows whose maximum is below qmax * GRID_SCALE_MIN use that same scale; weights beyond qmax *
    GRID_SCALE_MAX saturate.
    """
    w = np.asarray(w)
    if spec.kind == "trellis":
        raise ConfigError(f"{name!r} on grid {spec.label}: a code depends on its row's; plan.plan_model finds them")
    if w.dtype.kind != "f":
        raise ArtifactError(f"{name!r} has dtype {w.dtype}: only float tensors can be quantized")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite and is refused below
        w = np.ascontiguousarray(w, np.float32).reshape(w.shape)
    n_bad = w.size - int(np.count_nonzero(np.isfinite(w)))
    if n_bad:
        raise ArtifactError(
            f"{name!r} holds {n_bad} NaN or infinite values of {w.size}: nothing sound can be stored; "
            "look at the loss and the gradients of the step before"
        )
    no_scales = np.zeros(0, np.float32)
    if spec.kind == "f32":
        return QuantizedTensor(spec, w.copy(), no_scales, w.shape)
    if spec.kind == "bf16":
        bits = bf16_bits(np.clip(w, np.float32(-BF16_MAX), np.float32(BF16_MAX)))
        return QuantizedTensor(spec, bits.reshape(w.shape), no_scales, w.shape)
    w_RC = w.reshape(grid_rows(w.shape))
    if scales is None:
        scales = grid_scales(w_RC, spec)
    elif scales.shape != (grid_scale_count(w.shape, spec),) or (
        spec.scale_dtype == "bf16" and not np.array_equal(round_to_bf16(scales), scales)
    ):
        raise ArtifactError(
            f"{name!r} got scales of shape {scales.shape}: grid {spec.label} needs "
            f"({grid_scale_count(w.shape, spec)},) exact in {spec.scale_dtype}"
        )
    with np.errstate(over="ignore"):  # a huge weight over a scale bounded or clipped far below it: saturates below
        ratio_RC = w_RC
        for factor in scale_factors(scales, w.shape, spec):
            ratio_RC = ratio_RC / factor
    if spec.kind == "int":
        top = np.float32(spec.qmax)
        codes = np.clip(np.rint(ratio_RC), -top, top).astype(np.int8)
    else:
        codes = fp8_e4m3_bits(ratio_RC)
    return QuantizedTensor(spec, codes.reshape(w.shape), scales, w.shape)


def dequantize(q: QuantizedTensor) -> np.ndarray:
    """Values of a quantized tensor: code times scale (of the row, then of the column) in float32, of q.shape.

    On a "trellis" grid 0 or 1/2 is added to the code first, exactly.
    """
    if q.spec.kind == "f32":
        return q.codes.astype(np.float32, copy=True).reshape(q.shape)
    if q.spec.kind == "bf16":
        return (q.codes.astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(q.shape)
    values = q.codes.astype(np.float32) if q.spec.holds_integers else fp8_e4m3_values(q.codes)
    if q.spec.scale == "none":
        return values.reshape(q.shape)
    values_RC = values.reshape(grid_rows(q.shape))
    if q.spec.kind == "trellis":
        values_RC += trellis_halves(q.codes.reshape(values_RC.shape))
    for factor in scale_factors(q.scales, q.shape, q.spec):
        values_RC *= factor
    return values_RC.reshape(q.shape)
