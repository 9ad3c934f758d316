"""The causal convolution against the float64 window form, and the properties that a carried convolution must have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.causal_conv1d.reference import causal_conv1d_reference
from common.causal_conv1d.torch_impl import causal_conv1d_torch


def make_inputs(batch, length, channels, taps, dtype=torch.float64):
    g = torch.Generator().manual_seed(length)
    shapes = ((batch, length, channels), (channels, taps), (channels,), (batch, channels, taps - 1))
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def some_documents(length):
    return torch.tensor([[i // 5 for i in range(length)], [int(i >= 2) for i in range(length)]])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 63, 500])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_float64_equals_reference(length, activation, documents, taps):
    x, weight, bias, state = make_inputs(2, length, 3, taps)
    ids = some_documents(length) if documents else None
    y, final = causal_conv1d_torch(x, weight, bias, initial_state_BDS=state, document_ids_BT=ids, activation=activation)
    arrays = [t.numpy() for t in (x, weight, bias)]
    ids_array = None if ids is None else ids.numpy()
    expected_y, expected_final = causal_conv1d_reference(
        *arrays, initial_state_BDS=state.numpy(), document_ids_BT=ids_array, activation=activation
    )
    np.testing.assert_allclose(y.numpy(), expected_y, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(final.numpy(), expected_final)


@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("documents", [False, True])
def test_gradients_of_both_results(length, activation, documents):
    """Central differences of output and final state, for every argument."""
    inputs = [t.requires_grad_() for t in make_inputs(2, length, 3, 4)]
    ids = some_documents(length) if documents else None

    def both(x, weight, bias, state):
        return causal_conv1d_torch(x, weight, bias, initial_state_BDS=state, document_ids_BT=ids, activation=activation)

    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_the_plain_form(dtype):
    x, weight, bias, _ = make_inputs(2, 63, 8, 4, dtype)
    weight, bias = weight.float(), bias.float()
    dy = torch.randn(2, 63, 8).to(dtype)

    def gradients(x, weight, bias, dy, form):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        y = form(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    def plain(x, weight, bias):
        wide = x.to(weight.dtype).transpose(1, 2)
        summed = torch.nn.functional.conv1d(wide, weight[:, None], bias, padding=3, groups=8)[..., :63]
        return torch.nn.functional.silu(summed).transpose(1, 2).to(x.dtype)

    expected = gradients(x.double(), weight.double(), bias.double(), dy.double(), plain)
    ours = gradients(x, weight, bias, dy, lambda *a: causal_conv1d_torch(*a)[0])
    theirs = gradients(x, weight, bias, dy, plain)
    assert ours[0].dtype == dtype
    for mine, other, exact in zip(ours, theirs, expected, strict=True):
        scale = max(1.0, float(exact.abs().max()))
        assert (mine - exact).abs().max() / scale <= 2 * (other - exact).abs().max() / scale + 1e-5


@pytest.mark.parametrize("cuts", [(9,), (1, 2, 3), tuple(range(1, 20))])
def test_state_carries_across_a_split(cuts):
    x, weight, bias, state = make_inputs(2, 20, 3, 4, torch.float32)
    whole, whole_state = causal_conv1d_torch(x, weight, bias, initial_state_BDS=state)
    parts, edges = [], (0, *cuts, 20)
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        y, state = causal_conv1d_torch(x[:, start:end], weight, bias, initial_state_BDS=state)
        parts.append(y)
    # Vectorised and scalar SiLU differ in the last bit, and which is used depends on the length of the call.
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(state, whole_state)


def test_no_state_is_a_state_of_zeros():
    x, weight, bias, state = make_inputs(2, 20, 3, 4)
    for a, b in zip(
        causal_conv1d_torch(x, weight, bias),
        causal_conv1d_torch(x, weight, bias, initial_state_BDS=torch.zeros_like(state)),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert torch.equal(causal_conv1d_torch(x, weight)[0], causal_conv1d_torch(x, weight, torch.zeros(3).double())[0])


@pytest.mark.parametrize("lengths", [(5, 1, 1, 9), (1, 2, 3), (8,)])
def test_documents_equal_documents_run_alone(lengths):
    total = sum(lengths)
    inputs = make_inputs(1, total, 3, 4)
    ids = torch.tensor(np.repeat([4, 2, 4, 9][: len(lengths)], lengths))[None]
    leaves = [t.clone().requires_grad_() for t in inputs]
    y, final = causal_conv1d_torch(*leaves[:3], initial_state_BDS=leaves[3], document_ids_BT=ids)
    dy, dfinal = torch.randn_like(y), torch.randn_like(final)
    grads = torch.autograd.grad((y * dy).sum() + (final * dfinal).sum(), leaves)
    alone = [t.clone().requires_grad_() for t in inputs]
    loss, start = 0.0, 0
    for i, length in enumerate(lengths):
        state = alone[3] if i == 0 else None
        part, last = causal_conv1d_torch(alone[0][:, start : start + length], alone[1], alone[2], initial_state_BDS=state)
        torch.testing.assert_close(y[:, start : start + length], part, rtol=1e-13, atol=1e-13)
        loss = loss + (part * dy[:, start : start + length]).sum()
        start += length
    assert torch.equal(final, last)
    loss = loss + (last * dfinal).sum()
    for a, b in zip(grads, torch.autograd.grad(loss, alone, allow_unused=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_later_inputs_change_nothing_earlier():
    x, weight, bias, _ = make_inputs(1, 30, 3, 4, torch.float32)
    before, _ = causal_conv1d_torch(x, weight, bias)
    x[:, 17:] = 1e6
    after, _ = causal_conv1d_torch(x, weight, bias)
    assert torch.equal(before[:, :17], after[:, :17])
    assert not torch.equal(before[:, 17:], after[:, 17:])


def test_wrong_arguments_are_named():
    x, weight, bias, state = make_inputs(2, 8, 3, 4)
    with pytest.raises(ValueError, match="initial_state"):
        causal_conv1d_torch(x, weight, bias, initial_state_BDS=state[..., 1:])
    with pytest.raises(ValueError, match="expected"):
        causal_conv1d_torch(x, weight[:2], bias)
    with pytest.raises(ValueError, match="'gelu'"):
        causal_conv1d_torch(x, weight, bias, activation="gelu")
