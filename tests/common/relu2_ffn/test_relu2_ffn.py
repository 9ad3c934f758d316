"""The squared-ReLU feed-forward: plain form against float64, Triton forms beside the plain one of the same dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.relu2_ffn.reference import relu2_ffn_reference, relu2_ffn_reference_gradients
from common.relu2_ffn.torch_impl import relu2_ffn_torch
from common.relu2_ffn.triton_impl import relu2_ffn_triton

FORMS = {
    "cublas": relu2_ffn_triton,
    "epilogues": lambda *a, **k: relu2_ffn_triton(*a, **k, fuse_matmuls=True),
}


def make_inputs(device, rows=50, width=24, hidden=40, out=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(rows + hidden)
    shapes = ((rows, width), (hidden, width), (out, hidden), (rows, out))
    return [torch.randn(s, generator=g).to(dtype).to(device) for s in shapes]


def value_and_gradients(form, inputs, **options):
    *inputs, dy = inputs
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = form(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.view(y.shape))]


def truth(inputs, **options):
    arrays = [t.double().cpu().numpy() for t in inputs]
    return [relu2_ffn_reference(*arrays[:3], **options), *relu2_ffn_reference_gradients(*arrays, **options)]


def root_mean_square(a):
    return float(np.sqrt(np.mean(np.square(a))))


@pytest.mark.parametrize("slope", [0.0, 0.5])
@pytest.mark.parametrize("rows", [1, 7])
def test_plain_form_equals_the_reference(slope, rows):
    inputs = [t.double() for t in make_inputs("cpu", rows)]
    options = {"negative_slope": slope, "eps": 1e-3}
    for ours, expected in zip(value_and_gradients(relu2_ffn_torch, inputs, **options), truth(inputs, **options)):
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_error_is_at_most_twice_that_of_the_plain_form(kernel_device, form, dtype, slope):
    inputs = make_inputs(kernel_device, dtype=dtype)
    options = {"negative_slope": slope, "eps": 1e-6}
    ours, theirs = (value_and_gradients(f, inputs, **options) for f in (FORMS[form], relu2_ffn_torch))
    for mine, other, expected in zip(ours, theirs, truth(inputs, **options), strict=True):
        assert mine.dtype == dtype
        errors = [root_mean_square(t.double().cpu().numpy() - expected) for t in (mine, other)]
        assert errors[0] <= 2 * errors[1] + 1e-5 * max(1.0, root_mean_square(expected))


@pytest.mark.parametrize("slope", [0.0, 0.25])
@pytest.mark.parametrize(
    ("form", "rows", "width", "hidden", "out"),
    [
        *(("cublas", *sizes) for sizes in ((1, 1, 1, 1), (3, 5, 7, 9), (33, 9, 530, 130), (65, 12, 31, 3))),
        *(("epilogues", *sizes) for sizes in ((1, 4, 4, 4), (33, 20, 36, 12), (70, 16, 100, 40))),
    ],
)
def test_odd_sizes(kernel_device, form, rows, width, hidden, out, slope):
    inputs = make_inputs(kernel_device, rows, width, hidden, out)
    options = {"negative_slope": slope, "eps": 1e-6}
    for mine, expected in zip(value_and_gradients(FORMS[form], inputs, **options), truth(inputs, **options)):
        near_zero = 2e-5 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(mine.cpu().numpy(), expected, rtol=2e-4, atol=near_zero)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slope", [0.0, 0.5])
def test_poisoned_memory_is_never_read(kernel_device, monkeypatch, form, slope):
    inputs = make_inputs(kernel_device, rows=37)
    clean = value_and_gradients(FORMS[form], inputs, negative_slope=slope)

    def poisoned(make):
        return lambda *a, **k: make(*a, **k).fill_(float("nan"))

    for where, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(where, name, poisoned(getattr(where, name)))
    for a, b in zip(clean, value_and_gradients(FORMS[form], inputs, negative_slope=slope), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_rows_do_not_depend_on_each_other(kernel_device, form):
    inputs = make_inputs(kernel_device, rows=40)
    before = value_and_gradients(FORMS[form], inputs)[:2]
    inputs[0][20] += 1.0
    after = value_and_gradients(FORMS[form], inputs)[:2]
    kept = torch.arange(40, device=inputs[0].device) != 20
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[kept], b[kept])
        assert not torch.equal(a[20], b[20])


@pytest.mark.parametrize("form", FORMS)
def test_dead_rows_have_zero_output_and_gradient(kernel_device, form):
    """relu(u) = 0 everywhere: h = 0, and sqrt(h) has no slope to blow up."""
    x, up, down, dy = make_inputs(kernel_device, rows=5)
    x[2] = 0.0
    y, dx, dup, ddown = value_and_gradients(FORMS[form], [x, up, down, dy])
    assert (y[2] == 0).all()
    assert (dx[2] == 0).all()
    assert all(torch.isfinite(t).all() for t in (y, dx, dup, ddown))


def test_leading_axes(kernel_device):
    x, up, down, dy = make_inputs(kernel_device, rows=12)
    flat = value_and_gradients(relu2_ffn_triton, [x, up, down, dy])
    deep = value_and_gradients(relu2_ffn_triton, [x.view(3, 4, -1), up, down, dy])
    for a, b in zip(flat, deep, strict=True):
        assert torch.equal(a, b.reshape(a.shape))
    assert deep[0].shape == (3, 4, 16)


def test_wrong_arguments_are_named(kernel_device):
    x, up, down, _ = make_inputs(kernel_device)
    for form in (relu2_ffn_torch, relu2_ffn_triton):
        with pytest.raises(ValueError, match="expected"):
            form(x, up.t(), down)
        with pytest.raises(ValueError, match="negative_slope"):
            form(x, up, down, negative_slope=-0.1)
    with pytest.raises(ValueError, match="float64"):
        relu2_ffn_triton(x.double(), up, down)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        relu2_ffn_triton(x[:, :-1], up[:, :-1], down, fuse_matmuls=True)
