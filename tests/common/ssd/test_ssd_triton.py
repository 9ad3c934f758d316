"""The Triton form of the scan, interpreted without a GPU and compiled with one, against the float64 recurrence."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from common.ssd.torch_impl import ssd_scan_torch
from common.ssd.triton_impl import (
    _ssd_segment_starts,
    _ssd_triton_decays,
    ssd_scan_triton,
    ssd_triton_chunk_length,
    ssd_triton_segment_length,
)
from tests.common.ssd.test_ssd import errors, make_inputs, run_reference

ENOUGH = "common.ssd.triton_impl.SSD_TRITON_ENOUGH_PROGRAMS"


class _Rounded(torch.autograd.Function):
    """A float32 number as an operand of a 16-bit product: it is rounded, and so is its gradient on the way back."""

    @staticmethod
    def forward(ctx, t, dtype):
        ctx.dtype = dtype
        return t.to(dtype).to(t.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(ctx.dtype).to(gradient.dtype), None


def plain_scan(x, dt, A, B, C, D, *, initial_state_BHPN, document_ids_BT=None):
    """The recurrence in ordinary operations: products and what enters them in the dtype of x, sums in float32."""
    dtype, repeat = x.dtype, x.shape[2] // B.shape[2]
    x, B, C = x.float(), B.float().repeat_interleave(repeat, 2), C.float().repeat_interleave(repeat, 2)
    state, ys = initial_state_BHPN, []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)
        if t and document_ids_BT is not None:
            decay = decay * (document_ids_BT[:, t] == document_ids_BT[:, t - 1])[:, None]
        dtx = _Rounded.apply(dt[:, t, :, None] * x[:, t], dtype)
        state = decay[..., None, None] * state + _Rounded.apply(dtx[..., None] * B[:, t, :, None], dtype)
        ys.append((_Rounded.apply(state, dtype) * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(ys, 1).to(dtype), state


@pytest.fixture(autouse=True)
def _long_chunks(kernel_device, monkeypatch):
    """Interpreted, no register is short: float32, where errors show best, takes chunks of 64 as well."""
    if kernel_device == "cpu":
        monkeypatch.setattr("common.ssd.triton_impl._ssd_most", lambda *_: 64)


def typed(inputs, dtype, device="cpu"):
    """x, B and C in `dtype`, the rest float32, as the entry has them."""
    return [t.to(device, dtype if i in (0, 3, 4) else torch.float32) for i, t in enumerate(inputs)]


def run(scan, inputs, dy, dstate, documents=None, **options):
    """Outputs, final state and all seven gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y, state = scan(*leaves[:6], initial_state_BHPN=leaves[6], document_ids_BT=documents, **options)
    loss = (y.float() * dy.to(y.device)).sum() + (state * dstate.to(y.device)).sum()
    return [t.detach().cpu() for t in (y, state, *torch.autograd.grad(loss, leaves))]


def typical_errors(results, expected):
    """Root mean square error of each tensor over the larger of 1 and the tensor's largest value."""
    return [
        float(np.sqrt(np.square(a.double().numpy() - b).mean()) / max(1.0, np.abs(b).max()))
        for a, b in zip(results, expected, strict=True)
    ]


def some_gradients(batch, length, heads, width, n):
    g = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, heads, width, generator=g), torch.randn(batch, heads, width, n, generator=g)


