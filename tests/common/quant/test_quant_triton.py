"""All tensors in one launch equal one tensor at a time in every bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.quant.grid import dequantize, parse_grid_spec, quantize
from common.quant.torch_impl import fake_quantize_torch
from common.quant.triton_impl import FakeQuantizeAll

LABELS = ["int2", "int3/tensor", "int4", "int4/f32", "int5/clip2.5", "int6/clip12.85", "int6/clip0.01"]
LABELS += ["int7/f32/clip4", "int8", "int8/tensor/clip31.75", "fp8", "fp8/f32", "fp8/tensor", "fp8/none", "bf16", "f32"]


def run_all(masters, labels, device, dtypes=None):
    """Masters (NumPy) on their grids; weights are poisoned before."""
    masters = [torch.from_numpy(np.ascontiguousarray(m)).to(device) for m in masters]
    dtypes = dtypes or [torch.float32] * len(masters)
    weights = [torch.full(m.shape, float("nan"), device=device, dtype=d) for m, d in zip(masters, dtypes, strict=True)]
    specs = [None if label is None else parse_grid_spec(label) for label in labels]
    FakeQuantizeAll(masters, specs, weights)()
    return [w.cpu() for w in weights]


def assert_same_bits(masters, labels, device):
    for found, master, label in zip(run_all(masters, labels, device), masters, labels, strict=True):
        expected = master if label is None else dequantize(quantize(master, parse_grid_spec(label)))
        assert found.numpy().tobytes() == expected.tobytes(), label


@pytest.mark.parametrize("shape", [(5, 7), (3, 1), (1, 13), (9,), (), (2, 3, 4), (3, 130)])
def test_every_grid_in_one_launch(kernel_device, shape):
    rng = np.random.default_rng(len(shape))
    masters = [(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3)).astype(np.float32) for _ in LABELS]
    masters.append(masters[0] * 3)
    assert_same_bits(masters, [*LABELS, None], kernel_device)


@pytest.mark.parametrize("exponent", [-44, -40, -38, -30, 0, 20, 30, 38])
def test_any_magnitude(kernel_device, exponent):
    rng = np.random.default_rng(exponent + 50)
    with np.errstate(over="ignore", under="ignore"):
        drawn = [(rng.standard_normal((4, 33)) * 10.0**exponent).astype(np.float32) for _ in LABELS]
    top = np.finfo(np.float32).max
    assert_same_bits([np.nan_to_num(m, posinf=top, neginf=-top) for m in drawn], LABELS, kernel_device)


def test_ties_zeros_and_signs(kernel_device):
    steps = np.arange(-300, 301, dtype=np.float32) / 2
    rows = np.stack([steps, steps * 3, steps / 1024, np.zeros_like(steps), -np.zeros_like(steps)])
    assert_same_bits([rows] * len(LABELS), LABELS, kernel_device)


@pytest.mark.parametrize("columns", [64, 67])
def test_quotients_beside_ties(kernel_device, columns):
    """Weights one float32 beside the middle between two codes, any scale: a quotient off by a bit shows."""
    rng = np.random.default_rng(columns)
    scales = np.ldexp(1 + rng.random(48), rng.integers(-90, 90, 48)).astype(np.float32)[:, None]
    codes = rng.integers(-7, 7, (48, columns)) + np.float32(0.5)
    rows = np.nextafter(codes * scales, rng.choice([-np.inf, 0, np.inf], codes.shape)).astype(np.float32)
    rows[:, 0] = 7 * scales[:, 0]
    labels = ["int4/f32", "int4", "fp8/f32", "int6/clip4"]
    assert_same_bits([rows] * len(labels), labels, kernel_device)
    # Rows one by one: a single row may end inside a group of eight, which is read whole where all rows allow it.
    assert_same_bits(list(rows[:5]), ["int4/tensor"] * 5, kernel_device)


def test_every_bfloat16_neighbourhood(kernel_device):
    """Every sign, exponent and 7-bit mantissa with low halves around the ties, through the casts without a scale."""
    upper = np.arange(1 << 16, dtype=np.uint32)[::3] << 16
    values = (upper[:, None] | np.array([0, 0x7FFF, 0x8000, 0x8001], np.uint32)).reshape(-1).view(np.float32)
    values = values[np.isfinite(values)]
    labels = ["fp8/none", "bf16", "f32"]
    assert_same_bits([values] * 3, labels, kernel_device)


def test_rows_longer_than_a_block_and_sums_in_their_order(kernel_device):
    rng = np.random.default_rng(3)
    masters = []
    for columns in (1023, 1024, 1025, 2600):
        magnitudes = 1e3 ** rng.standard_normal((2, columns))
        masters.append((rng.standard_normal((2, columns)) * magnitudes).astype(np.float32))
    for label in ("int4", "int6/clip3", "fp8", "bf16"):
        assert_same_bits(masters, [label] * len(masters), kernel_device)


@pytest.mark.parametrize("label", LABELS)
def test_bfloat16_weights_hold_the_value_rounded_once(kernel_device, label):
    master = np.random.default_rng(5).standard_normal((6, 29)).astype(np.float32)
    (found,) = run_all([master], [label], kernel_device, [torch.bfloat16])
    expected = torch.full((6, 29), float("nan"), dtype=torch.bfloat16)
    fake_quantize_torch(torch.from_numpy(master), parse_grid_spec(label), out=expected)
    assert torch.equal(found, expected)


def test_a_plan_follows_its_masters(kernel_device):
    """Made once, called after each update; neighbours in memory and masters are left alone."""
    store = torch.randn(4 * 9 + 2, device=kernel_device)
    master = store[1:-1].view(4, 9)
    out = torch.full((4 * 9 + 2,), 7.0, device=kernel_device, dtype=torch.bfloat16)
    plan = FakeQuantizeAll([master], [parse_grid_spec("int4")], [out[1:-1].view(4, 9)])
    for scale in (1.0, 0.1):
        master.mul_(scale)
        before = store.clone()
        plan()
        assert torch.equal(store, before)
        expected = fake_quantize_torch(master, parse_grid_spec("int4")).bfloat16()
        assert torch.equal(out[1:-1].view(4, 9), expected)
        assert out[0] == out[-1] == 7.0


@pytest.mark.parametrize("label", LABELS)
def test_nan_shows(kernel_device, label):
    master = np.ones((3, 4), np.float32)
    master[1, 2] = np.nan
    (found,) = run_all([master], [label], kernel_device)
    assert found[1, 2].isnan()
    if "tensor" not in label:
        assert not found[[0, 2]].isnan().any()


def test_wrong_plans_are_named(kernel_device):
    spec = parse_grid_spec("int4")
    a, b = torch.zeros(3, 4, device=kernel_device), torch.zeros(4, 3, device=kernel_device)
    for masters, specs, weights in (([a], [spec], [b]), ([a.double()], [spec], [a]), ([a], [spec], [b.t()])):
        with pytest.raises(ValueError, match="tensor 0"):
            FakeQuantizeAll(masters, specs, weights)
    with pytest.raises(ValueError, match="2 grids"):
        FakeQuantizeAll([a], [spec, spec], [a])
    wide = torch.zeros(1, 20000, device=kernel_device)
    with pytest.raises(ValueError, match="20000 columns"):
        FakeQuantizeAll([wide], [parse_grid_spec("int4/clip3")], [wide])
    moved = torch.zeros(3, 4, device=kernel_device)
    plan = FakeQuantizeAll([moved], [spec], [a])
    moved.data = torch.zeros(3, 4, device=kernel_device)
    with pytest.raises(RuntimeError, match="moved"):
        plan()
