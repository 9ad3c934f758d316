"""The NumPy grids: golden vectors, exact rules, extreme rows, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.errors import ArtifactError, ConfigError
from common.quant.bitpack import pack_codes, unpack_codes
from common.quant.grid import (
    BF16_GRID,
    F32_GRID,
    FP8_ROW_GRID,
    FP8_UNSCALED_GRID,
    GRID_SCALE_MAX,
    GRID_SCALE_MIN,
    GridSpec,
    dequantize,
    fp8_e4m3_values,
    parse_grid_spec,
    quantize,
    rms_sigma,
    round_to_bf16,
)

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "quant.npz"
LABELS = ["int2", "int3/clip2", "int4", "int5/tensor", "int6/clip12.85", "int8/f32", "int8/tensor/f32/clip3.5"]
LABELS += ["fp8", "fp8/tensor/f32", "fp8/none", "bf16", "f32"]
F32_MAX = float(np.finfo(np.float32).max)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("bits", [4, 5, 6])
def test_every_golden_array_of_the_seed_is_reproduced(golden, bits):
    weights = golden["W"]
    qmax = 2 ** (bits - 1) - 1
    from_f32_scale = quantize(weights, GridSpec(bits=bits, scale_dtype="f32"))
    packed = pack_codes((from_f32_scale.codes + np.int8(qmax)).view(np.uint8), bits)
    np.testing.assert_array_equal(packed, golden[f"packed{bits}"])
    back = unpack_codes(golden[f"packed{bits}"], bits, weights.size).astype(np.int16) - qmax
    np.testing.assert_array_equal(back.reshape(weights.shape), from_f32_scale.codes)
    # the seed bounds the maximum, not the scale, and multiplies the float32-scale codes by the bf16 scale
    seed_scale = round_to_bf16(np.maximum(np.abs(weights).max(1), np.float32(1e-8)) / np.float32(qmax))
    np.testing.assert_array_equal(seed_scale, golden[f"scale{bits}"])
    np.testing.assert_array_equal(from_f32_scale.codes * seed_scale[:, None], golden[f"dequant{bits}"])
    # our scales are the golden ones wherever a row is not all zero
    ours = quantize(weights, GridSpec(bits=bits))
    live = np.abs(weights).max(1) > 0
    assert live.sum() == 47
    np.testing.assert_array_equal(ours.scales[live], golden[f"scale{bits}"][live])
    differing = np.mean(ours.codes != from_f32_scale.codes)
    assert 0.002 < differing < 0.02
    our_error = np.square(dequantize(ours) - weights).mean()
    assert our_error <= np.square(golden[f"dequant{bits}"] - weights).mean()


def test_golden_fp8_is_the_unscaled_cast(golden):
    values = dequantize(quantize(golden["W"], FP8_UNSCALED_GRID))
    assert values.tobytes() == golden["fp8"].tobytes()


@pytest.mark.parametrize("label", ["int4", "int6/clip3", "int8/f32", "int5/tensor"])
def test_integer_rule_against_scalar_arithmetic(label):
    spec = parse_grid_spec(label)
    rng = np.random.default_rng(5)
    weights = (rng.standard_normal((6, 37)) * np.exp(rng.normal(0, 3, (6, 1)))).astype(np.float32)
    q = quantize(weights, spec)
    rows = weights.reshape(1, -1) if spec.scale == "tensor" else weights
    assert q.scales.shape == (len(rows),)
    for row, codes, scale in zip(rows, q.codes.reshape(rows.shape), q.scales, strict=True):
        limit = max(abs(float(x)) for x in row)
        if spec.clip is not None:
            limit = spec.clip * (sum(float(x) ** 2 for x in row) / len(row)) ** 0.5
        tolerance = 2**-8 if spec.scale_dtype == "bf16" else 2**-23
        assert float(scale) == pytest.approx(limit / spec.qmax, rel=tolerance)
        for weight, code in zip(row, codes, strict=True):
            # binary64 division rounded to binary32 is binary32 division; Python's round is half to even
            ratio = float(np.float32(float(weight) / float(scale)))
            assert int(code) == min(max(round(ratio), -spec.qmax), spec.qmax)


def test_ties_go_to_even():
    spec = GridSpec(bits=4, scale_dtype="f32")
    weights = np.array([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]], np.float32)
    np.testing.assert_array_equal(quantize(weights, spec).codes, [[7, 0, 2, 2, 0, -2, -2, 4]])


# Without float32 scales: there qmax * scale / qmax may differ from scale in the last bit.
@pytest.mark.parametrize("label", [label for label in LABELS if label == "f32" or "f32" not in label])
def test_quantizing_again_changes_nothing_where_the_grid_is_kept(label):
    """Values on an absmax grid whose largest code is used are fixed points; casts always are."""
    spec = parse_grid_spec(label)
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((9, 40)).astype(np.float32)
    once = quantize(weights, spec)
    again = quantize(dequantize(once), spec)
    if spec.clip is None:
        np.testing.assert_array_equal(dequantize(again), dequantize(once))
    else:
        assert np.abs(dequantize(again) - dequantize(once)).max() <= 2 * once.scales.max()


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-20, 1e20, 1e38, F32_MAX])
def test_extreme_rows_stay_finite_without_warnings(label, magnitude, recwarn):
    spec = parse_grid_spec(label)
    weights = np.full((3, 5), magnitude, np.float32)
    weights[1] = [0.0, -0.0, magnitude, -magnitude, magnitude / 2]
    weights[2] = 0
    q = quantize(weights, spec)
    values = dequantize(q)
    assert np.isfinite(values).all()
    assert not values[2].any()
    assert not len(recwarn)
    if spec.scale != "none":
        assert (q.scales >= GRID_SCALE_MIN).all()
        assert (q.scales <= GRID_SCALE_MAX).all()
    if magnitude == 0:
        assert not values.any()
    elif 1e-30 < magnitude < 1e30 and spec.kind == "int" and spec.clip is None:
        np.testing.assert_allclose(values[1], weights[1], atol=magnitude / spec.qmax)


def test_zero_row_has_the_smallest_scale_and_zero_codes():
    q = quantize(np.zeros((2, 4), np.float32), GridSpec(bits=4))
    np.testing.assert_array_equal(q.scales, np.float32([GRID_SCALE_MIN] * 2))
    assert not q.codes.any()
    assert not np.signbit(dequantize(q)).any()


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1), (2, 3, 4), (2, 1, 3, 2), (0, 5), (5, 0), (0,)])
def test_every_shape(label, shape):
    spec = parse_grid_spec(label)
    weights = np.asarray(np.random.default_rng(2).standard_normal(shape), np.float32)
    q = quantize(weights, spec)
    values = dequantize(q)
    assert q.codes.shape == values.shape == q.shape == shape
    assert values.dtype == np.float32
    expected_scales = {"none": 0, "tensor": 1, "row": shape[0] if len(shape) > 1 else 1}[spec.scale]
    assert q.scales.shape == (expected_scales,)
    if len(shape) > 2:  # rows are the first axis, whatever the others are
        flat = quantize(weights.reshape(shape[0], -1), spec)
        np.testing.assert_array_equal(values.reshape(shape[0], -1), dequantize(flat))


def test_layout_in_memory_and_float_type_do_not_matter():
    weights = np.random.default_rng(3).standard_normal((6, 8)).astype(np.float32)
    spec = GridSpec(bits=5)
    expected = dequantize(quantize(weights, spec))
    np.testing.assert_array_equal(dequantize(quantize(np.asfortranarray(weights), spec)), expected)
    np.testing.assert_array_equal(dequantize(quantize(weights.astype(np.float64), spec)), expected)
    np.testing.assert_array_equal(dequantize(quantize(np.repeat(weights, 2, axis=1)[:, ::2], spec)), expected)


def test_results_do_not_share_memory_with_the_input():
    weights = np.ones((2, 2), np.float32)
    q = quantize(weights, F32_GRID)
    weights[:] = 5
    values = dequantize(q)
    values[:] = 7
    np.testing.assert_array_equal(q.codes, np.ones((2, 2), np.float32))


def test_all_fp8_patterns_and_saturation():
    patterns = np.array([code for code in range(256) if code & 127 != 127], np.uint8)
    values = fp8_e4m3_values(patterns)
    assert values.max() == 448
    assert values[values > 0].min() == 2.0**-9
    np.testing.assert_array_equal(quantize(values, FP8_UNSCALED_GRID).codes, patterns)
    assert np.isnan(fp8_e4m3_values(np.array([127, 255], np.uint8))).all()
    beyond = np.array([449, 464, 480, 1e9, F32_MAX, -465], np.float32)
    np.testing.assert_array_equal(dequantize(quantize(beyond, FP8_UNSCALED_GRID)), [448] * 5 + [-448])


def test_bf16_saturates_instead_of_overflowing():
    values = dequantize(quantize(np.array([F32_MAX, -F32_MAX], np.float32), BF16_GRID))
    np.testing.assert_array_equal(values, np.array([3.3895313892515355e38, -3.3895313892515355e38], np.float32))


def test_scaled_fp8_reaches_its_largest_value():
    q = quantize(np.array([[0.001, -0.02], [3.0, 5.0]], np.float32), FP8_ROW_GRID)
    np.testing.assert_array_equal(np.abs(fp8_e4m3_values(q.codes)).max(axis=1), [448, 448])


def test_sigma_is_the_root_mean_square():
    weights = np.random.default_rng(4).standard_normal((3, 1000)).astype(np.float32) + np.float32(2)
    np.testing.assert_allclose(rms_sigma(weights), np.sqrt(np.square(weights.astype(np.float64)).mean(1)), rtol=2**-24)


def test_clip_sets_the_step():
    weights = np.random.default_rng(6).standard_normal((1, 50_000)).astype(np.float32)
    q = quantize(weights, GridSpec(bits=8, clip=127 * 0.25, scale_dtype="f32"))
    assert q.scales[0] / rms_sigma(weights)[0] == pytest.approx(0.25, rel=1e-6)
    error = np.square(dequantize(q) - weights).mean() / np.square(weights).mean()
    assert error == pytest.approx(0.25**2 / 12, rel=0.02)  # uniform noise of one step


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("label", LABELS)
def test_nan_and_infinity_are_refused_by_name(bad, label):
    weights = np.ones((4, 4), np.float32)
    weights[2, 1] = bad
    with pytest.raises(ArtifactError, match=r"'blocks\.3\.w' holds 1 NaN or infinite"):
        quantize(weights, parse_grid_spec(label), "blocks.3.w")


def test_float64_beyond_float32_and_integers_are_refused():
    with pytest.raises(ArtifactError, match="1 NaN or infinite"):
        quantize(np.array([1e300]), GridSpec())
    with pytest.raises(ArtifactError, match="dtype int64"):
        quantize(np.arange(3), GridSpec())


@pytest.mark.parametrize("label", LABELS)
def test_labels_read_back(label):
    spec = parse_grid_spec(label)
    assert parse_grid_spec(spec.label) == spec


def test_defaults_of_a_kind():
    assert (GridSpec().bits, GridSpec().scale) == (4, "row")
    assert GridSpec("bf16") == GridSpec("bf16", 16, "none") == BF16_GRID
    assert GridSpec("fp8_e4m3") == FP8_ROW_GRID
    assert GridSpec(clip=3) == GridSpec(clip=3.0)
    assert isinstance(GridSpec(clip=3).clip, float)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "int5"}, {"bits": 1}, {"bits": 9}, {"bits": 4.0}, {"bits": True}, {"scale": "column"},
        {"scale": "none"}, {"scale_dtype": "f16"}, {"clip": 0.0}, {"clip": -1.0}, {"clip": float("nan")},
        {"clip": float("inf")}, {"clip": "3"}, {"kind": "fp8_e4m3", "bits": 4}, {"kind": "fp8_e4m3", "clip": 3.0},
        {"kind": "bf16", "scale": "row"}, {"kind": "f32", "bits": 16},
    ],
)  # fmt: skip
def test_meaningless_specs_are_refused(fields):
    with pytest.raises(ConfigError):
        GridSpec(**fields)


@pytest.mark.parametrize(
    "text",
    ["", "int", "int1", "int9", "int44", "fp16", "int4/", "int4/none", "int4/clipx", "int4/row/tensor", "bf16/row"],
)
def test_unreadable_grid_texts_are_refused(text):
    with pytest.raises(ConfigError):
        parse_grid_spec(text)
