"""Newton-Schulz with mirrored products against singular values in float64, and Muon on top of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import common.optim.triton_impl
from common.optim.muon import POLAR_EXPRESS_POLYNOMIALS, Muon, newton_schulz_torch
from common.optim.reference import newton_schulz_reference
from common.optim.triton_impl import newton_schulz_triton


def random_matrices(device, shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


@pytest.mark.parametrize("shape", [(2, 8, 12), (1, 40, 21), (3, 17, 17), (1, 1, 4), (2, 5, 70), (35, 20)])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_equals_the_action_on_singular_values(kernel_device, shape, steps):
    G = random_matrices(kernel_device, shape)
    ours = newton_schulz_triton(G, steps, dtype=torch.float32)
    assert ours.dtype == torch.float32
    assert ours.shape == G.shape
    for mine, matrix in zip(ours.cpu().reshape(-1, *shape[-2:]), G.cpu().reshape(-1, *shape[-2:]), strict=True):
        np.testing.assert_allclose(mine.numpy(), newton_schulz_reference(matrix.numpy(), steps), atol=2e-5)


def test_other_polynomials_take_their_turn(kernel_device):
    G = random_matrices(kernel_device, (8, 12))
    ours = newton_schulz_triton(G, 3, dtype=torch.float32, polynomials=POLAR_EXPRESS_POLYNOMIALS)
    expected = newton_schulz_reference(G.cpu().numpy(), 3, POLAR_EXPRESS_POLYNOMIALS)
    np.testing.assert_allclose(ours.cpu().numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 24, 33), (1, 33, 24)])
def test_error_is_at_most_twice_that_of_the_torch_form(kernel_device, dtype, shape):
    G = random_matrices(kernel_device, shape)
    exact = np.stack([newton_schulz_reference(g.numpy(), 3) for g in G.cpu()])
    ours, theirs = (
        np.sqrt(np.mean((form(G, 3, dtype=dtype).cpu().double().numpy() - exact) ** 2))
        for form in (newton_schulz_triton, newton_schulz_torch)
    )
    assert ours <= 2 * theirs + 1e-5


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize(("count", "side", "length"), [(1, 4, 4), (3, 20, 36), (2, 52, 8)])
def test_product_is_symmetric_and_written_whole(kernel_device, monkeypatch, added, count, side, length):
    """Room full of NaN before; tiles that reach into the next matrix leave it alone; mirrored tiles to the bit."""
    X = random_matrices(kernel_device, (count, side, length))
    other = X.new_empty((count, side, side)).copy_(X @ X.mT) if added else None
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    found = common.optim.triton_impl._mirrored_product(X, other, 2.0, 0.5)
    wide = X.double()
    expected = 2.0 * wide @ wide.mT + (0.5 * other.double() if other is not None else 0.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    if other is None:  # tiles on the diagonal are one product: how symmetric, is the matter of what multiplies
        tile_S = torch.arange(side, device=found.device) // (16 if kernel_device == "cpu" else 64)
        mirrored_SS = tile_S[:, None] != tile_S[None, :]
        assert torch.equal(found[:, mirrored_SS], found.mT[:, mirrored_SS])


def test_matrices_do_not_depend_on_each_other(kernel_device):
    G = random_matrices(kernel_device, (3, 20, 24))
    before = newton_schulz_triton(G, 2, dtype=torch.float32)
    G[1] *= -3.0
    G[1, 0] = 0.0
    after = newton_schulz_triton(G, 2, dtype=torch.float32)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])
    assert torch.equal(newton_schulz_triton(torch.zeros_like(G), 2, dtype=torch.float32), torch.zeros_like(G))


def test_muon_takes_it(kernel_device):
    """Lying and standing matrices of one pair of sides, row blocks and normalised rows, beside the torch form."""
    shapes = [(8, 24), (24, 8), (24, 8), (12, 12)]
    found = []
    for form in (newton_schulz_triton, newton_schulz_torch):
        params = [torch.nn.Parameter(random_matrices(kernel_device, shape)) for shape in shapes]
        groups = [{"params": params[:2]}, {"params": params[2:3], "row_splits": (8, 16)}, {"params": params[3:]}]
        optimizer = Muon(groups, lr=0.1, steps=3, normalize_rows=True, dtype=torch.float32, newton_schulz=form)
        for i in range(2):
            for p in params:
                p.grad = random_matrices(kernel_device, (*p.shape, i + 1))[..., -1]
            optimizer.step()
        found.append(params)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_wrong_arguments_are_named(kernel_device):
    G = random_matrices(kernel_device, (2, 4, 6))
    with pytest.raises(ValueError, match="float16"):
        newton_schulz_triton(G, 2, dtype=torch.float16)
    with pytest.raises(ValueError, match="steps"):
        newton_schulz_triton(G, -1)
    with pytest.raises(ValueError, match=r"\(4,\)"):
        newton_schulz_triton(torch.zeros(4, device=kernel_device), 2)
