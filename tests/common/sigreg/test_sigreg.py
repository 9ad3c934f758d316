"""SIGReg against float64, golden vectors, its noise floor, and two processes against one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import common.sigreg.torch_impl
from common.sigreg.reference import sigreg_quadrature_reference, sigreg_reference
from common.sigreg.torch_impl import sigreg_floor, sigreg_quadrature, sigreg_torch

GOLDEN = Path(__file__).parents[2] / "golden"


def make_inputs(shape, projections=11, dtype=torch.float64):
    g = torch.Generator().manual_seed(sum(shape))
    z = torch.randn(*shape, generator=g, dtype=torch.float64) * 1.3 + 0.2
    A = torch.randn(shape[-1], projections, generator=g, dtype=torch.float64)
    return z.to(dtype), (A / A.norm(dim=0)).to(dtype)


def value_and_gradient(z, A, **options):
    z = z.detach().clone().requires_grad_()
    value = sigreg_torch(z, A, **options)
    return value.detach(), torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize("shape", [(16, 9, 6), (1, 3, 6), (40, 6), (1, 6)])
@pytest.mark.parametrize("knots", [2, 17, 40])
def test_float64_equals_reference(shape, knots):
    z, A = make_inputs(shape)
    per_timestep = len(shape) == 3
    value, gradient = value_and_gradient(z, A, knots=knots, per_timestep=per_timestep)
    expected, expected_gradient = sigreg_reference(z.numpy(), A.numpy(), knots=knots, per_timestep=per_timestep)
    np.testing.assert_allclose(value.item(), expected, rtol=1e-12)
    np.testing.assert_allclose(gradient.numpy(), expected_gradient, rtol=1e-10, atol=1e-14)


def test_reference_gradient_is_that_of_its_value():
    z, A = (t.numpy() for t in make_inputs((4, 3, 5)))
    _, gradient = sigreg_reference(z, A, per_timestep=True)
    for index in ((0, 0, 0), (3, 2, 4), (1, 1, 2)):
        step = np.zeros_like(z)
        step[index] = 1e-5
        slope = (
            sigreg_reference(z + step, A, per_timestep=True)[0] - sigreg_reference(z - step, A, per_timestep=True)[0]
        ) / 2e-5
        np.testing.assert_allclose(gradient[index], slope, rtol=1e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 5e-3)])
def test_low_precision(dtype, tolerance):
    z, A = make_inputs((32, 20, 16), 64, dtype)
    value, gradient = value_and_gradient(z, A, per_timestep=True)
    expected, expected_gradient = sigreg_reference(z.double().numpy(), A.double().numpy(), per_timestep=True)
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    np.testing.assert_allclose(value.item(), expected, rtol=5e-6)
    assert np.abs(gradient.double().numpy() - expected_gradient).max() <= tolerance * np.abs(expected_gradient).max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_vectors(dtype):
    with np.load(GOLDEN / "sigreg.npz", allow_pickle=False) as file:
        golden = {key: file[key] for key in file.files}
    for ours in (sigreg_quadrature(), sigreg_quadrature_reference()):
        for a, key in zip(ours, ("t", "phi", "weights"), strict=True):
            np.testing.assert_allclose(a, golden[key], rtol=1e-6)  # computed in float32
    A = torch.tensor(golden["A"], dtype=dtype)
    value, gradient = value_and_gradient(torch.tensor(golden["z"], dtype=dtype), A, per_timestep=True)
    np.testing.assert_allclose(value.item(), golden["loss"], rtol=1e-6)
    assert np.abs(gradient.numpy() - golden["dz"]).max() < 2e-6 * np.abs(golden["dz"]).max()
    pooled = sigreg_torch(torch.tensor(golden["z_pooled"], dtype=dtype), A, per_timestep=False)
    np.testing.assert_allclose(pooled.item(), golden["loss_pooled"], rtol=1e-6)
    np.testing.assert_allclose(
        sigreg_reference(golden["z"], golden["A"], per_timestep=True)[0], golden["loss"], rtol=1e-6
    )


def test_blocks_do_not_matter(monkeypatch):
    """The sum over small blocks of samples and positions is the sum over all."""
    z, A = make_inputs((20, 9, 6))
    whole = value_and_gradient(z, A, per_timestep=True)
    for rows, columns in ((3, 2), (20, 1), (7, 9)):
        blocks = [(slice(n, n + rows), slice(t, t + columns)) for n in range(0, 20, rows) for t in range(0, 9, columns)]
        monkeypatch.setattr(common.sigreg.torch_impl, "_sigreg_blocks", lambda *_, blocks=blocks: blocks)
        for a, b in zip(value_and_gradient(z, A, per_timestep=True), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("is_cuda", [False, True])
@pytest.mark.parametrize("shape", [(16, 512, 384), (8192, 1, 384), (1, 1, 1), (3, 7, 10**9)])
def test_blocks_cover_everything_once(shape, is_cuda):
    samples, positions, width = shape
    seen = np.zeros((samples, positions), int)
    for rows, columns in common.sigreg.torch_impl._sigreg_blocks(samples, positions, width, is_cuda):
        seen[rows, columns] += 1
    assert (seen == 1).all()


def test_gaussian_samples_sit_at_the_floor():
    """64 samples: 0.0164, the figure that logs of a collapsed-looking and of a perfect embedding share."""
    assert sigreg_floor(64) == pytest.approx(0.0164147, rel=1e-5)
    assert sigreg_floor(8) == pytest.approx(8 * sigreg_floor(64))
    g = torch.Generator().manual_seed(0)
    z = torch.randn(64, 200, 16, generator=g, dtype=torch.float64)
    _, A = make_inputs((1, 1, 16), 32)
    assert sigreg_torch(z, A, per_timestep=True).item() == pytest.approx(sigreg_floor(64), rel=0.03)
    assert sigreg_torch(0 * z, A, per_timestep=True).item() > 20 * sigreg_floor(64)


def _sigreg_worker(rank, path, shares, out):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=len(shares))
    results = {}
    for shape in ((5, 6), (6,)):
        z, A = make_inputs((sum(shares), *shape))
        start = sum(shares[:rank])
        own = z[start : start + shares[rank]]
        value, gradient = value_and_gradient(own, A, per_timestep=len(shape) == 2)
        results[f"value{len(shape)}"], results[f"gradient{len(shape)}"] = value.numpy(), gradient.numpy()
    np.savez(f"{out}_{rank}.npz", **results)
    dist.barrier()  # without it gloo now and then aborts the process that leaves while the other still works
    dist.destroy_process_group()


@pytest.mark.parametrize("shares", [(8, 8), (3, 9)])
def test_two_processes_equal_one(tmp_path, shares):
    """The value is that of the samples of both ranks; the gradients, averaged over ranks, are those of one process."""
    mp.spawn(_sigreg_worker, (tmp_path / "rendezvous", shares, tmp_path / "out"), nprocs=2)
    for shape in ((5, 6), (6,)):
        z, A = make_inputs((sum(shares), *shape))
        value, gradient = value_and_gradient(z, A, per_timestep=len(shape) == 2)
        gathered = []
        for rank in range(2):
            with np.load(f"{tmp_path / 'out'}_{rank}.npz", allow_pickle=False) as file:
                np.testing.assert_allclose(file[f"value{len(shape)}"], value.item(), rtol=1e-12)
                gathered.append(file[f"gradient{len(shape)}"])
        # A parameter's gradient is the sum of its rows' gradients over ranks; averaging divides by 2.
        np.testing.assert_allclose(np.concatenate(gathered) / 2, gradient.numpy(), rtol=1e-10, atol=1e-14)


def test_wrong_arguments_are_named():
    z, A = make_inputs((4, 3, 5))
    with pytest.raises(ValueError, match=r"expected \(N,D\)"):
        sigreg_torch(z, A, per_timestep=False)
    with pytest.raises(ValueError, match="at least 2"):
        sigreg_torch(z, A, knots=1, per_timestep=True)
    with pytest.raises(ValueError, match="at least 1"):
        sigreg_floor(0)
