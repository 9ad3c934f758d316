"""The Triton form of SIGReg against float64, beside the torch form, and two processes against one."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common.sigreg.reference import sigreg_reference
from common.sigreg.torch_impl import sigreg_torch
from common.sigreg.triton_impl import sigreg_triton


def make_inputs(device, shape, projections=21, dtype=torch.float32):
    g = torch.Generator().manual_seed(sum(shape))
    z = torch.randn(*shape, generator=g) * 1.3 + 0.2
    A = torch.randn(shape[-1], projections, generator=g)
    return z.to(device, dtype), (A / A.norm(dim=0)).to(device)


def value_and_gradient(form, z, A, scale=3.0, **options):
    z = z.detach().requires_grad_()
    value = form(z, A, **options)
    return value.detach(), torch.autograd.grad(scale * value, z)[0]


@pytest.mark.parametrize("shape", [(16, 3, 20), (1, 2, 5), (37, 2, 33), (40, 17), (1, 1), (70, 18)])
@pytest.mark.parametrize("knots", [2, 17])
def test_float32_equals_reference(kernel_device, shape, knots):
    z, A = make_inputs(kernel_device, shape)
    options = {"knots": knots, "per_timestep": len(shape) == 3}
    value, gradient = value_and_gradient(sigreg_triton, z, A, **options)
    expected, expected_gradient = sigreg_reference(z.cpu().numpy(), A.cpu().numpy(), **options)
    np.testing.assert_allclose(value.item(), expected, rtol=5e-6)
    error = np.abs(gradient.cpu().numpy() - 3.0 * expected_gradient).max()
    assert error <= 1e-5 * 3.0 * np.abs(expected_gradient).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(32, 4, 24), (50, 24)])
def test_error_is_at_most_twice_that_of_the_torch_form(kernel_device, dtype, shape):
    z, A = make_inputs(kernel_device, shape, dtype=dtype)
    per_timestep = len(shape) == 3
    expected, expected_gradient = sigreg_reference(z.double().cpu().numpy(), A.cpu().numpy(), per_timestep=per_timestep)
    errors = []
    for form in (sigreg_triton, sigreg_torch):
        value, gradient = value_and_gradient(form, z, A, scale=1.0, per_timestep=per_timestep)
        assert value.dtype == torch.float32
        assert gradient.dtype == dtype
        wrong = gradient.double().cpu().numpy() - expected_gradient
        errors.append((abs(value.item() - expected), np.sqrt(np.mean(wrong**2)) / np.abs(expected_gradient).max()))
    assert errors[0][0] <= 2 * errors[1][0] + 1e-5 * expected
    assert errors[0][1] <= 2 * errors[1][1] + 1e-5


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e5])
def test_angles_of_many_turns(kernel_device, scale):
    """One number a sample and a projection of 1: angles are exact products, as in the torch form."""
    z = torch.linspace(-scale, scale, 24, device=kernel_device)[:, None]
    A = torch.ones(1, 1, device=kernel_device)
    found = value_and_gradient(sigreg_triton, z, A, per_timestep=False)
    expected = value_and_gradient(sigreg_torch, z, A, per_timestep=False)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=5e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=5e-6)


def test_embeddings_that_have_run_away_show(kernel_device):
    A = torch.ones(1, 1, device=kernel_device)
    huge = sigreg_triton(torch.full((20, 1), 1e30, device=kernel_device), A, per_timestep=False)
    assert 0.0 <= huge.item() < 10.0
    endless = sigreg_triton(torch.full((20, 1), torch.inf, device=kernel_device), A, per_timestep=False)
    assert not torch.isfinite(endless)


def test_samples_in_slices_and_strided_rows(kernel_device):
    """Many samples are summed in slices of whole tiles; z may be a view with other strides."""
    z, A = make_inputs(kernel_device, (150, 9), projections=5)
    expected = sigreg_reference(z.cpu().numpy(), A.cpu().numpy(), knots=5, per_timestep=False)
    for view in (z, z.t().contiguous().t(), torch.cat([z, z], dim=1)[:, :9]):
        value, gradient = value_and_gradient(sigreg_triton, view, A, scale=1.0, knots=5, per_timestep=False)
        np.testing.assert_allclose(value.item(), expected[0], rtol=5e-6)
        np.testing.assert_allclose(gradient.cpu().numpy(), expected[1], atol=1e-5 * np.abs(expected[1]).max())


def test_poisoned_memory_is_never_read(kernel_device, monkeypatch):
    z, A = make_inputs(kernel_device, (37, 3, 9))
    clean = value_and_gradient(sigreg_triton, z, A, knots=3, per_timestep=True)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    for a, b in zip(clean, value_and_gradient(sigreg_triton, z, A, knots=3, per_timestep=True), strict=True):
        assert torch.equal(a, b)


def test_nothing_of_the_size_of_all_knots_exists(kernel_device):
    z, A = make_inputs(kernel_device, (32, 2, 24), projections=40)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(t)]
            sizes.extend(t.numel() for t in made if t.is_floating_point())  # the interpreter handles bytes as well
            return out

    with Watch():
        value_and_gradient(sigreg_triton, z, A, per_timestep=True)
    assert max(sizes) <= 32 * 2 * 40 * 17 // 4


def _sigreg_triton_worker(rank, path, out):
    os.environ["TRITON_INTERPRET"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    z, A = make_inputs("cpu", (24, 1, 9))
    mine = z[:10] if rank == 0 else z[10:]  # unequal shares
    value, gradient = value_and_gradient(sigreg_triton, mine, A, per_timestep=True)
    np.savez(f"{out}_{rank}.npz", value=value.numpy(), gradient=gradient.numpy())
    dist.barrier()  # without it gloo now and then aborts the process that leaves while the other still works
    dist.destroy_process_group()


def test_two_processes_equal_one(kernel_device, tmp_path):
    """The statistic is that of the global batch; averaged gradients are those of one process."""
    if kernel_device != "cpu":
        pytest.skip("two processes need the interpreter here")
    mp.spawn(_sigreg_triton_worker, (tmp_path / "rendezvous", tmp_path / "out"), nprocs=2)
    z, A = make_inputs("cpu", (24, 1, 9))
    value, gradient = value_and_gradient(sigreg_triton, z, A, per_timestep=True)
    found = []
    for rank in range(2):
        with np.load(f"{tmp_path / 'out'}_{rank}.npz", allow_pickle=False) as file:
            np.testing.assert_allclose(file["value"], value.numpy(), rtol=1e-6)
            found.append(file["gradient"] / 2)
    np.testing.assert_allclose(np.concatenate(found), gradient.numpy(), rtol=1e-5, atol=1e-8)


def test_wrong_arguments_are_named(kernel_device):
    z, A = make_inputs(kernel_device, (6, 2, 5))
    with pytest.raises(ValueError, match=r"\(N,D\)"):
        sigreg_triton(z, A, per_timestep=False)
    with pytest.raises(ValueError, match="float64"):
        sigreg_triton(z.double(), A, per_timestep=True)
