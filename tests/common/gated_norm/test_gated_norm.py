"""The gated norm: the plain and the Triton form against the float64 definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.gated_norm.reference import gated_rms_norm_backward_reference, gated_rms_norm_reference
from common.gated_norm.torch_impl import gated_rms_norm_torch
from common.gated_norm.triton_impl import gated_rms_norm_triton


def make_inputs(rows, width, dtype=torch.float64):
    g = torch.Generator().manual_seed(rows + width)
    y, z, weight, dout = (torch.randn(*s, generator=g) for s in ((rows, width), (rows, width), (width,), (rows, width)))
    return [y.to(dtype), z.to(dtype), (1.0 + 0.2 * weight).to(dtype)], dout.to(dtype)


def run(form, inputs, dout, **options):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = form(*leaves, **options)
    return [t.detach().cpu() for t in (out, *torch.autograd.grad(out, leaves, dout.to(out.device)))]


def run_reference(inputs, dout, **options):
    arrays = [t.double().numpy() for t in inputs]
    grads = gated_rms_norm_backward_reference(dout.double().numpy(), *arrays, **options)
    return [gated_rms_norm_reference(*arrays, **options), grads["y"], grads["z"], grads["weight"]]


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_plain_form_equals_reference(eps):
    inputs, dout = make_inputs(7, 11)
    found = run(gated_rms_norm_torch, inputs, dout, eps=eps)
    for a, b in zip(found, run_reference(inputs, dout, eps=eps), strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-12, atol=1e-13)


def test_reference_gradient_is_that_of_the_reference():
    """Central differences of the definition itself."""
    (y, z, weight), dout = make_inputs(2, 3)
    arrays = [t.numpy() for t in (y, z, weight)]
    grads = gated_rms_norm_backward_reference(dout.numpy(), *arrays, eps=0.1)
    for i, name in enumerate(("y", "z", "weight")):
        for at in np.ndindex(arrays[i].shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [a.copy() for a in arrays]
                moved[i][at] += step
                ends.append((gated_rms_norm_reference(*moved, eps=0.1) * dout.numpy()).sum())
            assert abs((ends[0] - ends[1]) / 2e-6 - grads[name][at]) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 640), (9, 48), (66, 5), (3, 2100)])
def test_error_is_at_most_twice_that_of_the_plain_form(kernel_device, dtype, rows, width):
    (y, z, weight), dout = make_inputs(rows, width, dtype)
    inputs = [y, z, weight.float()]
    ours = run(gated_rms_norm_triton, [t.to(kernel_device) for t in inputs], dout)
    assert [t.dtype for t in ours] == [dtype, dtype, dtype, torch.float32]
    expected = run_reference(inputs, dout)
    for mine, other, exact in zip(ours, run(gated_rms_norm_torch, inputs, dout), expected, strict=True):
        bound = 2 * np.abs(other.double().numpy() - exact).max() + 1e-5 * max(1.0, np.abs(exact).max())
        assert np.abs(mine.double().numpy() - exact).max() <= bound


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of the interpreter's exp2, as meant
def test_a_gate_that_is_shut_or_wide_open(kernel_device):
    """exp2 overflows and underflows there; nothing may become NaN, and an open gate is exactly 1."""
    z = torch.tensor([-1e15, -3e4, -127.0, -88.5, -20.0, 20.0, 88.5, 127.0, 3e4, 1e5]).repeat(3, 1)
    (y, _, weight), dout = make_inputs(3, 10, torch.float32)
    found = run(gated_rms_norm_triton, [t.to(kernel_device) for t in (y, z, weight)], dout)
    for mine, exact in zip(found, run_reference([y, z, weight], dout), strict=True):
        assert np.abs(mine.double().numpy() - exact).max() <= 1e-5 * np.abs(exact).max()


def test_rows_do_not_meet(kernel_device):
    """Changing one row changes no other, bit for bit."""
    (y, z, weight), _ = make_inputs(9, 20, torch.float32)
    before = gated_rms_norm_triton(*(t.to(kernel_device) for t in (y, z, weight))).cpu()
    y[4], z[4] = 1e4, -3.0
    after = gated_rms_norm_triton(*(t.to(kernel_device) for t in (y, z, weight))).cpu()
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[4], after[4])


def test_more_dimensions_and_slices_read_in_place(kernel_device):
    (y, z, weight), dout = make_inputs(12, 20, torch.float32)
    wide = torch.cat([z, y, z], dim=1).view(3, 4, 60).to(kernel_device)
    leaves = [wide[..., 20:40].requires_grad_(), wide[..., :20].detach().requires_grad_(), weight.to(kernel_device)]
    out = gated_rms_norm_triton(*leaves)
    assert out.shape == (3, 4, 20)
    expected = run_reference([y, z, weight], dout)
    np.testing.assert_allclose(out.detach().cpu().reshape(12, 20).numpy(), expected[0], rtol=1e-5, atol=1e-5)
    dy = torch.autograd.grad(out, leaves[0], dout.view(3, 4, 20).to(kernel_device))[0]
    np.testing.assert_allclose(dy.cpu().reshape(12, 20).numpy(), expected[1], rtol=1e-5, atol=1e-5)


def test_every_number_of_every_result_is_written(kernel_device, monkeypatch):
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    (y, z, weight), dout = make_inputs(70, 20, torch.float32)
    results = run(gated_rms_norm_triton, [t.to(kernel_device) for t in (y, z, weight)], dout)
    assert all(torch.isfinite(t).all() for t in results)


@pytest.mark.parametrize("form", [gated_rms_norm_torch, gated_rms_norm_triton])
def test_arguments_that_do_not_fit_are_named(kernel_device, form):
    (y, z, weight), _ = make_inputs(4, 6, torch.float32)
    with pytest.raises(ValueError, match=r"z \(4, 5\)"):
        form(y, z[:, :5], weight)
    with pytest.raises(ValueError, match=r"weight \(5,\)"):
        form(y, z, weight[:5])
    with pytest.raises(ValueError, match="the same dtype"):
        form(y, z.double(), weight)


def test_what_the_triton_form_does_not_take_is_named(kernel_device):
    (y, z, weight), _ = make_inputs(4, 6)
    with pytest.raises(ValueError, match=r"float64.*gated_rms_norm_torch"):
        gated_rms_norm_triton(y, z, weight)
