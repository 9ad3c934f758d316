"""Muon against a plain loop, batched against one by one, two processes against one, and its state through a save."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from common.optim.muon import NEWTON_SCHULZ_POLYNOMIALS, POLAR_EXPRESS_POLYNOMIALS, Muon, newton_schulz_torch
from common.optim.reference import newton_schulz_reference

GOLDEN = Path(__file__).parents[2] / "golden"
SHAPES = ((8, 12), (12, 8), (8, 12), (6, 6), (8, 12))


def make_matrices(shapes=SHAPES, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def make_params(dtype=torch.float32):
    return [torch.nn.Parameter(t) for t in make_matrices(dtype=dtype)]


def take_steps(optimizer, params, steps, first=0):
    for i in range(first, first + steps):
        for p, gradient in zip(
            params, make_matrices([tuple(p.shape) for p in params], 100 + i, params[0].dtype), strict=True
        ):
            p.grad = gradient
        optimizer.step()


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 4), (4, 1)])
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_newton_schulz_equals_its_action_on_singular_values(shape, steps):
    G = make_matrices([shape], dtype=torch.float64)[0]
    ours = newton_schulz_torch(G, steps)
    np.testing.assert_allclose(ours.numpy(), newton_schulz_reference(G.numpy(), steps), atol=1e-12)
    low = newton_schulz_torch(G.float(), steps)
    assert low.dtype == torch.float32
    np.testing.assert_allclose(low.numpy(), ours.numpy(), atol=2e-5)


@pytest.mark.parametrize("steps", [0, 2, 9])
def test_other_polynomials_take_their_turn(steps):
    G = make_matrices([(9, 6)], dtype=torch.float64)[0]
    expected = newton_schulz_reference(G.numpy(), steps, POLAR_EXPRESS_POLYNOMIALS)
    np.testing.assert_allclose(
        newton_schulz_torch(G, steps, polynomials=POLAR_EXPRESS_POLYNOMIALS).numpy(), expected, atol=1e-12
    )


def test_polar_express_reaches_one_where_the_quintic_swings():
    """Singular values in a ratio of 300, after five and eight iterations."""
    G = torch.diag(torch.logspace(-2.5, 0, 24, dtype=torch.float64))

    def farthest(name: str, steps: int) -> float:
        result = newton_schulz_torch(G, steps, polynomials=NEWTON_SCHULZ_POLYNOMIALS[name])
        return float((torch.linalg.svdvals(result) - 1).abs().max())

    assert farthest("polar_express", 5) < 0.13
    assert farthest("polar_express", 8) < 1e-3
    assert min(farthest("jordan", 5), farthest("jordan", 8)) > 0.25


def test_muon_passes_its_polynomials_on():
    params = make_params()
    seen = []

    def watched(G_BMN, steps, **options):
        seen.append(options["polynomials"])
        return newton_schulz_torch(G_BMN, steps, **options)

    take_steps(Muon(params, polynomials=POLAR_EXPRESS_POLYNOMIALS, newton_schulz=watched), params, 1)
    assert seen
    assert set(seen) == {POLAR_EXPRESS_POLYNOMIALS}


def test_newton_schulz_batch_equals_one_by_one():
    G_BMN = torch.stack(make_matrices([(9, 5)] * 4, dtype=torch.float64))
    one_by_one = torch.stack([newton_schulz_torch(G, 5) for G in G_BMN])
    torch.testing.assert_close(newton_schulz_torch(G_BMN, 5), one_by_one, rtol=1e-13, atol=1e-13)


def test_newton_schulz_orthogonalises():
    singular = torch.linalg.svdvals(newton_schulz_torch(make_matrices([(40, 64)], dtype=torch.float64)[0], 5))
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    assert torch.equal(newton_schulz_torch(torch.zeros(3, 4), 5), torch.zeros(3, 4))


@pytest.mark.parametrize("steps", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_golden(steps, dtype):
    """Made in bfloat16, whose rounding the iteration amplifies: 5% of the norm."""
    with np.load(GOLDEN / "muon.npz", allow_pickle=False) as file:
        G, expected = torch.tensor(file["G"]), torch.tensor(file[f"ns{steps}"])
    ours = newton_schulz_torch(G, steps, dtype=dtype)
    assert (ours - expected).norm() < 0.05 * expected.norm()
    assert (newton_schulz_torch(G, steps + 1) - expected).norm() > 0.1 * expected.norm()  # the number of steps shows


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("normalize_rows", [True, False])
def test_steps_equal_a_plain_loop(nesterov, normalize_rows):
    options = {"lr": 0.03, "momentum": 0.9, "steps": 3, "weight_decay": 0.1}
    params = make_params(torch.float64)
    take_steps(Muon(params, nesterov=nesterov, normalize_rows=normalize_rows, **options), params, 4)
    for index, start in enumerate(make_matrices(dtype=torch.float64)):
        p, m = start.numpy().copy(), np.zeros(start.shape)
        for i in range(4):
            g = make_matrices(seed=100 + i, dtype=torch.float64)[index].numpy()
            m = 0.9 * m + g
            u = g + 0.9 * m if nesterov else m
            if normalize_rows:
                u = u / np.sqrt((u**2).mean(axis=1, keepdims=True))
            p = p * (1 - 0.03 * 0.1) - 0.03 * max(1.0, p.shape[0] / p.shape[1]) ** 0.5 * newton_schulz_reference(u, 3)
        np.testing.assert_allclose(params[index].detach().numpy(), p, rtol=1e-10, atol=1e-12)


def test_row_splits_equal_separate_matrices():
    whole, splits = torch.nn.Parameter(make_matrices([(20, 6)], dtype=torch.float64)[0]), (8, 9, 3)
    parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().split(splits)]
    a = Muon([{"params": [whole], "row_splits": splits}], lr=0.1, weight_decay=0.1, normalize_rows=True)
    b = Muon(parts, lr=0.1, weight_decay=0.1, normalize_rows=True)
    for i in range(3):
        whole.grad = make_matrices([(20, 6)], 50 + i, torch.float64)[0]
        for part, gradient in zip(parts, whole.grad.split(splits), strict=True):
            part.grad = gradient.clone()
        a.step()
        b.step()
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in parts]), rtol=1e-12, atol=1e-12)


def test_groups_keep_their_own_options():
    """Matrices of one shape are one batch across groups, yet each takes its group's learning rate and decay."""
    together, alone = make_params(), make_params()
    one, two = {"lr": 0.1, "weight_decay": 0.2}, {"lr": 0.01, "momentum": 0.5}
    take_steps(Muon([{"params": together[:2], **one}, {"params": together[2:], **two}]), together, 3)
    first, second = Muon(alone[:2], **one), Muon(alone[2:], **two)
    for i in range(3):
        for p, gradient in zip(alone, make_matrices(seed=100 + i), strict=True):
            p.grad = gradient
        first.step()
        second.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_state_survives_a_save_exactly(tmp_path):
    """Tensors as arrays, options as JSON; the continued run is bitwise the uninterrupted one."""
    params = make_params()
    optimizer = Muon(params, lr=0.05, row_splits=None)
    take_steps(optimizer, params, 3)
    state = optimizer.state_dict()
    assert all(list(entry) == ["momentum"] for entry in state["state"].values())
    arrays = {f"m{i}": entry["momentum"].numpy() for i, entry in state["state"].items()}
    np.savez(tmp_path / "state.npz", **arrays, **{f"p{i}": p.detach().numpy() for i, p in enumerate(params)})
    options = json.dumps(state["param_groups"])
    take_steps(optimizer, params, 3, first=3)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
        again = [torch.nn.Parameter(torch.tensor(file[f"p{i}"])) for i in range(len(params))]
        momentum = {i: {"momentum": torch.tensor(file[f"m{i}"])} for i in range(len(params))}
    other = Muon(again, lr=0.7)
    other.load_state_dict({"state": momentum, "param_groups": json.loads(options)})
    assert other.param_groups[0]["lr"] == 0.05
    take_steps(other, again, 3, first=3)
    for a, b in zip(params, again, strict=True):
        assert torch.equal(a, b)


