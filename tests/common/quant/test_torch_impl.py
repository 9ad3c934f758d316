"""The torch grids equal the NumPy definition in every bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.quant.grid import (
    FP8_UNSCALED_GRID,
    GridSpec,
    dequantize,
    fp8_e4m3_bits,
    parse_grid_spec,
    quantize,
    rms_sigma,
    round_to_bf16,
)
from common.quant.torch_impl import fake_quantize_torch, quantize_torch, rms_sigma_torch

LABELS = ["int2", "int3/tensor", "int4", "int4/f32", "int5/clip2.5", "int6/clip12.85", "int6/clip0.01"]
LABELS += ["int7/f32/clip4", "int8", "int8/tensor/clip31.75", "fp8", "fp8/f32", "fp8/tensor", "fp8/none", "bf16", "f32"]


def assert_same_bits(weights: np.ndarray, spec: GridSpec) -> None:
    q = quantize(weights, spec)
    codes, scales = quantize_torch(torch.from_numpy(weights), spec)
    assert codes.numpy().dtype == q.codes.dtype
    assert tuple(codes.shape) == q.codes.shape
    assert codes.numpy().tobytes() == q.codes.tobytes()
    assert scales.numpy().tobytes() == q.scales.tobytes()
    values = fake_quantize_torch(torch.from_numpy(weights), spec)
    assert values.dtype == torch.float32
    assert tuple(values.shape) == weights.shape
    assert values.numpy().tobytes() == dequantize(q).tobytes()


any_finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)


@settings(max_examples=300, deadline=None)
@given(weights=hnp.arrays(np.float32, shapes, elements=any_finite), label=st.sampled_from(LABELS))
def test_any_finite_weights(weights, label):
    assert_same_bits(weights, parse_grid_spec(label))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-44, 38),
    n_rows=st.integers(1, 9),
    n_columns=st.integers(1, 300),
    label=st.sampled_from(LABELS),
)
def test_gaussian_rows_of_any_magnitude(seed, exponent, n_rows, n_columns, label):
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", under="ignore"):
        weights = (rng.standard_normal((n_rows, n_columns)) * 10.0**exponent).astype(np.float32)
    assert_same_bits(np.nan_to_num(weights), parse_grid_spec(label))


@pytest.mark.parametrize("label", LABELS)
def test_rows_exactly_on_ties(label):
    steps = np.arange(-300, 301, dtype=np.float32) / 2
    assert_same_bits(np.stack([steps, steps * 3, steps / 1024, np.zeros_like(steps)]), parse_grid_spec(label))


def test_sigma_adds_in_the_same_order():
    rng = np.random.default_rng(0)
    for n_columns in (0, 1, 2, 3, 63, 64, 65, 1000):
        magnitudes = 1e3 ** rng.standard_normal((17, n_columns))
        weights = (rng.standard_normal((17, n_columns)) * magnitudes).astype(np.float32)
        assert rms_sigma_torch(torch.from_numpy(weights)).numpy().tobytes() == rms_sigma(weights).tobytes()


@pytest.fixture(scope="module")
def every_upper_half() -> np.ndarray:
    """Every sign, exponent and 7-bit mantissa with six low halves around the ties: the finite ones."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = (upper[:, None] | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).reshape(-1)
    values = bits.view(np.float32)
    return values[np.isfinite(values)]


def test_fp8_cast_is_torchs_cast(every_upper_half):
    clamped = torch.from_numpy(every_upper_half).clamp(-448, 448)
    expected = clamped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(fp8_e4m3_bits(every_upper_half), expected)
    below = np.abs(every_upper_half) < 464  # where torch itself rounds down to 448
    unclamped = torch.from_numpy(every_upper_half[below]).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(fp8_e4m3_bits(every_upper_half[below]), unclamped)


def test_bf16_rounding_is_torchs(every_upper_half):
    expected = torch.from_numpy(every_upper_half).bfloat16().float().numpy()
    assert round_to_bf16(every_upper_half).tobytes() == expected.tobytes()


@pytest.mark.parametrize("label", LABELS)
def test_out_receives_the_values_rounded_once(label):
    spec = parse_grid_spec(label)
    weights = torch.randn(11, 29, generator=torch.Generator().manual_seed(3))
    expected = fake_quantize_torch(weights, spec)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((11, 29), float("nan"), dtype=dtype)
        returned = fake_quantize_torch(weights, spec, out=out)
        assert returned is out
        assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("label", LABELS)
def test_input_is_left_alone_and_carries_no_gradient(label):
    spec = parse_grid_spec(label)
    weights = torch.randn(4, 8, requires_grad=True)
    before = weights.detach().clone()
    values = fake_quantize_torch(weights, spec)
    assert not values.requires_grad
    values.zero_()
    codes, _ = quantize_torch(weights, spec)
    codes.zero_()
    assert torch.equal(weights.detach(), before)


def test_bfloat16_and_strided_inputs():
    weights = torch.randn(8, 12, generator=torch.Generator().manual_seed(5))
    spec = GridSpec(bits=4)
    assert torch.equal(fake_quantize_torch(weights.t(), spec), fake_quantize_torch(weights.t().contiguous(), spec))
    half = weights.bfloat16()
    assert torch.equal(fake_quantize_torch(half, spec), fake_quantize_torch(half.float(), spec))


@pytest.mark.parametrize("label", LABELS)
def test_no_value_is_ever_read_back(label):
    """On the meta device there are no values: anything that asked for one would raise."""
    weights = torch.empty(6, 10, device="meta")
    codes, _ = quantize_torch(weights, parse_grid_spec(label))
    out = torch.empty(6, 10, device="meta", dtype=torch.bfloat16)
    assert fake_quantize_torch(weights, parse_grid_spec(label), out=out) is out
    assert codes.shape == weights.shape


@pytest.mark.parametrize("label", LABELS)
def test_nan_shows(label):
    weights = torch.ones(3, 4)
    weights[1, 2] = float("nan")
    assert fake_quantize_torch(weights, parse_grid_spec(label)).isnan().any()


def test_unscaled_fp8_is_the_seeds_cast():
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(7)) * 0.02
    assert torch.equal(fake_quantize_torch(weights, FP8_UNSCALED_GRID), weights.to(torch.float8_e4m3fn).float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("label", LABELS)
def test_captured_cuda_graph_gives_the_same_bits(label):
    spec = parse_grid_spec(label)
    rng = np.random.default_rng(9)
    first, second = (rng.standard_normal((65, 129)).astype(np.float32) * scale for scale in (1.0, 0.003))
    weights = torch.from_numpy(first).cuda()
    out = torch.empty_like(weights)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        fake_quantize_torch(weights, spec, out=out)  # loads kernels before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fake_quantize_torch(weights, spec, out=out)
    for values in (first, second):
        weights.copy_(torch.from_numpy(values))
        graph.replay()
        assert out.cpu().numpy().tobytes() == dequantize(quantize(values, spec)).tobytes()
