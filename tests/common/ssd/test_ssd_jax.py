"""The JAX form of the scan against the float64 recurrence, golden vectors, and the properties that a scan must have."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from common.ssd.reference import ssd_scan_backward_reference, ssd_scan_reference

pytest.importorskip("jax", reason="JAX is not installed: the extra `worldmodel`")

import jax
import jax.numpy as jnp

from common.ssd.jax_impl import ssd_scan_jax

GOLDEN = Path(__file__).parents[2] / "golden"
NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")


def make_inputs(batch, length, heads, width, groups, n, *, seed=0, decay=4.0):
    g = np.random.default_rng(seed)
    shapes = [
        (batch, length, heads, width),
        (batch, length, heads),
        (heads,),
        (batch, length, groups, n),
        (batch, length, groups, n),
        (heads,),
        (batch, heads, width, n),
    ]
    inputs = [g.standard_normal(shape) for shape in shapes]
    inputs[1] = np.log1p(np.exp(inputs[1] - 1.0))
    inputs[2] = -decay * g.random(heads) - 0.05
    return inputs


def rounded(inputs, dtype):
    """The inputs as numbers of `dtype`; dt, A, D and the state stay float32."""
    return [np.asarray(jnp.asarray(a, dtype if i in (0, 3, 4) else jnp.float32), np.float64)
            for i, a in enumerate(inputs)]  # fmt: skip


def run(inputs, dy, dstate, documents=None, chunk_size=16, dtype=jnp.float32):
    """Outputs, final state and all seven gradients."""
    arrays = [jnp.asarray(a, dtype if i in (0, 3, 4) else jnp.float32) for i, a in enumerate(inputs)]
    ids = None if documents is None else jnp.asarray(documents)

    def scan(*a):
        return ssd_scan_jax(*a[:6], initial_state_BHPN=a[6], document_ids_BT=ids, chunk_size=chunk_size)

    def both_ways(dy, dstate, *a):
        results, pull = jax.vjp(scan, *a)
        return results, pull((dy.astype(results[0].dtype), dstate.astype(results[1].dtype)))

    (y, state), grads = jax.jit(both_ways)(jnp.asarray(dy), jnp.asarray(dstate), *arrays)
    assert [g.dtype for g in grads] == [a.dtype for a in arrays]
    return [np.asarray(t, np.float64) for t in (y, state, *grads)]


def run_reference(inputs, dy, dstate, documents=None):
    options = {"initial_state_BHPN": inputs[6], "document_ids_BT": documents}
    y, state = ssd_scan_reference(*inputs[:6], **options)
    grads = ssd_scan_backward_reference(dy, dstate, *inputs[:6], **options)
    return [y, state, *(grads[name] for name in NAMES)]


def errors(results, expected):
    return [float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) for a, b in zip(results, expected, strict=True)]


@pytest.mark.parametrize(("length", "groups"), [(1, 2), (63, 2), (500, 1)])
def test_float32_equals_reference(length, groups):
    inputs = rounded(make_inputs(2, length, 4, 5, groups, 6, seed=length), jnp.float32)
    g = np.random.default_rng(1)
    dy, dstate = g.standard_normal((2, length, 4, 5)), g.standard_normal((2, 4, 5, 6))
    assert max(errors(run(inputs, dy, dstate, chunk_size=64), run_reference(inputs, dy, dstate))) < 5e-6


def test_bfloat16_is_rounded_as_its_operands_are():
    """Operands of products are rounded once (2^-9), sums are not: errors stay near that of one rounding."""
    inputs = rounded(make_inputs(2, 100, 4, 16, 1, 16), jnp.bfloat16)
    dy = np.asarray(jnp.asarray(np.random.default_rng(1).standard_normal((2, 100, 4, 16)), jnp.bfloat16), np.float64)
    dstate = np.random.default_rng(2).standard_normal((2, 4, 16, 16))
    found = errors(run(inputs, dy, dstate, dtype=jnp.bfloat16), run_reference(inputs, dy, dstate))
    assert max(found) < 2.0**-7


def test_chunk_size_does_not_matter():
    inputs = make_inputs(2, 90, 2, 4, 1, 3)
    dy, dstate = np.ones((2, 90, 2, 4)), np.ones((2, 2, 4, 3))
    first, *others = (run(inputs, dy, dstate, chunk_size=size) for size in (45, 1, 1000))
    assert all(max(errors(other, first)) < 5e-6 for other in others)


def test_state_carries_across_a_split():
    x, dt, A, B, C, D, state = (jnp.asarray(a, jnp.float32) for a in make_inputs(2, 40, 4, 5, 2, 6))
    scan = jax.jit(ssd_scan_jax, static_argnames="chunk_size")
    whole, whole_state = scan(x, dt, A, B, C, D, initial_state_BHPN=state, chunk_size=16)
    parts = []
    for start, end in itertools.pairwise((0, 1, 18, 40)):
        s = slice(start, end)
        y, state = scan(x[:, s], dt[:, s], A, B[:, s], C[:, s], D, initial_state_BHPN=state, chunk_size=16)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, whole_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [1, 47])
def test_later_inputs_change_nothing_earlier(change):
    inputs = [jnp.asarray(a, jnp.float32) for a in make_inputs(1, 60, 2, 4, 1, 3)]
    scan = jax.jit(ssd_scan_jax, static_argnames="chunk_size")
    before, _ = scan(*inputs[:6], chunk_size=16)
    for i, value in ((0, 1e3), (1, 50.0), (3, -1e3), (4, 7.0)):
        inputs[i] = inputs[i].at[:, change:].set(value)
    after, _ = scan(*inputs[:6], chunk_size=16)
    assert np.array_equal(before[:, :change], after[:, :change])
    assert not np.array_equal(before[:, change:], after[:, change:])


def test_documents():
    lengths = (20, 1, 19)
    inputs = rounded(make_inputs(2, 40, 2, 4, 1, 3), jnp.float32)
    g = np.random.default_rng(1)
    dy, dstate = g.standard_normal((2, 40, 2, 4)), g.standard_normal((2, 2, 4, 3))
    ids = np.broadcast_to(np.repeat([7, 3, 7], lengths), (2, 40))
    assert max(errors(run(inputs, dy, dstate, ids, chunk_size=8), run_reference(inputs, dy, dstate, ids))) < 5e-6


@pytest.mark.parametrize("strength", [1e4, 1e8])
def test_strong_decay_neither_overflows_nor_turns_nan(strength):
    inputs = rounded(make_inputs(1, 100, 2, 4, 1, 3), jnp.float32)
    inputs[2] = -strength * np.ones(2)
    dy, dstate = np.ones((1, 100, 2, 4)), np.ones((1, 2, 4, 3))
    results = run(inputs, dy, dstate, chunk_size=64)
    assert all(np.isfinite(t).all() for t in results)
    assert max(errors(results, run_reference(inputs, dy, dstate))) < 1e-5


def test_golden_vectors():
    with np.load(GOLDEN / "ssd_1.npz", allow_pickle=False) as file:
        golden = {key: file[key] for key in file.files}
    arrays = [jnp.asarray(golden[name]) for name in NAMES[:6]]

    def both_ways(*a):
        results, pull = jax.vjp(ssd_scan_jax, *a)
        return *results, *pull((jnp.asarray(golden["grad_y"]), jnp.zeros_like(results[1])))

    found = [np.asarray(t, np.float64) for t in jax.jit(both_ways)(*arrays)]
    expected = [golden[key].astype(np.float64) for key in ("y", "final_state", *(f"d{name}" for name in NAMES[:6]))]
    assert max(errors(found, expected)) < 2e-5


def test_wrong_shapes_are_named():
    x, dt, A, B, C, D, state = make_inputs(2, 8, 4, 4, 2, 3)
    with pytest.raises(ValueError, match=r"dt is \(2, 7, 4\), expected \(2, 8, 4\)"):
        ssd_scan_jax(x, dt[:, :7], A, B, C, D)
    with pytest.raises(ValueError, match="initial_state"):
        ssd_scan_jax(x, dt, A, B, C, D, initial_state_BHPN=state.swapaxes(2, 3))
    with pytest.raises(ValueError, match="dividing"):
        ssd_scan_jax(x[:, :, :3], dt[:, :, :3], A[:3], B, C, D[:3])