def test_parameter_without_gradient_is_left_alone():
    params = make_params()
    before = params[1].detach().clone()
    optimizer = Muon(params, lr=0.1, weight_decay=0.5)
    for p, gradient in zip(params, make_matrices(seed=5), strict=True):
        p.grad = gradient
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state
    assert optimizer.step(lambda: torch.tensor(2.5)).item() == 2.5


def _muon_worker(rank, ranks, path, out):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    params = make_params()
    optimizer = Muon(
        [{"params": params[:3], "row_splits": None}, {"params": params[3:], "normalize_rows": True}], lr=0.1
    )
    take_steps(optimizer, params, 4)
    momentum = {f"m{i}": optimizer.state[p]["momentum"].numpy() for i, p in enumerate(params)}
    np.savez(f"{out}_{rank}.npz", **{f"p{i}": p.detach().numpy() for i, p in enumerate(params)}, **momentum)
    dist.barrier()  # without it gloo now and then aborts the process that leaves while the other still works
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_equal_one(tmp_path, ranks):
    """A number of matrices of one shape that does not divide, and shapes of which a rank has none."""
    mp.spawn(_muon_worker, (ranks, tmp_path / "rendezvous", tmp_path / "out"), nprocs=ranks)
    params = make_params()
    optimizer = Muon(
        [{"params": params[:3], "row_splits": None}, {"params": params[3:], "normalize_rows": True}], lr=0.1
    )
    take_steps(optimizer, params, 4)
    found = []
    for rank in range(ranks):
        with np.load(f"{tmp_path / 'out'}_{rank}.npz", allow_pickle=False) as file:
            found.append({key: file[key] for key in file.files})
    for key, first in found[0].items():
        assert all(np.array_equal(first, other[key]) for other in found)
    for i, p in enumerate(params):
        np.testing.assert_allclose(found[0][f"p{i}"], p.detach().numpy(), rtol=0, atol=1e-6)
        np.testing.assert_array_equal(found[0][f"m{i}"], optimizer.state[p]["momentum"].numpy())


def test_matrices_of_one_pair_of_sides_are_one_batch():
    """Standing matrices are laid down: one product for both, and each exchange is waited for after the next batch."""
    seen = []

    def watched(G_BMN, steps, **options):
        seen.append(tuple(G_BMN.shape))
        return newton_schulz_torch(G_BMN, steps, **options)

    params = make_params()
    take_steps(Muon(params, lr=0.1, newton_schulz=watched), params, 1)
    assert seen == [(4, 8, 12), (1, 6, 6)]


def test_wrong_options_are_named():
    p = torch.nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"shape \(4, 3, 2\)"):
        Muon([torch.nn.Parameter(torch.zeros(4, 3, 2))])
    with pytest.raises(ValueError, match="row_splits"):
        Muon([p], row_splits=(1, 2))
    with pytest.raises(ValueError, match="momentum"):
        Muon([p], momentum=1.0)
    with pytest.raises(ValueError, match="expected"):
        newton_schulz_torch(torch.zeros(4), 3)
