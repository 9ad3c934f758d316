"""The Triton form of the fused loss against float64, beside the plain form of the same dtype."""

from __future__ import annotations

import pytest
import torch

from common.softcap_xent.torch_impl import softcap_nll_torch, softcap_torch, softcap_xent_torch
from common.softcap_xent.triton_impl import softcap_nll_triton, softcap_xent_triton

KINDS = ("poly", "tanh", "none")


def make_inputs(device, rows=50, vocabulary=77, width=24, spread=1.0, dtype=torch.float32):
    """Rows, projection, bias and targets; the projection and bias are masters of float32."""
    g = torch.Generator().manual_seed(rows + vocabulary)
    x, weight, bias = (torch.randn(*s, generator=g) for s in ((rows, width), (vocabulary, width), (vocabulary,)))
    weight = (weight * spread).to(dtype).float()  # the same numbers for every form
    targets = torch.randint(0, vocabulary, (rows,), generator=g)
    return [x.to(device, dtype), weight.to(device), bias.to(device)], targets.to(device)


def plain(x, weight, bias, targets, cap, kind, z_weight):
    """Whole logits and ordinary autograd in the dtype of x, cross-entropy in float32 at least."""
    logits = torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    capped = softcap_torch(logits if x.dtype == torch.float64 else logits.float(), cap, kind)
    return torch.nn.functional.cross_entropy(capped, targets) + z_weight * torch.logsumexp(capped, 1).square().mean()


def root_mean_square(t):
    return t.double().square().mean().sqrt().item()


def loss_and_gradients(form, inputs, targets, **options):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    result = form(*leaves, targets, **options)
    loss = result[0] if isinstance(result, tuple) else result
    wanted = [t for t in leaves if t is not None]
    return [loss.detach(), *torch.autograd.grad(3.0 * loss, wanted)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "cap"), [("poly", 15.0), ("tanh", 15.0), ("none", 1.0), ("poly", 100.0)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_error_is_at_most_twice_that_of_the_plain_form(kernel_device, dtype, kind, cap, with_bias):
    inputs, targets = make_inputs(kernel_device, dtype=dtype, spread=1.5)
    if not with_bias:
        inputs[2] = None
    options = {"cap": cap, "kind": kind, "z_weight": 1e-2}
    exact = [None if t is None else t.double() for t in inputs]
    truth = loss_and_gradients(plain, exact, targets, **options)
    other = loss_and_gradients(plain, inputs, targets, **options)
    ours = loss_and_gradients(softcap_xent_triton, inputs, targets, chunk_tokens=20, **options)
    for mine, theirs, exactly in zip(ours, other, truth, strict=True):
        assert mine.shape == exactly.shape
        bound = 2 * root_mean_square(theirs - exactly) + 1e-5 * max(1.0, root_mean_square(exactly))
        assert root_mean_square(mine - exactly) <= bound
        assert exactly.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "chunk_tokens"),
    [(1, 1, 1, None), (1, 64, 16, None), (33, 31, 7, 32), (70, 65, 17, 1), (64, 96, 40, 128), (3, 130, 5, 2)],
)
@pytest.mark.parametrize("kind", ["poly", "none"])
def test_odd_sizes(kernel_device, rows, vocabulary, width, chunk_tokens, kind):
    inputs, targets = make_inputs(kernel_device, rows, vocabulary, width)
    options = {"cap": 8.0, "kind": kind, "z_weight": 1e-3, "chunk_tokens": chunk_tokens}
    ours = loss_and_gradients(softcap_xent_triton, inputs, targets, **options)
    truth = loss_and_gradients(softcap_xent_torch, [t.double() for t in inputs], targets, **options)
    for mine, exactly in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), exactly, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_ce_and_z_are_those_of_the_torch_form(kernel_device, kind):
    inputs, targets = make_inputs(kernel_device)
    options = {"cap": 15.0, "kind": kind, "z_weight": 1e-2}
    ours, theirs = (form(*inputs, targets, **options) for form in (softcap_xent_triton, softcap_xent_torch))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.2])
