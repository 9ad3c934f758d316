"""The chunked scan against the float64 recurrence, golden vectors, and the properties that a scan must have."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from common.ssd.reference import ssd_scan_backward_reference, ssd_scan_reference
from common.ssd.torch_impl import ssd_chunk_length, ssd_scan_torch

GOLDEN = Path(__file__).parents[2] / "golden"
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


def make_inputs(batch, length, heads, width, groups, n, *, seed=0, decay=4.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    tensors = [
        normal(batch, length, heads, width),
        torch.nn.functional.softplus(normal(batch, length, heads) - 1.0),
        -decay * torch.rand(heads, generator=g, dtype=torch.float64) - 0.05,
        normal(batch, length, groups, n),
        normal(batch, length, groups, n),
        normal(heads),
        normal(batch, heads, width, n),
    ]
    return [t.to(dtype) for t in tensors]


def run_torch(inputs, dy, dstate, documents=None, chunk_size=16, scan=ssd_scan_torch):
    """Outputs, final state and all seven gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    options = {} if scan is not ssd_scan_torch else {"chunk_size": chunk_size}
    y, state = scan(*leaves[:6], initial_state_BHPN=leaves[6], document_ids_BT=documents, **options)
    loss = (y * dy.to(y.dtype)).sum() + (state * dstate.to(state.dtype)).sum()
    return [y.detach(), state.detach(), *torch.autograd.grad(loss, leaves)]


def run_reference(inputs, dy, dstate, documents=None):
    arrays = [t.double().numpy() for t in inputs]
    documents = None if documents is None else documents.numpy()
    y, state = ssd_scan_reference(*arrays[:6], initial_state_BHPN=arrays[6], document_ids_BT=documents)
    grads = ssd_scan_backward_reference(
        dy.double().numpy(),
        dstate.double().numpy(),
        *arrays[:6],
        initial_state_BHPN=arrays[6],
        document_ids_BT=documents,
    )
    return [y, state, *(grads[name] for name in NAMES)]


