"""RMS normalisation by hand: values and gradients against the formula in float64, and what stays PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.rms_norm import rms_norm_by_hand, rms_norm_torch


def formula(x: np.ndarray, g: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows over their root mean square, and the gradient of sum(g * rows), by the quotient rule."""
    r = 1.0 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x * r, r * g - x * r**3 * (g * x).mean(-1, keepdims=True)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2, 3, 64), (2, 2, 4, 33)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_values_and_gradient(shape, dtype, limit, scale):
    rng = np.random.default_rng(sum(shape))
    x, g = scale * rng.standard_normal(shape), rng.standard_normal(shape)
    tensor = torch.from_numpy(x).to(dtype).requires_grad_()
    assert rms_norm_by_hand(tensor)
    out = rms_norm_torch(tensor, 1e-6)
    out.backward(torch.from_numpy(g).to(dtype))
    assert tensor.grad is not None
    terms = 1.0, np.abs(g).max() / np.sqrt((x * x).mean(-1) + 1e-6).min()  # of which the gradient is a difference
    for found, wanted, size in zip((out, tensor.grad), formula(x, g, 1e-6), terms, strict=True):
        assert found.dtype == dtype
        assert np.abs(found.detach().double().numpy() - wanted).max() <= limit * size


def test_rows_of_zeros_and_transposed_rows():
    x = torch.zeros(2, 3, requires_grad=True)
    rms_norm_torch(x, 1e-6).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((2, 3), 1e3))
    wide = torch.randn(4, 5, 6).transpose(0, 1)
    torch.testing.assert_close(rms_norm_torch(wide, 1e-6), rms_norm_torch(wide.contiguous(), 1e-6))


def test_other_dtypes_and_compilation_are_left_to_pytorch():
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    assert not rms_norm_by_hand(x)
    assert not rms_norm_by_hand(torch.empty(3, 8, device="meta"))
    torch.testing.assert_close(rms_norm_torch(x, 1e-6), torch.nn.functional.rms_norm(x, (8,), eps=1e-6))