@pytest.mark.parametrize("chunk_tokens", [None, 13])
def test_nll(kernel_device, kind, temperature, chunk_tokens):
    inputs, targets = make_inputs(kernel_device)
    options = {"cap": 15.0, "kind": kind, "temperature": temperature}
    nll = softcap_nll_triton(*inputs, targets, chunk_tokens=chunk_tokens, **options)
    expected = softcap_nll_torch(*(t.double() for t in inputs), targets, **options)
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_huge_logits_stay_finite(kernel_device, kind, scale):
    inputs, targets = make_inputs(kernel_device, rows=8)
    inputs[1] = inputs[1] * scale
    for cap in (15.0, 59.0, 1000.0):
        found = loss_and_gradients(softcap_xent_triton, inputs, targets, cap=cap, kind=kind)
        assert all(torch.isfinite(t).all() for t in found)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_shows(kernel_device, kind):
    inputs, targets = make_inputs(kernel_device, rows=8)
    inputs[0][3, 1] = float("nan")
    loss, dx, *_ = loss_and_gradients(softcap_xent_triton, inputs, targets, cap=15.0, kind=kind)
    assert loss.isnan()
    assert dx[3].isnan().all()
    nll = softcap_nll_triton(*inputs, targets, cap=15.0, kind=kind)
    assert nll.isnan().tolist() == [row == 3 for row in range(8)]


def test_poisoned_memory_is_never_read(kernel_device, monkeypatch):
    """Every buffer the form asks for is filled with NaN first: what it does not write itself would show."""
    inputs, targets = make_inputs(kernel_device, rows=37, vocabulary=45, width=9)
    options = {"cap": 15.0, "kind": "poly", "z_weight": 1e-2, "chunk_tokens": 20}
    clean = loss_and_gradients(softcap_xent_triton, inputs, targets, **options)

    def poisoned(form):
        def call(*args, **kwargs):
            made = form(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return call

    for where, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(where, name, poisoned(getattr(where, name)))
    again = loss_and_gradients(softcap_xent_triton, inputs, targets, **options)
    for a, b in zip(clean, again, strict=True):
        assert torch.equal(a, b)


def test_pieces_do_not_matter(kernel_device):
    inputs, targets = make_inputs(kernel_device, rows=70)
    options = {"cap": 15.0, "kind": "poly", "z_weight": 1e-2}
    whole = loss_and_gradients(softcap_xent_triton, inputs, targets, **options)
    for chunk_tokens in (1, 32, 64, 500):
        piece = loss_and_gradients(softcap_xent_triton, inputs, targets, chunk_tokens=chunk_tokens, **options)
        for a, b in zip(whole, piece, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rows_do_not_depend_on_each_other(kernel_device):
    """A changed row changes no other row's likelihood or gradient, bit for bit."""
    inputs, targets = make_inputs(kernel_device, rows=40)
    options = {"cap": 15.0, "kind": "poly", "z_weight": 1e-2}
    before = loss_and_gradients(softcap_xent_triton, inputs, targets, **options)[1]
    nll = softcap_nll_triton(*inputs, targets, cap=15.0, kind="poly")
    inputs[0][20] += 1.0
    after = loss_and_gradients(softcap_xent_triton, inputs, targets, **options)[1]
    kept = torch.arange(40, device=inputs[0].device) != 20
    assert torch.equal(before[kept], after[kept])
    assert not torch.equal(before[20], after[20])
    assert torch.equal(nll[kept], softcap_nll_triton(*inputs, targets, cap=15.0, kind="poly")[kept])


def test_wrong_arguments_are_named(kernel_device):
    (x, weight, bias), targets = make_inputs(kernel_device)
    with pytest.raises(ValueError, match="float64"):
        softcap_xent_triton(x.double(), weight, bias, targets, cap=15.0, kind="poly")
    with pytest.raises(ValueError, match="'gelu'"):
        softcap_xent_triton(x, weight, bias, targets, cap=15.0, kind="gelu")
    with pytest.raises(ValueError, match="targets"):
        softcap_nll_triton(x, weight, bias, targets[:-1], cap=15.0, kind="tanh")
    with pytest.raises(ValueError, match="temperature"):
        softcap_nll_triton(x, weight, bias, targets, cap=15.0, kind="tanh", temperature=-1.0)
    with pytest.raises(ValueError, match="chunk_tokens"):
        softcap_xent_triton(x, weight, bias, targets, cap=15.0, kind="tanh", chunk_tokens=0)