def two_documents(length):
    """Rows of different boundaries; the first id comes back: not the id counts, but its change."""
    positions = torch.arange(length)
    return torch.stack([positions // 7 % 2, (positions >= 2).long()])


F32, F16 = torch.float32, torch.float16


@pytest.mark.parametrize(
    ("dtype", "length", "groups", "documents", "chunk_size"),
    [
        *((F32, 1, 1, False, 64), (F32, 5, 2, True, 64), (F32, 63, 2, False, 16), (F32, 500, 1, True, 64)),
        *((F16, 5, 1, False, 64), (F16, 63, 2, True, 64), (F16, 500, 1, False, 64)),
    ],
)
def test_error_is_at_most_twice_that_of_the_plain_form(kernel_device, dtype, length, groups, documents, chunk_size):
    batch, heads = (2, 2) if length < 500 else (1, 1)
    inputs = typed(make_inputs(batch, length, heads, 16, min(groups, heads), 16, seed=length), dtype)
    dy, dstate = some_gradients(batch, length, heads, 16, 16)
    ids = two_documents(length)[:batch] if documents else None
    on_device = None if ids is None else ids.to(kernel_device)
    ours = run(ssd_scan_triton, [t.to(kernel_device) for t in inputs], dy, dstate, on_device, chunk_size=chunk_size)
    assert [t.dtype for t in ours[:3]] == [dtype, torch.float32, dtype]
    expected = run_reference([t.float() for t in inputs], dy, dstate, ids)
    plain = run(plain_scan, inputs, dy, dstate, ids)
    for mine, theirs in zip(typical_errors(ours, expected), typical_errors(plain, expected), strict=True):
        assert mine <= 2 * theirs + 1e-5


def test_bfloat16(kernel_device):
    """Interpreted, products are not rounded (that arithmetic is wrong there), so the bound is that of a GPU."""
    inputs = typed(make_inputs(2, 40, 2, 16, 1, 16, seed=4), torch.bfloat16)
    dy, dstate = some_gradients(2, 40, 2, 16, 16)
    ours = run(ssd_scan_triton, [t.to(kernel_device) for t in inputs], dy, dstate)
    expected = run_reference([t.float() for t in inputs], dy, dstate)
    plain = typical_errors(run(plain_scan, inputs, dy, dstate), expected)
    for mine, theirs in zip(typical_errors(ours, expected), plain, strict=True):
        assert mine <= 2 * theirs + 1e-5


@pytest.mark.parametrize(("width", "n"), [(5, 6), (32, 16), (16, 40)])
def test_widths_that_no_product_takes_are_filled_up(kernel_device, width, n):
    inputs = typed(make_inputs(1, 20, 2, width, 1, n), torch.float32)
    dy, dstate = some_gradients(1, 20, 2, width, n)
    ours = run(ssd_scan_triton, [t.to(kernel_device) for t in inputs], dy, dstate, chunk_size=16)
    assert max(errors(ours, run_reference(inputs, dy, dstate))) < 1e-5


@pytest.mark.parametrize(("length", "documents"), [(70, True), (100, False)])
def test_segments_do_not_matter(kernel_device, monkeypatch, length, documents):
    """Few programs cut a sequence into segments that run side by side; the result is that of one walk."""
    inputs = [t.to(kernel_device) for t in typed(make_inputs(2, length, 1, 16, 1, 16, decay=0.1), torch.float32)]
    dy, dstate = some_gradients(2, length, 1, 16, 16)
    ids = two_documents(length).to(kernel_device) // (1 if documents else 10)
    monkeypatch.setattr(ENOUGH, 1)
    whole = run(ssd_scan_triton, inputs, dy, dstate, ids, chunk_size=16)
    monkeypatch.setattr(ENOUGH, 1000)
    assert ssd_triton_segment_length(length, 16, 2) < length
    cut = run(ssd_scan_triton, inputs, dy, dstate, ids, chunk_size=16)
    for a, b in zip(cut, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_chunk_size_does_not_matter(kernel_device):
    inputs = [t.to(kernel_device) for t in typed(make_inputs(1, 70, 2, 16, 1, 16), torch.float32)]
    dy, dstate = some_gradients(1, 70, 2, 16, 16)
    first, *others = (run(ssd_scan_triton, inputs, dy, dstate, chunk_size=size) for size in (1, 33, 1000))
    for other in others:
        assert max(errors(other, [t.double().numpy() for t in first])) < 2e-5


def test_lengths_of_chunks_and_segments():
    sizes = (1, 16, 48, 64, 256)
    assert [ssd_triton_chunk_length(1024, size, 64) for size in sizes] == [16, 16, 32, 64, 64]
    assert [ssd_triton_chunk_length(1024, size, 32) for size in sizes] == [16, 16, 32, 32, 32]
    lengths = (1, 16, 17, 32, 33, 64)
    assert [ssd_triton_chunk_length(length, 64, 64) for length in lengths] == [16, 16, 32, 32, 64, 64]
    for length, chunk, programs in itertools.product((1, 63, 500, 8192), (16, 64), (1, 96, 640)):
        segment = ssd_triton_segment_length(length, chunk, programs)
        assert segment % chunk == 0
        assert segment >= min(4 * chunk, length) or segment >= length
    assert ssd_triton_segment_length(1024, 64, 640) >= 1024  # training fills the GPU without segments


def test_state_carries_across_a_split(kernel_device):
    inputs = [t.to(kernel_device) for t in typed(make_inputs(1, 50, 2, 16, 2, 16), torch.float32)]
    x, dt, A, B, C, D, state = inputs
    whole, whole_state = ssd_scan_triton(*inputs[:6], initial_state_BHPN=state, chunk_size=16)
    parts = []
    for start, end in itertools.pairwise((0, 1, 2, 31, 50)):
        s = slice(start, end)
        y, state = ssd_scan_triton(x[:, s], dt[:, s], A, B[:, s], C[:, s], D, initial_state_BHPN=state, chunk_size=16)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, whole_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [1, 17, 49])
def test_later_inputs_change_nothing_earlier(kernel_device, change):
    inputs = [t.to(kernel_device) for t in typed(make_inputs(1, 50, 1, 16, 1, 16), torch.float32)]
    before, _ = ssd_scan_triton(*inputs[:6], chunk_size=16)
    for i, value in ((0, 1e3), (1, 50.0), (3, -1e3), (4, 7.0)):
        inputs[i][:, change:] = value
    after, _ = ssd_scan_triton(*inputs[:6], chunk_size=16)
    assert torch.equal(before[:, :change], after[:, :change])
    assert not torch.equal(before[:, change:], after[:, change:])


@pytest.mark.parametrize("strength", [1e2, 1e8])
def test_strong_decay_neither_overflows_nor_turns_nan(kernel_device, strength):
    inputs = typed(make_inputs(1, 70, 1, 16, 1, 16), torch.float32)
    inputs[2] = -strength * torch.ones(1)
    inputs[1][:, ::5] = 0.0  # a step of nothing neither decays nor adds
    dy, dstate = some_gradients(1, 70, 1, 16, 16)
    results = run(ssd_scan_triton, [t.to(kernel_device) for t in inputs], dy, dstate)
    assert all(torch.isfinite(t).all() for t in results)
    assert max(errors(results, run_reference(inputs, dy, dstate))) < 1e-5


def test_every_number_of_every_result_is_written(kernel_device, monkeypatch):
    """Memory that starts as NaN: what a kernel leaves out, or reads before it is written, shows."""
    empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    poison = lambda t: t.fill_(torch.nan) if t.is_floating_point() else t  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    assert torch.ones(1).new_empty(1).isnan().all()
    monkeypatch.setattr(ENOUGH, 1000)
    inputs = typed(make_inputs(1, 135, 2, 16, 1, 16), torch.float32)
    dy, dstate = some_gradients(1, 135, 2, 16, 16)
    results = run(ssd_scan_triton, [t.to(kernel_device) for t in inputs], dy, dstate, chunk_size=16)
    assert max(errors(results, run_reference(inputs, dy, dstate))) < 1e-5


def test_options_left_out_and_slices_read_in_place(kernel_device):
    """No D, no initial state, inputs that are slices of one projection, and a gradient through one result only."""
    x, dt, A, B, C, _, _ = typed(make_inputs(2, 33, 2, 16, 1, 16), torch.float32)
    packed = torch.cat([x.reshape(2, 33, 32), B[:, :, 0], C[:, :, 0], dt], dim=-1).to(kernel_device).requires_grad_()
    px, pB, pC, pdt = packed.split([32, 16, 16, 2], dim=-1)
    sliced = (px.unflatten(-1, (2, 16)), pdt, A.to(kernel_device), pB[:, :, None], pC[:, :, None])
    found = [ssd_scan_triton(*sliced, chunk_size=16)[i] for i in (0, 1)]
    grads = [torch.autograd.grad(t.sum(), packed, retain_graph=True)[0].cpu() for t in found]
    plain = packed.detach().cpu().double().requires_grad_()
    px, pB, pC, pdt = plain.split([32, 16, 16, 2], dim=-1)
    expected = ssd_scan_torch(px.unflatten(-1, (2, 16)), pdt, A.double(), pB[:, :, None], pC[:, :, None])
    for i in (0, 1):
        torch.testing.assert_close(found[i].detach().cpu().double(), expected[i].detach(), rtol=1e-5, atol=1e-5)
        exact = torch.autograd.grad(expected[i].sum(), plain, retain_graph=True)[0]
        torch.testing.assert_close(grads[i].double(), exact, rtol=1e-5, atol=2e-5)


def test_results_are_the_same_bits_in_every_run(kernel_device):
    inputs = [t.to(kernel_device) for t in typed(make_inputs(1, 40, 2, 16, 1, 16), torch.float32)]
    dy, dstate = some_gradients(1, 40, 2, 16, 16)
    first, second = (run(ssd_scan_triton, inputs, dy, dstate, chunk_size=16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_segment_starts_are_the_states_there(kernel_device):
    """The states that the segments start from are those of a scan of what lies before them."""
    x, dt, A, B, C, _, state = (t.to(kernel_device) for t in typed(make_inputs(1, 80, 1, 16, 1, 16), torch.float32))
    decays = _ssd_triton_decays(dt, A, None, 16, x.dtype)
    starts = _ssd_segment_starts(x, B, decays, state, 16, 32, reverse=False)
    for part, position in enumerate((0, 32, 64)):
        before = state
        if position:
            s = slice(0, position)
            _, before = ssd_scan_triton(x[:, s], dt[:, s], A, B[:, s], C[:, s], initial_state_BHPN=state)
        torch.testing.assert_close(starts[:, part], before, rtol=1e-5, atol=1e-5)


def test_arguments_that_do_not_fit_are_named(kernel_device):
    x, dt, A, B, C, D, _ = make_inputs(1, 8, 4, 4, 2, 3)
    with pytest.raises(ValueError, match=r"float64.*ssd_scan_torch"):
        ssd_scan_triton(x, dt, A, B, C, D)
    with pytest.raises(ValueError, match=r"dt is \(1, 7, 4\), expected \(1, 8, 4\)"):
        ssd_scan_triton(x.float(), dt[:, :7], A, B, C, D)
