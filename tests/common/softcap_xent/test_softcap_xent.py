"""The fused loss against whole logits in float64, golden vectors, and the memory that it promises not to use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.softcap_xent.reference import softcap_nll_reference, softcap_reference, softcap_xent_reference
from common.softcap_xent.torch_impl import SOFTCAP_POLY_EDGE, softcap_nll_torch, softcap_torch, softcap_xent_torch

GOLDEN = Path(__file__).parents[2] / "golden"
KINDS = ("poly", "tanh", "none")


def make_inputs(rows=50, vocabulary=37, width=24, spread=4.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((rows, width), (vocabulary, width), (vocabulary,)))
    return [x.to(dtype), (weight * spread).to(dtype), bias.to(dtype)], torch.randint(0, vocabulary, (rows,), generator=g)


def plain_loss(x, weight, bias, targets, cap, kind, z_weight):
    """Whole logits and ordinary autograd, in the dtype of the inputs."""
    logits = torch.nn.functional.linear(x, weight, bias)
    capped = softcap_torch(logits, cap, kind)
    return torch.nn.functional.cross_entropy(capped, targets) + z_weight * torch.logsumexp(capped, 1).square().mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 16, 50, 1000, None])
def test_float64_equals_whole_logits(kind, bias, chunk_tokens):
    (x, weight, b), targets = make_inputs()
    leaves = [t.requires_grad_() for t in ((x, weight, b) if bias else (x, weight))]
    b = b if bias else None
    # spread 4: most logits pass the cap of 15 and sit in the flat part of the polynomial
    loss, ce, z = softcap_xent_torch(x, weight, b, targets, cap=15.0, kind=kind, z_weight=1e-2, chunk_tokens=chunk_tokens)
    expected = softcap_xent_reference(
        *(None if t is None else t.detach().numpy() for t in (x, weight, b)), targets.numpy(), cap=15.0, kind=kind, z_weight=1e-2
    )
    np.testing.assert_allclose([t.item() for t in (loss, ce, z)], expected, rtol=1e-13)
    assert not ce.requires_grad
    assert not z.requires_grad
    ours = torch.autograd.grad(3.0 * loss, leaves)
    theirs = torch.autograd.grad(3.0 * plain_loss(x, weight, b, targets, 15.0, kind, 1e-2), leaves)
    for a, c in zip(ours, theirs, strict=True):
        assert c.abs().max() > 1e-3
        torch.testing.assert_close(a, c, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_that_of_the_plain_form(kind):
    inputs, targets = make_inputs(rows=64, spread=1.0, dtype=torch.float32)
    exact = [t.double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(plain_loss(*exact, targets, 15.0, kind, 1e-2), exact)
    leaves = [t.requires_grad_() for t in inputs]
    ours = torch.autograd.grad(
        softcap_xent_torch(*leaves, targets, cap=15.0, kind=kind, z_weight=1e-2, chunk_tokens=20)[0], leaves
    )
    theirs = torch.autograd.grad(plain_loss(*leaves, targets, 15.0, kind, 1e-2), leaves)
    for mine, other, truth in zip(ours, theirs, expected, strict=True):
        assert (mine - truth).abs().max() <= 2 * (other - truth).abs().max() + 1e-5 * truth.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
def test_huge_logits_stay_finite(kind, scale):
    (x, weight, bias), targets = make_inputs(rows=8, dtype=torch.float32)
    leaves = [x.requires_grad_(), (weight * scale).requires_grad_(), bias.requires_grad_()]
    for cap in (15.0, 59.0, 1000.0):
        loss, _, _ = softcap_xent_torch(*leaves, targets, cap=cap, kind=kind, z_weight=0.0)
        assert torch.isfinite(loss)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, leaves))


def test_bfloat16_rows_and_float32_weight():
    (x, weight, bias), targets = make_inputs(spread=1.0, dtype=torch.float32)
    x = x.bfloat16()
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    loss, _, _ = softcap_xent_torch(*leaves, targets, cap=15.0, kind="poly", z_weight=1e-4)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, leaves)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    wide = [t.detach().float().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(plain_loss(*wide, targets, 15.0, "poly", 1e-4), wide)
    for a, b, tolerance in zip(grads, expected, (4e-3, 1e-5, 1e-5), strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_nll(kind, temperature):
    (x, weight, bias), targets = make_inputs()
    nll = softcap_nll_torch(x, weight, bias, targets, cap=15.0, kind=kind, temperature=temperature, chunk_tokens=13)
    expected, _ = softcap_nll_reference(
        x.numpy(), weight.numpy(), bias.numpy(), targets.numpy(), cap=15.0, kind=kind, temperature=temperature
    )
    np.testing.assert_allclose(nll.numpy(), expected, rtol=1e-12, atol=1e-12)
    low = softcap_nll_torch(x.float(), weight.float(), bias.float(), targets, cap=15.0, kind=kind, temperature=temperature)
    assert low.dtype == torch.float32
    np.testing.assert_allclose(low.numpy(), expected, rtol=2e-4, atol=2e-4)


def test_no_gradient_when_none_is_wanted():
    (x, weight, bias), targets = make_inputs()
    loss, _, _ = softcap_xent_torch(x, weight, bias, targets, cap=15.0, kind="poly")
    assert not loss.requires_grad
    weight.requires_grad_()
    with torch.no_grad():
        same, _, _ = softcap_xent_torch(x, weight, bias, targets, cap=15.0, kind="poly")
    assert torch.equal(loss, same)


def test_edge_of_the_polynomial():
    u = SOFTCAP_POLY_EDGE
    assert abs(u - u**3 / 3 + u**5 / 15 - 1) < 1e-15
    logits = torch.linspace(-60, 60, 4001, dtype=torch.float64).requires_grad_()
    capped = softcap_torch(logits, 15.0, "poly")
    np.testing.assert_allclose(capped.detach().numpy(), softcap_reference(logits.detach().numpy(), 15.0, "poly"), atol=1e-13)
    slope = torch.autograd.grad(capped.sum(), logits)[0]
    assert ((slope > 0) == (logits.abs() < 15.0 * u)).all()
    assert (capped.diff() >= 0).all()


def test_golden_vectors():
    with np.load(GOLDEN / "softcap_ce.npz") as file:
        golden = {key: file[key] for key in file.files}
    raw, targets = torch.tensor(golden["raw"]), torch.tensor(golden["targets"])
    np.testing.assert_allclose(softcap_torch(raw.double(), 15.0, "poly").numpy(), golden["capped"], atol=4e-6)
    np.testing.assert_allclose(softcap_torch(raw, 15.0, "poly").numpy(), golden["capped"], atol=8e-6)
    np.testing.assert_allclose(softcap_reference(golden["raw"], 15.0, "poly"), golden["capped"], atol=4e-6)
    for dtype in (torch.float64, torch.float32):
        eye = torch.eye(raw.shape[1], dtype=dtype)
        _, ce, z = softcap_xent_torch(raw.to(dtype), eye, None, targets, cap=15.0, kind="poly", z_weight=1e-4)
        np.testing.assert_allclose([ce.item(), z.item()], [golden["ce"], golden["z"]], rtol=1e-6)


def test_whole_logits_never_exist():
    """No operation of the fused loss sees a tensor of more than chunk_tokens * V numbers, inputs and gradients apart."""
    (x, weight, bias), targets = make_inputs(rows=200, vocabulary=100, width=4, dtype=torch.float32)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, torch.Tensor))
            return out

    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with Watch():
        softcap_xent_torch(*leaves, targets, cap=15.0, kind="poly", z_weight=1e-4, chunk_tokens=10)[0].backward()
        softcap_nll_torch(*leaves, targets, cap=15.0, kind="poly", chunk_tokens=10)
    assert max(sizes) == 10 * 100


def test_wrong_arguments_are_named():
    (x, weight, bias), targets = make_inputs()
    with pytest.raises(ValueError, match="'gelu'"):
        softcap_xent_torch(x, weight, bias, targets, cap=15.0, kind="gelu")
    with pytest.raises(ValueError, match="cap is 0"):
        softcap_xent_torch(x, weight, bias, targets, cap=0.0, kind="tanh")
    with pytest.raises(ValueError, match="targets"):
        softcap_xent_torch(x, weight, bias, targets[:-1], cap=15.0, kind="tanh")
    with pytest.raises(ValueError, match="temperature"):
        softcap_nll_torch(x, weight, bias, targets, cap=15.0, kind="tanh", temperature=0.0)
    with pytest.raises(ValueError, match="chunk_tokens"):
        softcap_xent_torch(x, weight, bias, targets, cap=15.0, kind="tanh", chunk_tokens=0)