def plain_scan(x, dt, A, B, C, D, *, initial_state_BHPN, document_ids_BT=None):
    """The recurrence in ordinary torch operations: the plain implementation that rounding errors are compared with."""
    repeat = x.shape[2] // B.shape[2]
    dtype = x.dtype
    x, dt, A, B, C, D = (t if t.dtype == torch.float64 else t.float() for t in (x, dt, A, B, C, D))
    B, C = B.repeat_interleave(repeat, 2), C.repeat_interleave(repeat, 2)
    state, ys = initial_state_BHPN.to(x.dtype), []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)
        if t and document_ids_BT is not None:
            decay = decay * (document_ids_BT[:, t] == document_ids_BT[:, t - 1])[:, None]
        state = decay[..., None, None] * state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((state * C[:, t, :, None]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(ys, 1).to(dtype), state


def errors(results, expected):
    """Largest absolute error of each tensor over the larger of 1 and the tensor's largest value."""
    return [
        float(np.abs(a.double().numpy() - b).max() / max(1.0, np.abs(b).max()))
        for a, b in zip(results, expected, strict=True)
    ]


@pytest.mark.parametrize("length", [1, 2, 7, 63, 64, 127, 500])
@pytest.mark.parametrize("groups", [1, 2])
def test_float64_equals_reference(length, groups):
    inputs = make_inputs(2, length, 4, 5, groups, 6, seed=length)
    dy, dstate = torch.randn(2, length, 4, 5).double(), torch.randn(2, 4, 5, 6).double()
    results = run_torch(inputs, dy, dstate, chunk_size=64)
    assert all(t.dtype == torch.float64 for t in results)
    assert max(errors(results, run_reference(inputs, dy, dstate))) < 1e-12


@pytest.mark.parametrize("length", [1, 63, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_the_plain_form(length, dtype):
    """Error at most twice the plain form's, plus 1e-5, for outputs, state and every gradient.

    The gradient of A is a sum over all positions, here 1,000, that nearly cancels for some draws of dy: of 40 draws two
    took it past the bar in float32 (3e-5; the median is 2e-6). The draw is fixed, like every test's.
    """
    inputs = make_inputs(2, length, 4, 16, 1, 16, seed=3 + length, dtype=dtype)
    inputs[1], inputs[2], inputs[5], inputs[6] = (inputs[i].float() for i in (1, 2, 5, 6))
    dy, dstate = torch.randn(2, length, 4, 16).to(dtype), torch.randn(2, 4, 16, 16)
    expected = run_reference(inputs, dy, dstate)
    ours = run_torch(inputs, dy, dstate, chunk_size=64)
    assert ours[0].dtype == dtype
    assert ours[1].dtype == torch.float32
    for mine, plain in zip(
        errors(ours, expected), errors(run_torch(inputs, dy, dstate, scan=plain_scan), expected), strict=True
    ):
        assert mine <= 2 * plain + 1e-5


@pytest.mark.parametrize("chunk_size", [1, 5, 32, 100, 1000])
def test_chunk_size_does_not_matter(chunk_size):
    inputs = make_inputs(2, 90, 2, 4, 1, 3)
    dy, dstate = torch.randn(2, 90, 2, 4).double(), torch.randn(2, 2, 4, 3).double()
    for a, b in zip(
        run_torch(inputs, dy, dstate, chunk_size=chunk_size), run_torch(inputs, dy, dstate, chunk_size=45), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_chunk_length():
    assert ssd_chunk_length(500, 64) == 50
    assert ssd_chunk_length(512, 64) == 64
    assert ssd_chunk_length(63, 64) == 63
    assert ssd_chunk_length(127, 64) == 64  # a prime is padded
    for length in range(1, 300):
        for chunk_size in (1, 2, 7, 64):
            chunk = ssd_chunk_length(length, chunk_size)
            assert 1 <= chunk <= chunk_size
            assert chunk == min(length, chunk_size) or length % chunk == 0


@pytest.mark.parametrize("cuts", [(40,), (1, 2, 50), tuple(range(1, 70))])
def test_state_carries_across_a_split(cuts):
    """One long call equals several, down to one position at a time (decoding)."""
    inputs = make_inputs(2, 70, 4, 5, 2, 6)
    x, dt, A, B, C, D, state = inputs
    whole, whole_state = ssd_scan_torch(*inputs[:6], initial_state_BHPN=state, chunk_size=16)
    parts, edges = [], (0, *cuts, 70)
    for start, end in itertools.pairwise(edges):
        s = slice(start, end)
        y, state = ssd_scan_torch(x[:, s], dt[:, s], A, B[:, s], C[:, s], D, initial_state_BHPN=state, chunk_size=16)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, whole_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", [1, 30, 47, 99])
def test_later_inputs_change_nothing_earlier(change):
    inputs = make_inputs(1, 100, 2, 4, 1, 3, dtype=torch.float32)
    before, _ = ssd_scan_torch(*inputs[:6], chunk_size=16)
    other = [t.clone() for t in inputs]
    for i, value in ((0, 1e3), (1, 50.0), (3, -1e3), (4, 7.0)):
        other[i][:, change:] = value
    after, _ = ssd_scan_torch(*other[:6], chunk_size=16)
    assert torch.equal(before[:, :change], after[:, :change])
    assert not torch.equal(before[:, change:], after[:, change:])


@pytest.mark.parametrize("lengths", [(20, 13, 7), (1, 1, 38), (16, 16, 8), (39, 1)])
def test_documents_equal_documents_run_alone(lengths):
    """Outputs, final state and gradients of concatenated documents are those of each document by itself."""
    total = sum(lengths)
    inputs = make_inputs(2, total, 2, 4, 1, 3)
    dy, dstate = torch.randn(2, total, 2, 4).double(), torch.randn(2, 2, 4, 3).double()
    # The first id comes back at the end: not the id counts, but its change.
    ids = torch.tensor(np.repeat([7, 3, 7][: len(lengths)], lengths)).expand(2, -1)
    together = run_torch(inputs, dy, dstate, documents=ids, chunk_size=8)
    assert max(errors(together, run_reference(inputs, dy, dstate, ids))) < 1e-12
    ys, grads, start = [], [], 0
    for i, length in enumerate(lengths):
        s, last = slice(start, start + length), i == len(lengths) - 1
        start += length
        alone = [t[:, s] if j in (0, 1, 3, 4) else t for j, t in enumerate(inputs)]
        if i:
            alone[6] = torch.zeros_like(alone[6])
        result = run_torch(alone, dy[:, s], dstate if last else torch.zeros_like(dstate), chunk_size=8)
        ys.append(result[0])
        grads.append(result[2:])
        if last:
            torch.testing.assert_close(together[1], result[1], rtol=1e-12, atol=1e-12)
    close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)
    close(together[0], torch.cat(ys, 1))
    for j in (0, 1, 3, 4):
        close(together[2 + j], torch.cat([g[j] for g in grads], 1))
    for j in (2, 5):
        close(together[2 + j], sum(g[j] for g in grads))
    close(together[8], grads[0][6])


@pytest.mark.parametrize("strength", [1e2, 1e4, 1e8])
def test_strong_decay_neither_overflows_nor_turns_nan(strength):
    inputs = make_inputs(1, 100, 2, 4, 1, 3, dtype=torch.float32)
    inputs[2] = -strength * torch.ones(2)
    dy, dstate = torch.randn(1, 100, 2, 4), torch.randn(1, 2, 4, 3)
    results = run_torch(inputs, dy, dstate, chunk_size=64)
    assert all(torch.isfinite(t).all() for t in results)
    assert max(errors(results, run_reference(inputs, dy, dstate))) < 1e-5


def test_no_decay_is_a_running_sum():
    inputs = make_inputs(1, 200, 2, 4, 1, 3)
    x, dt, A, B, C, D, state = inputs
    _, final = ssd_scan_torch(x, dt, torch.zeros_like(A), B, C, D, initial_state_BHPN=state)
    torch.testing.assert_close(
        final, state + torch.einsum("bthp,bth,btn->bhpn", x, dt, B[:, :, 0]), rtol=1e-12, atol=1e-12
    )


def test_options_left_out():
    """No D, no initial state, and a gradient through only one of the two results."""
    x, dt, A, B, C, D, _ = make_inputs(2, 33, 2, 4, 1, 3)
    x.requires_grad_()
    y, state = ssd_scan_torch(x, dt, A, B, C, chunk_size=8)
    y0, state0 = ssd_scan_torch(
        x, dt, A, B, C, D * 0, initial_state_BHPN=torch.zeros(2, 2, 4, 3).double(), chunk_size=8
    )
    torch.testing.assert_close(y, y0)
    torch.testing.assert_close(state, state0)
    for a, b in ((y, y0), (state, state0)):
        grads = [torch.autograd.grad(t.sum(), x, retain_graph=True)[0] for t in (a, b)]
        torch.testing.assert_close(*grads)


def test_non_contiguous_inputs():
    x, dt, A, B, C, D, state = make_inputs(2, 32, 2, 4, 1, 3)
    wide = torch.cat(
        [x.reshape(2, 32, 8), B[:, :, 0], C[:, :, 0], dt], dim=-1
    )  # one projection, cut up, as a model does
    px, pB, pC, pdt = wide.split([8, 3, 3, 2], dim=-1)
    y, s = ssd_scan_torch(
        px.unflatten(-1, (2, 4)), pdt, A, pB[:, :, None], pC[:, :, None], D,
        initial_state_BHPN=state.transpose(2, 3).contiguous().transpose(2, 3), chunk_size=8,
    )  # fmt: skip
    y0, s0 = ssd_scan_torch(x, dt, A, B, C, D, initial_state_BHPN=state, chunk_size=8)
    assert torch.equal(y, y0)
    assert torch.equal(s, s0)


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_vectors(index, dtype):
    """Stored in float32, so float64 agrees to float32 rounding of the stored numbers."""
    with np.load(GOLDEN / f"ssd_{index}.npz", allow_pickle=False) as file:
        golden = {key: file[key] for key in file.files}
    arrays = [golden[name] for name in NAMES[:6]]
    leaves = [torch.tensor(a, dtype=dtype).requires_grad_() for a in arrays]
    y, state = ssd_scan_torch(*leaves)
    grads = torch.autograd.grad((y * torch.tensor(golden["grad_y"], dtype=dtype)).sum(), leaves)
    y1, state1 = ssd_scan_torch(*leaves, initial_state_BHPN=torch.tensor(golden["initial_state"], dtype=dtype))
    results = [y, state, y1, state1, *grads]
    keys = ["y", "final_state", "y_with_initial", "final_state_with_initial", *(f"d{name}" for name in NAMES[:6])]
    expected = [golden[key].astype(np.float64) for key in keys]
    assert max(errors([t.detach() for t in results], expected)) < (1e-6 if dtype == torch.float64 else 2e-5)
    ref_y, ref_state = ssd_scan_reference(*arrays)
    assert max(errors([torch.tensor(ref_y), torch.tensor(ref_state)], expected[:2])) < 1e-6
    ref = ssd_scan_backward_reference(golden["grad_y"], None, *arrays)
    assert max(errors([torch.tensor(ref[name]) for name in NAMES[:6]], expected[4:])) < 1e-6


def test_wrong_shapes_are_named():
    x, dt, A, B, C, D, state = make_inputs(2, 8, 4, 4, 2, 3)
    with pytest.raises(ValueError, match=r"dt is \(2, 7, 4\), expected \(2, 8, 4\)"):
        ssd_scan_torch(x, dt[:, :7], A, B, C, D)
    with pytest.raises(ValueError, match="initial_state"):
        ssd_scan_torch(x, dt, A, B, C, D, initial_state_BHPN=state.mT)
    with pytest.raises(ValueError, match="dividing"):
        ssd_scan_torch(x[:, :, :3], dt[:, :, :3], A[:3], B, C, D[:3])
    with pytest.raises(ValueError, match="chunk_size"):
        ssd_scan_torch(x, dt, A, B, C, D, chunk_size=0)


def test_inside_torch_compile():
    """One graph without breaks, forward and backward (the compiler's front end; no code is generated here)."""
    inputs = make_inputs(2, 50, 2, 4, 1, 3)
    documents = (torch.arange(50) // 20).expand(2, -1)

    def loss(*a):
        y, state = ssd_scan_torch(*a[:6], initial_state_BHPN=a[6], document_ids_BT=documents, chunk_size=25)
        return y.sin().sum() + state.square().sum()

    leaves = [t.requires_grad_() for t in inputs]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
