"""The Triton form of the causal convolution against float64, beside the plain form of the same dtype."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from common.causal_conv1d.reference import causal_conv1d_reference
from common.causal_conv1d.torch_impl import causal_conv1d_torch
from common.causal_conv1d.triton_impl import causal_conv1d_triton
from tests.common.causal_conv1d.test_causal_conv1d import make_inputs, some_documents

SEGMENT = "common.causal_conv1d.triton_impl.CONV1D_SEGMENT"


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch):
    """Sequences of a few positions then have seams."""
    monkeypatch.setattr(SEGMENT, 8)


def plain_conv(x, weight, bias, *, initial_state_BDS, document_ids_BT=None, activation="silu"):
    """The definition in ordinary operations of float32, rounded at the end; no documents."""
    wide = torch.cat([initial_state_BDS.transpose(1, 2), x], dim=1).to(weight.dtype).transpose(1, 2)
    summed = torch.nn.functional.conv1d(wide, weight[:, None], bias, groups=weight.shape[0])
    y = (torch.nn.functional.silu(summed) if activation else summed).transpose(1, 2).to(x.dtype)
    return y, torch.cat([initial_state_BDS.transpose(1, 2), x], dim=1)[:, x.shape[1] :].transpose(1, 2)


def run(form, inputs, dy, dfinal, **options):
    """Outputs, final state and all four gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y, final = form(*leaves[:3], initial_state_BDS=leaves[3], **options)
    loss = (y.to(dy.dtype) * dy.to(y.device)).sum() + (final.to(dy.dtype) * dfinal.to(y.device)).sum()
    return [t.detach().cpu() for t in (y, final, *torch.autograd.grad(loss, leaves))]


def some_gradients(length, channels, taps):
    g = torch.Generator().manual_seed(length)
    return [torch.randn(*s, generator=g).double() for s in ((2, length, channels), (2, channels, taps - 1))]


@pytest.mark.parametrize("length", [1, 2, 3, 9, 63])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("taps", "activation"), [(1, "silu"), (2, None), (4, "silu")])
def test_outputs_state_and_gradients(kernel_device, length, documents, taps, activation):
    inputs = [t.float() for t in make_inputs(2, length, 3, taps)]
    ids = some_documents(length) if documents else None
    dy, dfinal = some_gradients(length, 3, taps)
    options = {"activation": activation}
    on_device = None if ids is None else ids.to(kernel_device)
    ours = run(
        causal_conv1d_triton, [t.to(kernel_device) for t in inputs], dy, dfinal, document_ids_BT=on_device, **options
    )
    exact = [t.double() for t in inputs]
    expected = run(causal_conv1d_torch, exact, dy, dfinal, document_ids_BT=ids, **options)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)
    y, final = causal_conv1d_reference(
        *(t.numpy() for t in exact[:3]),
        initial_state_BDS=exact[3].numpy(),
        document_ids_BT=None if ids is None else ids.numpy(),
        **options,
    )
    np.testing.assert_allclose(ours[0].numpy(), y, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ours[1].numpy(), final)


@pytest.mark.parametrize("length", [1, 63, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_at_most_twice_that_of_the_plain_form(kernel_device, monkeypatch, length, dtype):
    monkeypatch.setattr(SEGMENT, 32)
    x, weight, bias, state = make_inputs(2, length, 4, 4, dtype)
    inputs = [x, weight.float(), bias.float(), state]
    dy, dfinal = some_gradients(length, 4, 4)
    ours = run(causal_conv1d_triton, [t.to(kernel_device) for t in inputs], dy.float(), dfinal.float())
    assert [t.dtype for t in ours[:3]] == [dtype] * 3
    expected = run(plain_conv, [t.double() for t in inputs], dy, dfinal)
    plain = run(plain_conv, inputs, dy.float(), dfinal.float())
    for mine, other, exact in zip(ours, plain, expected, strict=True):
        scale = max(1.0, float(exact.abs().max()))
        assert (mine - exact).abs().max() / scale <= 2 * (other - exact).abs().max() / scale + 1e-5


@pytest.mark.parametrize("cuts", [(9,), (1, 2, 3), (8, 16)])
def test_state_carries_across_a_split(kernel_device, cuts):
    x, weight, bias, state = (t.to(kernel_device) for t in make_inputs(2, 20, 3, 4, torch.float32))
    whole, whole_state = causal_conv1d_triton(x, weight, bias, initial_state_BDS=state)
    parts = []
    for start, end in itertools.pairwise((0, *cuts, 20)):
        y, state = causal_conv1d_triton(x[:, start:end], weight, bias, initial_state_BDS=state)
        parts.append(y)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(state, whole_state)


def test_where_segments_end_does_not_matter(kernel_device, monkeypatch):
    inputs = [t.to(kernel_device) for t in make_inputs(2, 21, 3, 4, torch.float32)]
    dy, dfinal = some_gradients(21, 3, 4)
    short = run(causal_conv1d_triton, inputs, dy, dfinal, document_ids_BT=some_documents(21).to(kernel_device))
    monkeypatch.setattr(SEGMENT, 32)
    whole = run(causal_conv1d_triton, inputs, dy, dfinal, document_ids_BT=some_documents(21).to(kernel_device))
    for i in (0, 1, 2, 5):
        assert torch.equal(short[i], whole[i])
    for i in (3, 4):  # the taps' gradients are summed in another order
        torch.testing.assert_close(short[i], whole[i], rtol=1e-5, atol=1e-5)


def test_later_inputs_change_nothing_earlier(kernel_device):
    x, weight, bias, _ = (t.to(kernel_device) for t in make_inputs(1, 30, 3, 4, torch.float32))
    before, _ = causal_conv1d_triton(x, weight, bias)
    x[:, 17:] = 1e6
    after, _ = causal_conv1d_triton(x, weight, bias)
    assert torch.equal(before[:, :17], after[:, :17])
    assert not torch.equal(before[:, 17:], after[:, 17:])


def test_options_left_out_and_slices_read_in_place(kernel_device):
    x, weight, _, _ = (t.to(kernel_device) for t in make_inputs(2, 20, 5, 4, torch.float32))
    wide = torch.cat([x, x, x], dim=2)
    y, final = causal_conv1d_triton(wide[..., 5:10], weight)
    expected, expected_final = causal_conv1d_torch(x, weight)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(final, expected_final)


def test_every_number_of_every_result_is_written(kernel_device, monkeypatch):
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))
    inputs = [t.to(kernel_device) for t in make_inputs(2, 13, 3, 4, torch.float32)]
    dy, dfinal = some_gradients(13, 3, 4)
    assert all(torch.isfinite(t).all() for t in run(causal_conv1d_triton, inputs, dy, dfinal))


def test_arguments_that_do_not_fit_are_named(kernel_device):
    x, weight, bias, state = make_inputs(2, 8, 3, 4)
    with pytest.raises(ValueError, match=r"float64.*causal_conv1d_torch"):
        causal_conv1d_triton(x, weight, bias)
    with pytest.raises(ValueError, match="5 taps"):
        causal_conv1d_triton(x.float(), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="initial_state"):
        causal_conv1d_triton(x.float(), weight, bias, initial_state_BDS=state[..., 1:])
